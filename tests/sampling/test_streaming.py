"""Text as it is drawn: pieces for a program, and what a terminal shows."""

import dataclasses
import io
import re

import numpy as np
import pytest

from bd3_jax.data.tokenizers import bytes_tokenizer
from bd3_jax.sampling.drawing import Drawn, draw
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


@pytest.mark.parametrize(("objective", "max_length"), [("mdlm", 7), ("sedd", 2)])
def test_pieces_with_a_context_of_two_tokens(objective, max_length, toy_lm, random_params):
    """MDLM's windows overlap, and each has one token that is new."""
    lm = dataclasses.replace(toy_lm(objective, vocab_size=258, length=2), ids=TOKENIZER.ids)
    sampler, params = Sampler(lm, sampling_config(objective, max_length=max_length, seed=3)), random_params(lm)
    row = sampler.canvas([[]])[0]
    (whole,) = draw(sampler, params, row, 1, 1)
    assert "".join(pieces(sampler, params, row, TOKENIZER)) == TOKENIZER.decode(whole.tokens[1:])


def test_the_first_of_several_is_watched(model):
    sampler, params = model
    row, out = sampler.canvas([TOKENIZER.encode("Ab")])[0], io.StringIO()
    drawn = list(draw(sampler, params, row, 3, 2, watch=Watch(TOKENIZER, out)))
    texts = [TOKENIZER.decode(each.tokens[1:]) for each in drawn]
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
    assert plain.getvalue() == "\n--- sample 0\n" + TOKENIZER.decode(drawn.tokens[1:])
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


def watched(tokenizer, tokens, calls, ends, out):
    """What Watch writes of a sample, of which so many tokens are there after each block."""
    tokens, calls = np.array(tokens, np.int32), np.array(calls, np.int32)
    drawn = Drawn(0, tokens, len(tokens), 0, 0, 0, 0.0, calls, np.where(calls, 0.5, 0))
    watch = Watch(tokenizer, out, seconds_per_call=0)
    for drawn.length in ends:
        drawn.nfe = int(calls[: drawn.length].max())
        watch(drawn)
    return out.getvalue().removeprefix("\n--- sample 0\n")


def test_watch_parts_words_but_not_their_pieces(word_pieces):
    """Also across blocks."""
    tokens, calls = [0, 3, 4, 5, 7, 6], [0, 0, 2, 1, 4, 3]
    assert watched(word_pieces, tokens, calls, [3, 6], io.StringIO()) == "red walking cat."
    shown = watched(word_pieces, tokens, calls, [6], Terminal()).split("\x1b8\x1b[J")[1:]
    plain = [re.sub(r"\x1b\[[\d;]*m", "", frame).replace("\u2591", "_") for frame in shown]
    assert plain == ["red_ing__", "red walking__", "red walking_.", "red walking cat.", "red walking cat."]


def test_watch_shows_characters_of_several_tokens_whole():
    """Once all tokens are there, whichever is the last; the second e is of two blocks, the third lacks a byte."""
    tokens, calls = [256, *"\u00e9a\u00e9\u00e9".encode()][:-1], [0, 2, 1, 3, 4, 5, 6]
    assert watched(TOKENIZER, tokens, calls, [5, 7], io.StringIO()) == "\u00e9a\u00e9\ufffd"
    shown = watched(TOKENIZER, tokens, calls, [5, 7], Terminal()).split("\x1b8\x1b[J")[1:]
    plain = [re.sub(r"\x1b\[[\d;]*m", "", frame).replace("\u2591", "_") for frame in shown]
    first = ["___", "\u00e9__", "\u00e9a_", "\u00e9a", "\u00e9a"]
    assert [frame.split("\x1bD")[0] for frame in plain] == [*first, "\u00e9_", "\u00e9\ufffd", "\u00e9\ufffd"]
