"""Many samples from one sampler: a fixed number of slots on the device, each refilled as soon as its sample is done."""

import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from bd3_jax.errors import UserError
from bd3_jax.models.network import Params
from bd3_jax.sampling.block import Filled
from bd3_jax.sampling.contexts import Memory
from bd3_jax.sampling.sampler import Sampler
from bd3_jax.sampling.step_program import abstract, compiled_step, memory_sharding
from bd3_jax.sampling.stopping import DRAWS, WINDOW, Stop, StopRule
from bd3_jax.sharding import place

ADVICE = {
    "entropy": "lower config.sampling.min_entropy, or train the model longer",
    "eos": "lower config.sampling.max_length, or set config.sampling.variable_length to False",
}
"""What to do about a sample that is discarded again and again, by the reason."""


@dataclasses.dataclass
class Drawn:
    """A sample, or what there is of it.

    Attributes:
      index: of the sample in its run; with the seed it determines all but the seconds.
      row: tokens on the host, the mask's id where none is drawn yet.
      limit: how many tokens it is to have, BOS and prompt included.
      blocks: finished ones, given ones included.
      length: finished tokens.
      rejected: draws of this sample that were discarded.
      stopped: why it ended before its length, or empty.
      nfe: network calls that drew its tokens, discarded draws not included.
      cache_calls: network calls that only stored keys and values.
      seconds: its share of the time, without compilation, discarded draws included.
      drawn_at: network call at which each token was drawn, from 1; 0 where it was given.
      confidence: probability with which each token was drawn; 0 where it was given.
    """

    index: int
    row: Int[np.ndarray, "S"]
    limit: int
    blocks: int
    length: int
    rejected: int
    seconds: float
    drawn_at: Int[np.ndarray, "S"]
    confidence: Float[np.ndarray, "S"]
    stopped: str = ""
    nfe: int = 0
    cache_calls: int = 0

    @property
    def tokens(self) -> Int[np.ndarray, "n"]:
        return self.row[: self.length]


class Slots:
    """A batch of samples in progress. A row holds BOS and prompt, gaps, the mask's id where tokens are drawn.

    Args:
      sampler: what draws.
      params: of its model.
      rows: one row, or several, from `Sampler.canvas`: sample i is of row i, modulo their number.
      batch: how many sequences are drawn at a time.
      sharding: of a batch of rows, where `params` are spread over a mesh; every process of it then does the same steps
        and has all samples.
      blocks_per_call: None: as the sampler suggests. It decides when tokens arrive, not which.
      redraws: whether a sample that should not have stopped is drawn anew; else it ends there.
      ends: looked at after each call: whether a sample is to end with the blocks that it has.
      limits: how many tokens the samples of each row are to have; None: all `sampling.max_length`, which is the most.
    """

    def __init__(
        self,
        sampler: Sampler,
        params: Params,
        rows: Int[np.ndarray, "*n S"],
        batch: int,
        sharding: NamedSharding | None = None,
        blocks_per_call: int | None = None,
        redraws: bool = True,
        ends: Callable[[Drawn], bool] = lambda drawn: False,
        limits: Sequence[int] | None = None,
    ):
        self._redraws, self._ends = redraws, ends
        self._sampler, self._rows, self._sharding = sampler, rows.reshape(-1, rows.shape[-1]), sharding
        self._limits = limits or [sampler.config.max_length] * len(self._rows)
        self._weights = sampler.freeze(params)
        self._stop_rule = StopRule.of(sampler.config, sampler.model.ids)
        self._discarded: Counter[tuple[int, str]] = Counter()  # draws of a sample, by the reason
        self._layout, self._blocks = sampler.layout, blocks_per_call or sampler.blocks_per_call
        fresh = sampler.start(self._weights, self._rows[0], self._blocks_given(0))
        self._opening = (0, fresh)
        self.drawing: list[Drawn | None] = [None] * batch
        shardings = memory_sharding(fresh, batch, sharding)
        self._place = jax.jit(Memory.select, donate_argnums=0, out_shardings=shardings)
        self._memory = jax.jit(Memory.tile, static_argnums=1, out_shardings=shardings)(fresh, batch)
        leaves, structure = jax.tree.flatten(jax.tree.map(abstract, self._weights))
        self._advance = compiled_step(sampler.program, batch, self._blocks, sharding, structure, tuple(leaves))

    @property
    def free(self) -> list[int]:
        return [slot for slot, drawn in enumerate(self.drawing) if drawn is None]

    def begin(self, samples: dict[int, Drawn]) -> None:
        """Puts samples that have nothing drawn yet into slots."""
        if not samples:
            return
        for slot, drawn in samples.items():
            self.drawing[slot] = drawn
        for number, group in itertools.groupby(sorted(samples, key=self._number), self._number):
            here = np.zeros(len(self.drawing), bool)
            here[list(group)] = True
            self._memory = self._place(self._memory, self._put(here), self._start(number))

    def new(self, index: int, rejected: int = 0, seconds: float = 0.0) -> Drawn:
        """Sample `index` before anything of it is drawn."""
        number = index % len(self._rows)
        row, limit, begin = self._rows[number].copy(), self._limits[number], self._blocks_given(number)
        nothing = np.zeros(len(row), np.int32)
        return Drawn(
            index, row, limit, begin, self._finished(begin, limit), rejected, seconds,
            drawn_at=nothing, confidence=nothing.astype(np.float32),
            cache_calls=int(begin > 1 and self._memory.cache is not None),
        )  # fmt: skip

    def step(self) -> list[Drawn]:
        """Draws the next blocks of all samples in one device call, and returns those that are finished.

        A sample that is to have its full length and becomes degenerate is begun anew.

        Raises:
          UserError: it has been discarded too often.
        """
        began = time.perf_counter()
        self._memory, filled = self._advance(self._weights, self._memory, *self._inputs())
        filled = jax.device_get(filled)
        share = (time.perf_counter() - began) / sum(drawn is not None for drawn in self.drawing)
        finished, again = [], {}
        for slot, drawn in enumerate(self.drawing):
            if drawn is None:
                continue
            drawn.seconds += share
            stop = self._take(drawn, jax.tree.map(lambda leaf, slot=slot: leaf[slot], filled))
            if stop and self._discards():
                self._discarded[drawn.index, stop.reason] += 1
                if self._discarded[drawn.index, stop.reason] == DRAWS[stop.reason]:
                    raise UserError(
                        f"sample {drawn.index} was discarded {DRAWS[stop.reason]} times ({self._why(stop)}); "
                        f"allowed are samples without: {ADVICE[stop.reason]}"
                    )
                again[slot] = self.new(drawn.index, drawn.rejected + 1, drawn.seconds)
            elif stop or drawn.length == drawn.limit or self._ends(drawn):
                if stop:
                    drawn.length, drawn.stopped = stop.length, stop.reason
                finished.append(drawn)
                self.drawing[slot] = None
        self.begin(again)
        return finished

    def _take(self, drawn: Drawn, filled: Filled) -> Stop | None:
        """Adds the blocks of one sequence, one after the other, up to where it stops or ends."""
        size, stride = self._layout.size, self._layout.stride
        row = self._rows[drawn.index % len(self._rows)]
        given = int(np.flatnonzero(row != self._sampler.model.ids.mask)[-1]) + 1  # up to the last, of a text with gaps
        for block in range(min(self._blocks, self._layout.blocks_of(drawn.limit) - drawn.blocks)):
            here = slice(drawn.blocks * stride, drawn.blocks * stride + size)
            of_block = slice(block * size, (block + 1) * size)
            new = filled.drawn_at[of_block] > 0
            drawn.row[here] = filled.tokens[of_block]
            drawn.drawn_at[here][new] = filled.drawn_at[of_block][new] + drawn.nfe
            drawn.confidence[here][new] = filled.confidence[of_block][new]
            drawn.nfe += int(filled.nfe[block])
            drawn.cache_calls += int(filled.cache_calls[block])
            drawn.blocks += 1
            drawn.length = self._finished(drawn.blocks, drawn.limit)
            if stop := self._stop_rule(drawn.tokens, given):
                return stop
        return None

    def _number(self, slot: int) -> int:
        """Of the row of the sample in a slot."""
        drawn = self.drawing[slot]
        assert drawn is not None
        return drawn.index % len(self._rows)

    def _blocks_given(self, number: int) -> int:
        """How many leading blocks of a row are given whole, and read at once; the last is gone through in any case.

        Of a text with gaps more may be given than the training context, which is all that is read at once.
        """
        row = self._rows[number]
        masked = row == self._sampler.model.ids.mask
        given = int(masked.argmax()) if masked.any() else len(row)
        whole = self._layout.block_of(given)
        at_once = self._sampler.model.length // self._layout.size
        return min(whole, at_once, self._layout.blocks_of(self._limits[number]) - 1)

    def _start(self, number: int) -> Memory:
        """What is kept of the given blocks of a row; the newest is kept, since samples of one row are begun alike."""
        if self._opening[0] != number:
            self._opening = (number, self._sampler.start(self._weights, self._rows[number], self._blocks_given(number)))
        return self._opening[1]

    def _discards(self) -> bool:
        """SEDD cannot stop early, so whatever would have stopped is discarded."""
        may_stop = self._stop_rule.variable_length and self._sampler.model.objective != "sedd"
        return self._redraws and not may_stop

    def _why(self, stop: Stop) -> str:
        if stop.reason == "eos":
            return "EOS within, where sedd cannot stop"
        return f"the entropy of {WINDOW} tokens fell below {self._stop_rule.min_entropy} nats"

    def _finished(self, blocks: int, limit: int) -> int:
        """How many tokens so many blocks hold of a sample."""
        return min(self._layout.tokens_of(blocks), limit)

    def _end(self, drawn: Drawn) -> int:
        """Up to where a sample is drawn; of a last block that is given, nothing beyond the limit is drawn either."""
        last = self._layout.tokens_of(self._layout.blocks_of(drawn.limit) - 1)
        is_given = (drawn.row[last : drawn.limit] != self._sampler.model.ids.mask).all()
        return drawn.limit if is_given else self._layout.end(drawn.limit)

    def _inputs(self) -> tuple[Any, ...]:
        """Arguments of the program after the memory: seed, and of each slot index, draw, first block, tokens and end.

        Slots without a sample, and blocks beyond the last, hold EOS: where everything is given nothing is drawn.
        """
        batch, layout = len(self.drawing), self._layout
        indices, attempts, first, ends = np.zeros((4, batch), np.int32)
        width = layout.tokens_of(self._blocks)
        given = np.full((batch, width), self._sampler.model.ids.eos, np.int32)
        for slot, drawn in enumerate(self.drawing):
            if drawn is not None:
                indices[slot], attempts[slot], first[slot] = drawn.index, drawn.rejected, drawn.blocks
                begin = drawn.blocks * layout.stride
                ends[slot] = self._end(drawn) - begin
                part = drawn.row[begin:][:width]
                given[slot, : len(part)] = part
        seed = np.uint32(self._sampler.config.seed)
        return seed, *(self._put(array) for array in (indices, attempts, first, given, ends))

    def _put(self, array: np.ndarray) -> Array | np.ndarray:
        return array if self._sharding is None else place(array, self._sharding)


def draw(
    sampler: Sampler,
    params: Params,
    rows: Int[np.ndarray, "*n S"],
    count: int,
    batch: int,
    sharding: NamedSharding | None = None,
    watch: Callable[[Drawn], None] | None = None,
    redraws: bool = True,
    ends: Callable[[Drawn], bool] = lambda drawn: False,
    before_step: Callable[[], None] = lambda: None,
    limits: Sequence[int] | None = None,
) -> Iterator[Drawn]:
    """Samples 0 to count - 1, in this order, at most `batch` at a time; see `Slots` for what is not told here.

    A slot takes the next sample as soon as its own is finished. `watch` is called with the first of the samples in
    progress whenever a block of it is finished; the blocks then come one by one. `before_step` is called before every
    device call, equally often on all processes; what it raises ends the drawing.
    """
    slots = Slots(sampler, params, rows, batch, sharding, 1 if watch else None, redraws, ends, limits)
    finished: dict[int, Drawn] = {}
    waiting, following = iter(range(count)), 0
    while following < count:
        slots.begin({slot: slots.new(index) for slot, index in zip(slots.free, waiting, strict=False)})
        first = min((drawn for drawn in slots.drawing if drawn), key=lambda drawn: drawn.index)
        before_step()
        finished |= {drawn.index: drawn for drawn in slots.step()}
        if watch:
            watch(first)
        while following in finished:
            yield finished.pop(following)
            following += 1
