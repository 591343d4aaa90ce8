"""SIGTERM and Ctrl-C while a run trains: one process notes them, several agree on the step after which they stop."""

import signal
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TypeVar

import jax
from jax.experimental import multihost_utils

T = TypeVar("T")


class Stopped(Exception):
    """What was going on between two steps is given up, so that the state can be saved in time."""


class StopSignals:
    """While open, SIGTERM and the first Ctrl-C only note themselves; a second Ctrl-C interrupts at once.

    Where several processes train, JAX listens for SIGTERM, tells all of them, and has them stop at the same call of
    `poll`. So every process must call it equally often. Ctrl-C is passed on as SIGTERM.
    """

    def __init__(self) -> None:
        self.signal = 0  # none
        self._several = jax.process_count() > 1
        self._calls = 0
        self._agreed = False

    def __enter__(self) -> "StopSignals":
        numbers = (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def poll(self) -> bool:
        """Whether to stop now, on every process alike; stays true."""
        if not self._several:
            return self.signal != 0
        if not self._agreed:
            self._calls += 1
            self._agreed = multihost_utils.reached_preemption_sync_point(self._calls)
            if self._agreed:
                self.signal = self.signal or signal.SIGTERM
        return self._agreed

    def checked(self, items: Iterable[T]) -> Iterator[T]:
        """The items, until it is time to stop. Raises Stopped then."""
        for item in items:
            if self.poll():
                raise Stopped
            yield item

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT == self.signal:
            raise KeyboardInterrupt
        self.signal = number
        if self._several:
            signal.raise_signal(signal.SIGTERM)
