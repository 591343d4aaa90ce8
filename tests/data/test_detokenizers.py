import random
import re
import string
import time

import pytest

from bd3_jax.data import detokenizers
from bd3_jax.data.detokenizers import lambada, lm1b, ptb, scientific_papers, unchanged, wikitext

WIKITEXT = [
    (" = Robert <unk> = \n", " = Robert <unk> =\n"),
    (" = = Early life = = \n", " == Early life ==\n"),
    (" = = = 2008 – present = = = \n", " === 2008 – present ===\n"),
    (" = = = = Notes = = = = \n", " ==== Notes ====\n"),
    ("a role @-@ playing game with 1 @,@ 000 copies , 2 @.@ 5 %", "a role-playing game with 1,000 copies, 2.5 %"),
    ("He moved ; then he wrote : yes . Why ? Now ! ", "He moved; then he wrote: yes. Why? Now! "),
    ("( lit . Valkyria of the Battlefield 3 )", "(lit. Valkyria of the Battlefield 3)"),
    ("[ a ] { b } ( c )", "[a] {b} (c)"),
    ('the " Nameless " squad', 'the "Nameless" squad'),
    ("the ' Nameless ' squad", "the 'Nameless' squad"),
    ("the game 's battle system", "the game's battle system"),
    ("the players ' choice", "the players' choice"),
    ("at 30 ° north", "at 30°north"),
    ("first \n second", "first\nsecond"),
    ("sold N units", "sold 1 units"),
    ("", ""),
]
PTB = [
    ("mr. <unk> is chairman of n.v. the dutch group", "mr. ? is chairman of n.v. the dutch group"),
    ("the company 's shares do n't pay", "the company's shares don't pay"),
    ("the traders ' view", "the traders' view"),
    ("rose N N N to $ N million", "rose 1 1 1 to $1 million"),
    ("# N billion of a 1\\/2 stake", "#1 billion of a 1/2 stake"),
    ("one \n two", "one\ntwo"),
]
LM1B = [
    ("He said : yes , it is ; well .", "He said: yes, it is; well."),
    ("It ended . Then it began .", "It ended. Then it began."),
    ("Really ? No ! Why ?", "Really? No! Why?"),
    ("Stop !", "Stop!"),
    (
        "see http : / / www.example.org / news or https : / / example.org",
        "see http://www.example.org/news or https://example.org",
    ),
    ("the company 's plan", "the company's plan"),
    ('" We will , " he said', '"We will," he said'),
    ('he said " yes " twice', 'he said "yes" twice'),
    ("it ( the plan ) and [ sic ]", "it (the plan) and [sic]"),
    ("$ 5 or £ 3", "$5 or £3"),
]
LAMBADA = [
    ("“ Yes , ” she said .", '\n" Yes , " she said .'),
    ("  plain text\n", "\nplain text"),
]
CASES = [(wikitext, *c) for c in WIKITEXT] + [(ptb, *c) for c in PTB] + [(lm1b, *c) for c in LM1B]
CASES += [(lambada, *c) for c in LAMBADA] + [(unchanged, " as , it is ", " as , it is ")]
CASES += [
    (
        scientific_papers,
        "as shown in ( @xcite ) , we find @xmath0 . it holds .",
        "as shown in (@xcite), we find @xmath0. it holds.",
    )
]
FUNCTIONS = sorted({case[0] for case in CASES}, key=lambda f: f.__name__)


@pytest.mark.parametrize(("detokenize", "line", "expected"), CASES)
def test_lines(detokenize, line, expected):
    assert detokenize(line) == expected


def _lines(alphabet: list[str], joint: str) -> list[str]:
    draw = random.Random(0)
    return [joint.join(draw.choices(alphabet, k=draw.randrange(30))) for _ in range(5000)]


@pytest.mark.parametrize("detokenize", FUNCTIONS)
def test_never_raises(detokenize):
    for line in _lines(list(string.printable) + list("“”°£é狐🦊\u2028\x00"), ""):
        assert isinstance(detokenize(line), str)


# Lines of these formats are words joined by single spaces, and every rule consumes what it acts on.
@pytest.mark.parametrize("detokenize", [ptb, lambada, unchanged])
def test_idempotent(detokenize):
    words = "the dogs 's ' n't N $ # <unk> 1\\/2 . , : ? ( ) “ ” \" a 1".split(" ")  # noqa: SIM905
    for line in _lines(words, " "):
        once = detokenize(line)
        assert detokenize(once) == once, line


@pytest.mark.parametrize("detokenize", FUNCTIONS)
@pytest.mark.parametrize("unit", ["(", "[", "{", "( ", '"', "'", '" ', "' ", " ", "a", "( a . "])
def test_time_grows_with_the_length_alone(detokenize, unit):
    """Brackets and quotes that nothing closes, and runs of white space, are where such rules search again and again."""

    def seconds(length):
        text = '( "' + unit * (length // len(unit))
        times = []
        for _ in range(3):
            began = time.perf_counter()
            detokenize(text)
            times.append(time.perf_counter() - began)
        return min(times)

    # 16 times as long takes 16 times as long, and not 256; a millisecond is too short to be measured on a busy machine.
    assert seconds(16_000) < 80 * max(seconds(1000), 1e-3)


def _by_pattern(text, opening, closing):
    """What `_strip_inside` does, as the published code has it."""
    first, last = re.escape(opening), re.escape(closing)
    return re.sub(f"{first}([^{last}]*){last}", lambda match: opening + match[1].strip() + closing, text)


def test_brackets_are_paired_as_in_the_published_code():
    for pair in ("()", "[]", "{}", '""', "''"):
        for line in _lines([*pair, *pair, " ", "\n", "a", "\u2028"], ""):
            assert detokenizers._strip_inside(line, *pair) == _by_pattern(line, *pair)


def test_every_detokenizer_is_tested():
    public = {name for name in vars(detokenizers) if not name.startswith("_")} - {"re", "Callable", "Detokenizer"}
    assert public == {f.__name__ for f in FUNCTIONS}
