"""What is reported of a sample (Block Diffusion, section 6.2)."""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from bd3_jax.data.tokenizers import Tokenizer


def entropy(tokens: Sequence[int] | Int[np.ndarray, "n"]) -> float:
    """Of the empirical distribution of the tokens, nats: 0 where all are the same, ln n where n differ."""
    _, counts = np.unique(np.asarray(tokens), return_counts=True)
    frequencies = counts / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum())


def distinct(rows: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams of all rows, divided by all n-grams (Li et al., 2016); 0 where rows are shorter than n."""
    grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def length(tokens: Sequence[int], tokenizer: Tokenizer) -> int:
    """Tokens of the re-tokenised text that are not EOS, the first one left out."""
    return sum(token != tokenizer.ids.eos for token in retokenise(tokens, tokenizer)[1:])


def retokenise(tokens: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """The ids that the tokenizer gives to the text of `tokens`; BOS and EOS stay where they are.

    A model may spell a word in pieces that the tokenizer would join. Text never turns into BOS or EOS, so it is
    decoded and encoded from one to the next.
    """
    special = {tokenizer.ids.bos, tokenizer.ids.eos}
    result: list[int] = []
    for is_special, group in itertools.groupby(tokens, key=lambda token: token in special):
        run = list(group)
        result += run if is_special else tokenizer.encode(tokenizer.decode(run))
    return result
