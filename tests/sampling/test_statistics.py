import math

import pytest

from bd3_jax.data.tokenizers import bytes_tokenizer, train_bpe
from bd3_jax.sampling import statistics


@pytest.mark.parametrize(
    ("tokens", "nats"),
    [([7, 7, 7], 0), ([1, 2, 3, 4], math.log(4)), ([0, 5, 5, 5], -0.25 * math.log(0.25) - 0.75 * math.log(0.75))],
)
def test_entropy(tokens, nats):
    assert math.isclose(statistics.entropy(tokens), nats, abs_tol=1e-12)


def test_pieces_are_joined_as_the_tokenizer_joins_them():
    tokenizer = train_bpe(["the city of the north and the city of the south"] * 20, 280)
    eos, whole = tokenizer.ids.eos, tokenizer.encode("the city")
    pieces = [tokenizer.encode(letter)[0] for letter in "the city"]
    assert len(whole) < len(pieces)
    assert statistics.retokenise([eos, *pieces, eos, eos, *pieces], tokenizer) == [eos, *whole, eos, eos, *whole]


def test_length_leaves_out_eos_and_the_first_token():
    tokenizer = bytes_tokenizer()
    eos = tokenizer.ids.eos
    assert statistics.length([eos, *tokenizer.encode("ab"), eos, *tokenizer.encode("c"), eos], tokenizer) == 3
    assert statistics.length(tokenizer.encode("abc"), tokenizer) == 2
    assert statistics.length([eos], tokenizer) == 0
    # Bytes that are no UTF-8 become the replacement character, three bytes long.
    assert statistics.length([eos, 0xFF], tokenizer) == 3
