"""When a sequence ends before its length (Block Diffusion, appendix C.4)."""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Int

from bd3_jax.config import SamplingConfig
from bd3_jax.sampling.statistics import entropy
from bd3_jax.special_ids import SpecialIds

WINDOW = 256
"""Stops are looked at once more than so many tokens exist; the entropy is that of the last so many."""

DRAWS = {"entropy": 10, "eos": 1000}
"""So many draws of a sample may be discarded, by the reason, before it is an error.

A model that degenerates will do so again; an EOS within is common where documents follow each other.
"""

LARGE_VOCABULARY = 30_000
"""From here on (BERT, GPT-2) real text stays above 4 nats; with small vocabularies it may fall below."""


@dataclasses.dataclass(frozen=True)
class Stop:
    """Why a sequence ends, and how many of its tokens are kept."""

    reason: Literal["entropy", "eos"]
    length: int


@dataclasses.dataclass(frozen=True)
class StopRule:
    """Looked at after each block (BD3-LM), token (AR), window (MDLM) or at the end (SEDD).

    Attributes:
      variable_length: whether the second EOS ends a sequence; the BOS at the beginning counts where it is the same id.
      min_entropy: nats; a lower entropy of the last 256 tokens ends a sequence. 0: never.
      eos: its id.
    """

    variable_length: bool
    min_entropy: float
    eos: int

    @classmethod
    def of(cls, c: SamplingConfig, ids: SpecialIds) -> "StopRule":
        usual = 4.0 if ids.vocab_size >= LARGE_VOCABULARY else 0.0
        return cls(c.variable_length, usual if c.min_entropy == -1 else c.min_entropy, ids.eos)

    def __call__(self, tokens: Int[np.ndarray, "n"], given: int) -> Stop | None:
        """Looks at all tokens that a sequence has so far. Low entropy wins, and costs the last 256 tokens.

        The first `given` tokens are what was asked for, BOS included: no stop cuts them, or blames the model for them.
        An EOS among them counts, but a later one ends the sequence; the entropy is that of 256 tokens after them.
        """
        if len(tokens) <= WINDOW:
            return None
        if self.min_entropy and len(tokens) - WINDOW >= given and entropy(tokens[-WINDOW:]) < self.min_entropy:
            return Stop("entropy", len(tokens) - WINDOW)
        if self.variable_length:
            later = np.flatnonzero(tokens == self.eos)[1:]
            drawn = later[later >= given]
            if len(drawn):
                return Stop("eos", int(drawn[0]) + 1)
        return None
