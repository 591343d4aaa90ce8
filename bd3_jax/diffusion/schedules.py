"""Noise schedules: how likely a token is masked at time t, and how much a masked token weighs in the NELBO.

With alpha_t the probability that a token survives until t in (0, 1]:

    move_chance   p(t) = 1 - alpha_t
    loss_scale    s(t) = alpha'_t / (1 - alpha_t)      (negative; Block Diffusion, eq. 8)
    total_noise   sigma(t) = min(-ln alpha_t, -ln eps)  (what a time-conditioned network is fed)

To add one, write its p and s and put it into `SCHEDULES`; `config.ScheduleName` lists the names that users may give.
"""

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from bd3_jax.config import EPS

Times = Float[Array, "..."]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """p(t) and s(t), float32 in and out, for t in (0, 1]."""

    move_chance: Callable[[Times], Times]
    loss_scale: Callable[[Times], Times]

    def total_noise(self, t: Times) -> Times:
        """sigma(t) in nats, at most -ln eps."""
        return jnp.minimum(-jnp.log1p(-self.move_chance(t)), -math.log(EPS))


def _square_chance(t: Times) -> Times:
    return jnp.maximum(t**2, EPS)


def _square_root_chance(t: Times) -> Times:
    return jnp.maximum(jnp.sqrt(t), EPS)


def _log_chance(t: Times) -> Times:
    return jnp.log1p(t) / math.log(2)


def _cosine_chance(t: Times) -> Times:
    return 1 - (1 - EPS) * jnp.cos(t * math.pi / 2)


SCHEDULES: dict[str, Schedule] = {
    "loglinear": Schedule(lambda t: t, lambda t: -1 / t),
    "square": Schedule(_square_chance, lambda t: -2 * t / _square_chance(t)),
    "square_root": Schedule(_square_root_chance, lambda t: -0.5 / jnp.sqrt(t) / _square_root_chance(t)),
    "log": Schedule(_log_chance, lambda t: -1 / (_log_chance(t) * math.log(2) * (1 + t))),
    "cosine": Schedule(
        _cosine_chance,
        lambda t: -math.pi / 2 * (1 - EPS) * jnp.sin(t * math.pi / 2) / (_cosine_chance(t) + EPS),
    ),
    # Of the checkpoints of Sahoo et al. and Lou et al.: alpha_1 = eps in place of 0. For losses, never for samplers.
    "scaled_loglinear": Schedule(lambda t: (1 - EPS) * t, lambda t: -1 / t),
}


def get_schedule(name: str) -> Schedule:
    """Raises KeyError for a name that `config` has not let through."""
    return SCHEDULES[name]
