"""SIGTERM and Ctrl-C while a run trains: one process notes them, several agree on the step after which they stop."""

import collections
import signal
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bd3_jax import sharding

T = TypeVar("T")

# Answers that several processes wait for: as many as there are steps in flight, so that the devices stay busy.
_ASKED = 2


class Stopped(Exception):
    """What was going on between two steps is given up, so that the state can be saved in time."""


class StopSignals:
    """While open, SIGTERM and the first Ctrl-C only note themselves; a second Ctrl-C interrupts at once.

    Where several processes train, a signal to any of them stops all at the same call of `poll`, two calls later. So
    every process must call it equally often.
    """

    def __init__(self) -> None:
        self.signal = 0  # none
        self._own = 0
        self._asked: collections.deque[jax.Array] = collections.deque()
        if jax.process_count() > 1:
            mesh = Mesh(np.array(jax.devices()), ("device",))
            self._split = NamedSharding(mesh, PartitionSpec("device"))
            self._max = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def poll(self) -> bool:
        """Whether to stop now, on every process alike; `signal` is then the signal."""
        if jax.process_count() == 1:
            self.signal = self._own
        else:
            own = np.full(jax.device_count(), self._own, np.int32)
            self._asked.append(self._max(sharding.place(own, self._split)))
            if len(self._asked) > _ASKED:
                self.signal = self.signal or int(self._asked.popleft())
        return self.signal != 0

    def check(self) -> None:
        """Raises Stopped when it is time to stop."""
        if self.poll():
            raise Stopped

    def checked(self, items: Iterable[T]) -> Iterator[T]:
        """The items, until it is time to stop. Raises Stopped then."""
        for item in items:
            self.check()
            yield item

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT == self._own:
            raise KeyboardInterrupt
        self._own = number
