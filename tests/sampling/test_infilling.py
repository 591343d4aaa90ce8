import numpy as np
import pytest

from bd3_jax.data.tokenizers import bytes_tokenizer
from bd3_jax.errors import UserError
from bd3_jax.sampling.drawing import Slots, draw
from bd3_jax.sampling.infilling import parse, resolve
from bd3_jax.sampling.sampler import Sampler
from tests.sampling.settings import change, sampling_config


def letters(text):
    return list(text.encode())


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("a[MASK]b", [97, None, 98]),
        ("a [MASK*3] b", [97, None, None, None, 32, 98]),  # a space before a gap belongs to it
        ("[MASK*2]", [None, None]),
        ("[MASK][MASK]a", [None, None, 97]),
        ("no gap, [mask]", letters("no gap, [mask]")),
    ],
)
def test_parse(template, expected):
    assert parse(template, letters) == expected


def test_resolve():
    c = sampling_config("bd3lm", infill="a[MASK*2]b", max_length=8)
    resolved, given = resolve(c, letters)
    assert (resolved.max_length, given) == (5, [97, None, None, 98])
    assert resolve(c, letters, infill=[1, None])[1] == [1, None]
    plain = sampling_config("bd3lm", prompt="ab")
    assert resolve(plain, letters) == (plain, [97, 98])
    assert resolve(plain, letters, prompt=[5])[1] == [5]
    # What is asked for here stands in the place of what the config says, whichever of the two that is.
    assert resolve(plain, letters, infill="a[MASK]")[1] == [97, None]
    assert resolve(c, letters, prompt="ab") == (c, [97, 98])
    with pytest.raises(UserError, match=r"^prompt and infill are both given"):
        resolve(plain, letters, prompt="a", infill="[MASK]")
    with pytest.raises(UserError, match=r"config.sampling.prompt and config.sampling.infill are both given"):
        resolve(sampling_config("bd3lm", prompt="a", infill="[MASK]"), letters)
    with pytest.raises(UserError, match=r"infill is 'abc'; allowed: a text with gaps"):
        resolve(c, letters, infill="abc")
    with pytest.raises(UserError, match=r"infill has 9 tokens with BOS; allowed: up to sampling.max_length = 8"):
        resolve(c, letters, infill="ab[MASK*6]")


@pytest.mark.parametrize(
    ("objective", "block_size", "sampler_name"),
    [
        ("bd3lm", 4, "first_hitting"),
        ("bd3lm", 4, "remasking"),
        ("bd3lm", 1, "first_hitting"),
        ("mdlm", 0, "first_hitting"),
        ("sedd", 0, "analytic"),
    ],
)
def test_given_tokens_stay(make, objective, block_size, sampler_name):
    """Gaps anywhere, in blocks that hold nothing else and in blocks that are given whole."""
    sampler, params = make(objective, block_size, max_length=11, sampler=sampler_name, num_steps=5)
    given = [3, None, 5, 5, None, 1, 1, None, None, 4]
    drawn = list(draw(sampler, params, sampler.canvas([given])[0], 6, 3))
    filled = {tuple(each.tokens.tolist()) for each in drawn}
    assert len(filled) > 1  # few tokens, many draws: most may be the same
    for tokens in filled:
        assert len(tokens) == 11
        assert sampler.model.ids.mask not in tokens
        assert all(token in (None, found) for token, found in zip(given, tokens[1:], strict=True))
    if sampler_name == "first_hitting":
        # Nothing beyond the end is drawn where one block is the whole context; else the last block is.
        surplus = 1 if block_size == 4 else 0
        assert {each.nfe for each in drawn} == {4 + surplus}


@pytest.mark.parametrize("kv_cache", [True, False])
@pytest.mark.parametrize(("objective", "block_size"), [("bd3lm", 4), ("bd3lm", 1), ("mdlm", 0)])
def test_more_may_be_given_than_the_training_context(make, monkeypatch, objective, block_size, kv_cache):
    """As when every block is gone through by itself and none is read at once."""
    sampler, params = make(objective, block_size, max_length=30, kv_cache=kv_cache)
    given = np.random.default_rng(0).integers(1, 9, 29).tolist()
    given[25] = given[27] = None
    row = sampler.canvas([given])[0]
    at_once = [each.tokens.tolist() for each in draw(sampler, params, row, 3, 3)]
    for tokens in at_once:
        assert all(token in (None, found) for token, found in zip(given, tokens[1:], strict=True))
        assert sampler.model.ids.mask not in tokens
    monkeypatch.setattr(Slots, "_blocks_given", lambda self, row: 0)
    assert [each.tokens.tolist() for each in draw(sampler, params, row, 3, 3)] == at_once


def test_the_gap_is_drawn_given_what_surrounds_it(make):
    """MDLM sees both sides: another token after the gap changes what is drawn in it."""
    sampler, params = make("mdlm", max_length=6)
    fill = lambda given: [
        each.tokens[2:4].tolist() for each in draw(sampler, params, sampler.canvas([given])[0], 20, 20)
    ]
    assert fill([3, None, None, 5, 5]) != fill([3, None, None, 6, 6])


def test_a_last_block_that_is_given_takes_no_calls(make):
    """Of 14 tokens in blocks of 4, two are missing: two calls, whatever the last block holds beyond them."""
    sampler, params = make("bd3lm", 4, sampler="first_hitting", max_length=14)
    row = sampler.canvas([[1, None, None, *[5] * 10]])[0]
    (drawn,) = draw(sampler, params, row, 1, 1)
    assert (drawn.nfe, drawn.length) == (2, 14)
    assert drawn.tokens[4:].tolist() == [5] * 10


def test_a_text_with_gaps_through_the_bytes_tokenizer(make):
    encode = bytes_tokenizer().encode
    c, given = resolve(sampling_config("mdlm", infill="r[MASK*2]", max_length=12), encode)
    sampler = Sampler(make("mdlm")[0].model, c)
    row = sampler.canvas([[None if token is None else token % 9 for token in given]])[0]
    assert row[:4].tolist() == [0, ord("r") % 9, 10, 10]
    assert change(sampler, max_length=4).config == c
    assert np.all(row[4:] == 10)
