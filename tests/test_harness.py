"""lm_eval's harness on the authors' models, against formulas in NumPy; its own command line on tasks of local files."""

import dataclasses
import json
import string

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file

from bd3_jax import cli
from bd3_jax.errors import UserError
from tests import reference
from tests.conftest import GOLDEN

pytest.importorskip("lm_eval", reason="the extra eval is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # other people's packages

BOS, MASK, LENGTH = 29, 30, 16
LETTERS = f"{string.ascii_lowercase} .\n"


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """Ids 0 to 28 are characters, 29 is BOS and EOS, as the V of the golden models wants it."""
    vocabulary = {letter: n for n, letter in enumerate(LETTERS)} | {"<|endoftext|>": BOS}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    path = tmp_path_factory.mktemp("letters") / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


@pytest.fixture
def make(letters):
    from bd3_jax.harness import HarnessModel

    return lambda name, **args: HarnessModel(str(GOLDEN / name), tokenizer=letters, **args)


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, n) for n, each in enumerate(arguments)]


def log_probs(name, tokens):
    """float64, of every token at every position, the mask excluded; by formulas of the tests' own."""
    config = json.loads((GOLDEN / name / "config.json").read_text())
    tensors = load_file(GOLDEN / name / "model.safetensors")
    logits = np.float64(reference.logits(config, tensors, np.array([tokens])))[0, :, :MASK]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def ids(text):
    return [LETTERS.index(letter) for letter in text]


def autoregressive(given, free):
    row = [*given, *free]
    found = log_probs("ar", row)
    return sum(found[place - 1, row[place]] for place in range(len(given), len(row)))


def left_to_right(given, free):
    """Blocks of 4, each position after the clean blocks before it, with masks from there to the end of its block."""
    row, total = [*given, *free], 0.0
    for place in range(len(given), len(row)):
        now = [*row[:place], *[MASK] * (4 - place % 4)]
        total += log_probs("bd3lm_block4", now)[place, row[place]]
    return total


@pytest.mark.parametrize(
    ("name", "estimator", "by_hand"), [("ar", "", autoregressive), ("bd3lm_block4", "left_to_right", left_to_right)]
)
def test_log_likelihoods(make, name, estimator, by_hand):
    """Of the continuation alone, in requests of all lengths, in one batch or several; spaces go to the continuation."""
    pairs = [
        ("", "abc"),
        ("a dog", " sat"),
        ("a dog ", "sat"),
        ("what is seen is", " x"),
        ("so", "me words "),
        ("a", ""),
    ]
    found = make(name, estimator=estimator, batch_size=2).loglikelihood(requests("loglikelihood", *pairs))
    sat = by_hand([BOS, *ids("a dog")], ids(" sat"))
    wanted = [
        by_hand([BOS], ids("abc")), sat, sat,
        by_hand(ids("hat is seen is"), ids(" x")), by_hand([BOS, *ids("so")], ids("me words ")), 0.0,
    ]  # fmt: skip
    np.testing.assert_allclose([each[0] for each in found], wanted, rtol=2e-4, atol=1e-5)


def test_rolling_windows(make):
    """15 tokens after one of context each, the last with as much as fits: every token is scored once."""
    text = "what is seen and heard is told again."
    (found,) = make("ar").loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    row = ids(text)
    wanted = autoregressive([BOS], row[:15]) + autoregressive(row[14:15], row[15:30])
    wanted += autoregressive(row[len(row) - LENGTH : 30], row[30:])
    assert len(row) == 37
    assert found == pytest.approx(wanted, rel=1e-4)
    ((long, _),) = make("ar").loglikelihood(requests("loglikelihood", ("so ", text)))
    row = ids(f" {text}")
    wanted = autoregressive(ids("o"), row[:15]) + autoregressive(row[14:15], row[15:30])
    assert long == pytest.approx(wanted + autoregressive(row[len(row) - LENGTH : 30], row[30:]), rel=1e-4)


def test_choices_after_one_context_have_the_same_noise(make):
    """So equal continuations have equal bounds; another seed or context has another."""
    model, pair = make("bd3lm_block4", draws=2, batch_size=3), ("some words", " and")
    (first, second, other) = model.loglikelihood(requests("loglikelihood", pair, pair, ("same words", " and")))
    assert first == second != other
    assert make("bd3lm_block4", draws=2, seed=1).loglikelihood(requests("loglikelihood", pair))[0] != first


def test_many_draws_approach_the_bound(make):
    """Both estimators of the NELBO have one mean, and it is below the likelihoods' of the two orders, or near."""
    pairs = requests("loglikelihood", ("a d", "og sat"))
    found = {}
    for estimator, draws in (("low_variance", 200), ("monte_carlo", 1000), ("left_to_right", 1)):
        ((found[estimator], _),) = make("bd3lm_block4", estimator=estimator, draws=draws).loglikelihood(pairs)
    assert found["low_variance"] == pytest.approx(found["monte_carlo"], rel=0.05)
    assert found["low_variance"] < found["left_to_right"] + 1


def test_settings_are_told(make, capsys):
    info = make("bd3lm_block4", estimator="monte_carlo", draws=3, seed=7).get_model_info()["bd3"]
    assert info.items() >= {"likelihood": "upper bound, monte_carlo estimate", "draws": 3, "seed": 7}.items()
    assert json.loads(capsys.readouterr().out.removeprefix("bd3: ")) == info
    assert make("bd3lm_block4").get_model_info()["bd3"]["likelihood"] == "upper bound, low_variance estimate"
    assert make("sedd").get_model_info()["bd3"]["likelihood"] == "upper bound, monte_carlo estimate"
    assert "draws" not in make("ar").get_model_info()["bd3"]


@pytest.mark.parametrize("name", ["ar", "bd3lm_block4", "mdlm"])
def test_greedy_generation(make, name):
    """Prompts of all lengths at once, each as `Pretrained.sample` has it alone; what is generated is_greedy."""
    model = make(name, batch_size=2)
    prompts = ["", "a do", "what is seen is seen", "so"]
    asked = {"until": ["\n"], "max_gen_toks": 6}
    found = model.generate_until(requests("generate_until", *((prompt, asked) for prompt in prompts)))
    sampler = {} if name == "ar" else {"sampler": "confidence"}
    for prompt, text in zip(prompts, found, strict=True):
        kept = prompt[-(LENGTH - 1) :]
        length = len(kept) + 7 if name == "mdlm" else 27  # of the others the beginning is the same, compiled once
        (alone,) = model.model.sample(
            kept, num_samples=1, top_k=1, nucleus=1.0, max_length=length, min_entropy=0.0, **sampler
        )
        whole = model.text.decode(alone.tokens[len(kept) + 1 :][:6])
        assert text == whole.split("\n")[0].split("<|endoftext|>")[0]
    assert any(found)
    whole = model.generate_until(requests("generate_until", ("a do", {"max_gen_toks": 6})))[0]
    if name == "ar" and whole:
        ((_, greedy),) = model.loglikelihood(requests("loglikelihood", ("a do", whole)))
        assert greedy


def test_sampled_generation_and_stops(make):
    model = make("bd3lm_block4", batch_size=4)
    asked = {"max_gen_toks": 40, "do_sample": True, "temperature": 2.0, "top_p": 1.0, "top_k": 20, "seed": 3}
    prompts = [("a do", {**asked, "until": []})] * 4
    texts = model.generate_until(requests("generate_until", *prompts))
    assert len(set(texts)) == 4
    assert max(len(text) for text in texts) <= 40
    longest = max(texts, key=len)
    stop = longest[5:7]
    again = model.generate_until(requests("generate_until", *[("a do", {**asked, "until": [stop, ""]})] * 4))
    assert again == [text.split(stop)[0] for text in texts]


def test_the_temperature_is_that_of_the_model_unless_asked_for(make):
    """So low a one leaves nothing to chance, and the samples of one prompt are those of the greedy sampler."""
    model = make("ar", batch_size=4)
    c = model.model.config
    cold = dataclasses.replace(c, sampling=dataclasses.replace(c.sampling, temperature=1e-3))
    model.model = dataclasses.replace(model.model, config=cold)

    def texts(**asked):
        return model.generate_until(requests("generate_until", *[("a do", {"max_gen_toks": 6} | asked)] * 4))

    assert texts(do_sample=True) == texts(do_sample=False)
    assert len(set(texts(do_sample=True, temperature=1.0))) > 1
    assert texts(do_sample=True, temperature=0.0) == texts()


def test_mistakes(make, letters):
    from bd3_jax.harness import HarnessModel

    for args, message in (
        ({"estimater": "low_variance"}, "unknown argument 'estimater' in --model_args; allowed: pretrained, estimator"),
        ({"estimator": "exact"}, "config.eval.estimator must be one of monte_carlo"),
        ({"step": 3}, "step is 3, but .*bd3lm_block4 is no workdir"),
        ({"draws": 0}, "draws in --model_args is 0; allowed: 1 or more"),
        ({"batch_size": "auto"}, "--batch_size is 'auto'; allowed: 1 or more"),
    ):
        with pytest.raises(UserError, match=message):
            make("bd3lm_block4", **args)
    with pytest.raises(UserError, match="allowed: monte_carlo for objective sedd"):
        make("sedd", estimator="low_variance")
    with pytest.raises(UserError, match="lacks pretrained=SOURCE"):
        HarnessModel()
    generate = lambda name, **asked: make(name).generate_until(requests("generate_until", ("a", asked)))
    with pytest.raises(UserError, match="unknown argument 'num_beams' of generation; allowed: until, max_gen_toks"):
        generate("bd3lm_block4", num_beams=3)
    with pytest.raises(UserError, match="sedd has no greedy sampler"):
        generate("sedd", max_gen_toks=4)
    with pytest.raises(UserError, match="max_gen_toks is 16; allowed: up to 15"):
        generate("sedd", max_gen_toks=16, do_sample=True, temperature=1.0)
    (text,) = generate("sedd", max_gen_toks=4, do_sample=True, temperature=1.0, num_steps=4)
    assert len(text) <= 4


TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{context}}}}"
{rest}
"""


def test_the_command_line(letters, tmp_path, monkeypatch, capsys):
    """`bd3 lm_eval` on tasks of local files; its results hold what likelihood it is."""
    for name in ("HF_DATASETS_CACHE", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tasks = {
        "choice": ("multiple_choice", 'doc_to_choice: choices\ndoc_to_target: answer\ntarget_delimiter: ""'),
        "cloze": ("loglikelihood", 'doc_to_target: "{{word}}"\ntarget_delimiter: ""'),
        "write": ("generate_until", 'doc_to_target: "{{word}}"\ngeneration_kwargs: {until: ["."], max_gen_toks: 3}'),
    }
    records = [
        {"context": "some words", "choices": [" and", " or", " but so"], "answer": n, "word": " and"} for n in (0, 1, 2)
    ]
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, (kind, rest) in tasks.items():
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=f"bd3_{name}", kind=kind, rest=rest, file=file))
    model = f"pretrained={GOLDEN / 'bd3lm_block4'},tokenizer={letters},draws=4"
    argv = ["lm_eval", "--model", "bd3", "--model_args", model, "--tasks", "bd3_choice,bd3_cloze,bd3_write"]
    argv += ["--include_path", str(tmp_path), "--batch_size", "8", "--output_path", str(tmp_path / "out")]
    assert cli.main(argv) == 0
    assert "bd3_choice" in capsys.readouterr().out
    (written,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(written.read_text())
    assert found["config"]["bd3"]["likelihood"] == "upper bound, low_variance estimate"
    assert found["config"]["bd3"]["draws"] == 4
    # The choices are the same in all three questions, so that exactly one answer is right.
    assert found["results"]["bd3_choice"]["acc,none"] == pytest.approx(1 / 3)
    assert found["results"]["bd3_cloze"]["perplexity,none"] > 1

    argv[4] = f"pretrained={GOLDEN / 'bd3lm_block4'},drows=4"
    assert cli.main(argv) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: unknown argument 'drows' in --model_args;")
