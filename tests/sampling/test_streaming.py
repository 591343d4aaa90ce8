import io

import pytest

from bd3_jax.data.tokenizers import bytes_tokenizer
from bd3_jax.sampling.drawing import draw
from bd3_jax.sampling.sampler import Sampler
from bd3_jax.sampling.streaming import Watch, pieces
from tests.sampling.settings import sampling_config

TOKENIZER = bytes_tokenizer()


@pytest.fixture(scope="module", params=[("bd3lm", 4), ("ar", 0)], ids=["bd3lm", "ar"])
def model(request, toy_lm, random_params):
    objective, block_size = request.param
    lm = toy_lm(objective, block_size, vocab_size=258)
    lm = type(lm)(lm.objective, lm.block_size, lm.noise, lm.network, TOKENIZER.ids)
    return Sampler(lm, sampling_config(objective, max_length=31, seed=3)), random_params(lm)


def test_pieces_are_the_text(model):
    sampler, params = model
    row = sampler.canvas([TOKENIZER.encode("Ab")])[0]
    (whole,) = draw(sampler, params, row, 1, 1, watch=lambda drawn: None)
    told = list(pieces(sampler, params, row, TOKENIZER))
    assert "".join(told) == TOKENIZER.decode(whole.tokens[1:])
    assert len(told) > 3
    assert told[0].startswith("Ab")


def test_the_first_of_several_is_watched(model):
    sampler, params = model
    row, out = sampler.canvas([TOKENIZER.encode("Ab")])[0], io.StringIO()
    drawn = list(draw(sampler, params, row, 3, 2, watch=Watch(TOKENIZER, out)))
    texts = ["".join(TOKENIZER.decode([token]) for token in each.tokens[1:]) for each in drawn]
    # The third begins where the first two have ended.
    assert out.getvalue() == f"\n--- sample 0\n{texts[0]}\n--- sample 2\n{texts[2]}"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_watch_shows_every_call_in_a_terminal_and_plain_text_elsewhere(model):
    sampler, params = model
    row = sampler.canvas([TOKENIZER.encode("Ab")])[0]
    plain, terminal = io.StringIO(), Terminal()
    for out in (plain, terminal):
        (drawn,) = draw(sampler, params, row, 1, 1, watch=Watch(TOKENIZER, out, seconds_per_call=0))
    texts = [TOKENIZER.decode([token]) for token in drawn.tokens[1:]]
    assert plain.getvalue() == "\n--- sample 0\n" + "".join(texts)
    shown = terminal.getvalue()
    assert shown.startswith("\n--- sample 0\n")
    frames = shown.split("\x1b8\x1b[J")[1:]
    calls = {int(call) for call in drawn.drawn_at[:31] if call}
    assert len(frames) == len(calls) + (8 if sampler.model.objective == "bd3lm" else 28)  # one more for each block
    hidden = [frame.count("\u2591") for frame in frames]
    assert hidden[-1] == 0
    # Blocks of four: three still hidden after the first call, two after the next.
    assert hidden[2:7] == ([3, 2, 1, 0, 0] if sampler.model.objective == "bd3lm" else [0] * 5)
    assert "\x1b[38;5;" in shown
