"""Text as it is drawn: pieces for a program, the denoising itself for a terminal."""

import sys
import time
from collections.abc import Iterator
from typing import TextIO

import numpy as np
from jaxtyping import Int

from bd3_jax.data.tokenizers import TextStream, Tokenizer
from bd3_jax.models.network import Params
from bd3_jax.sampling.drawing import Drawn, Slots
from bd3_jax.sampling.sampler import Sampler

TOKENS_PER_PIECE = 4
"""Blocks that are shorter come several at a time."""


def pieces(sampler: Sampler, params: Params, row: Int[np.ndarray, "S"], tokenizer: Tokenizer) -> Iterator[str]:
    """The text of sample 0, without BOS, in pieces as blocks finish; together they are its text.

    What was handed out is not taken back: where a sample becomes degenerate it ends, instead of being drawn anew.
    """
    blocks = min(max(1, TOKENS_PER_PIECE // sampler.layout.size), sampler.blocks_per_call)
    slots = Slots(sampler, params, row, 1, blocks_per_call=blocks, redraws=False)
    drawn, told, finished, stream = slots.new(0), 1, False, TextStream(tokenizer)  # the BOS is not told
    slots.begin({0: drawn})
    while not finished:
        finished = bool(slots.step())
        text = "".join(stream.add(token) for token in drawn.tokens[told:].tolist())
        if finished:
            text += stream.rest()
        if text:
            yield text
        told = drawn.length


class Watch:
    """Shows in a terminal how each block of a sample fills up, tokens coloured by their confidence.

    Called with a sample after each of its blocks, or after some at once. Where the output is no terminal, it comes
    as plain text, block by block.
    """

    COLOURS = (203, 215, 229, 157, 84)
    """Of the usual 256, for confidences from 0 to 1."""

    def __init__(self, tokenizer: Tokenizer, out: TextIO | None = None, seconds_per_call: float = 0.03):
        self._tokenizer, self._out, self._pause = tokenizer, out or sys.stdout, seconds_per_call
        self._current: tuple[int, int] | None = None
        self._shown, self._stream = 1, TextStream(tokenizer)  # the BOS is not shown

    def __call__(self, drawn: Drawn) -> None:
        if self._current != (drawn.index, drawn.rejected):
            again = f", draw {drawn.rejected + 1}" if drawn.rejected else ""
            self._out.write(f"\n--- sample {drawn.index}{again}\n")
            self._current = drawn.index, drawn.rejected
            self._shown, self._stream = 1, TextStream(self._tokenizer)
        new = slice(self._shown, drawn.length)
        texts = [self._stream.add(token) for token in drawn.row[new].tolist()]
        if texts and (drawn.stopped or drawn.length == drawn.limit):
            texts[-1] = texts[-1] or self._stream.rest()
        if self._out.isatty():
            calls = drawn.drawn_at[new]
            # Room below, so that nothing scrolls between remembering the cursor's place and going back to it.
            room = 2 + sum(text.count("\n") for text in texts)
            self._out.write("\x1bD" * room + f"\x1b[{room}A\x1b7")
            for call in np.unique(calls[calls > 0]):
                self._out.write("\x1b8\x1b[J" + self._frame(texts, drawn, new, int(call)))
                self._out.flush()
                time.sleep(self._pause)
            self._out.write("\x1b8\x1b[J" + self._frame(texts, drawn, new, drawn.nfe))
        else:
            self._out.write("".join(texts))
        self._out.flush()
        self._shown = max(self._shown, drawn.length)

    def _frame(self, texts: list[str], drawn: Drawn, new: slice, call: int) -> str:
        """The block as it was after a network call. A character of several tokens is there when all of them are."""
        parts, newest = [], 0
        for text, at, confidence in zip(texts, drawn.drawn_at[new], drawn.confidence[new], strict=True):
            newest = max(newest, at)
            if at > call:
                parts.append("\u2591")
            elif newest <= call:
                colour = self.COLOURS[min(int(confidence * len(self.COLOURS)), len(self.COLOURS) - 1)]
                parts.append(f"\x1b[38;5;{colour}m{text}\x1b[0m" if at else text)
            if text:
                newest = 0
        return "".join(parts)
