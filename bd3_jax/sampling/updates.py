"""How the masked positions of a block are filled, step by step. SUBS models (MDLM, BD3-LM), and AR as blocks of one.

An update decides which positions to unmask and asks the model about them. It sees the model as hidden states and two
functions, so that it fits any network, or a table in a test. To add one, write a class with the methods of `Update`,
and name it in `sampler.UPDATES`, `config.SamplerName` and `config.SAMPLERS`. More of them are in `confidence.py`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from bd3_jax.sampling import categorical

LogProbs = Callable[[Float[Array, "*n d"]], Float[Array, "*n V"]]
Draw = Callable[[PRNGKeyArray, Float[Array, "b V"]], Int[Array, "b"]]


class Denoiser(NamedTuple):
    """What the model says of masked positions, and how a token is drawn from it.

    log_probs: hidden states -> log p(x0 | x_t), normalised, temperature included; the mask's is -inf.
    draw: keys `[b]`, log_probs -> tokens; nucleus and the like are its own affair.
    mask: its id.
    """

    log_probs: LogProbs
    draw: Draw
    mask: int


class Filling(NamedTuple):
    """A block on its way: its tokens, and with what probability those that are drawn were drawn (0 elsewhere)."""

    tokens: Int[Array, "b B"]
    confidence: Float[Array, "b B"]


class Call(NamedTuple):
    """A network call, as a step sees it.

    denoiser: what the model says.
    keys: for the draws of this step.
    filling: the block so far.
    masked: positions still to be drawn; a step changes no others, but for those that it has drawn itself.
    hidden: hidden states at the `positions` that were asked for.
    """

    denoiser: Denoiser
    keys: PRNGKeyArray  # [b]
    filling: Filling
    masked: Bool[Array, "b B"]
    hidden: Float[Array, "b n d"]


class Update(Protocol):
    """Steps of one network call are taken until no sequence is `unfinished`; `masked` as in `Call`."""

    def init(self, keys: PRNGKeyArray, masked: Bool[Array, "b B"]) -> Any:
        """What the steps of a block carry along, a pytree. `keys` is `[b]`."""

    def positions(self, masked: Bool[Array, "b B"], carry: Any) -> Int[Array, "b n"] | None:
        """Where the next step wants hidden states, if it can tell before it has seen any; None: everywhere."""

    def step(self, call: Call, carry: Any) -> tuple[Filling, Any]:
        """Draws some of the masked tokens."""

    def unfinished(self, masked: Bool[Array, "b B"], carry: Any) -> Bool[Array, "b"]:
        """Which sequences need another step."""


class UntilNoneIsMasked:
    """The usual end of a block."""

    def unfinished(self, masked: Bool[Array, "b B"], carry: Any) -> Bool[Array, "b"]:
        return masked.any(axis=1)


@dataclasses.dataclass(frozen=True)
class FirstHitting(UntilNoneIsMasked):
    """One uniformly chosen masked position a step: B calls a block (Zheng et al., 2024; Block Diffusion, appendix C).

    With n masked left the next is unmasked at t u^(1/n), any of them equally likely. Our SUBS networks do not see the
    time, so the times need not be drawn, and the order is known before the model is asked anything.
    """

    def init(self, keys: PRNGKeyArray, masked: Bool[Array, "b B"]) -> Int[Array, "b B"]:
        return jax.vmap(lambda key: jax.random.permutation(key, masked.shape[1]))(keys)

    def positions(self, masked: Bool[Array, "b B"], carry: Int[Array, "b B"]) -> Int[Array, "b 1"]:
        return jnp.where(masked, carry, masked.shape[1]).argmin(axis=1)[:, None]

    def step(self, call: Call, carry: Int[Array, "b B"]) -> tuple[Filling, Int[Array, "b B"]]:
        position = self.positions(call.masked, carry)
        here = call.masked & (jnp.arange(call.masked.shape[1]) == position)
        return _draw(call.denoiser, call.keys, call.filling, call.hidden[:, 0], here), carry


@dataclasses.dataclass(frozen=True)
class Ancestral(UntilNoneIsMasked):
    """T steps from t = 1 to 0, dt = 1/T; a masked token stays masked with probability p(t - dt) / p(t).

    (MDLM, section 3.2.3 and its caching.) With the loglinear p(t) = t, on which samplers run, the survival up to step
    i is 1 - i/T: the step in which a token is unmasked is uniform over the T steps, and is drawn at once. Steps in
    which nothing changes would reuse the network's output; here they are not taken at all, and every sequence of a
    batch goes straight to its own next event. T calls a block at most.
    """

    num_steps: int

    def init(self, keys: PRNGKeyArray, masked: Bool[Array, "b B"]) -> Int[Array, "b B"]:
        return jax.vmap(lambda key: jax.random.randint(key, masked.shape[1:], 0, self.num_steps))(keys)

    def positions(self, masked: Bool[Array, "b B"], carry: Int[Array, "b B"]) -> None:
        return None

    def step(self, call: Call, carry: Int[Array, "b B"]) -> tuple[Filling, Int[Array, "b B"]]:
        times = jnp.where(call.masked, carry, self.num_steps)
        due = call.masked & (times == times.min(axis=1, keepdims=True))
        return fill(call.denoiser, call.keys, call.filling, call.hidden, due), carry


def fill(
    denoiser: Denoiser,
    keys: PRNGKeyArray,
    filling: Filling,
    hidden: Float[Array, "b B d"],
    where: Bool[Array, "b B"],
) -> Filling:
    """Draws the tokens at `where`, independently given the hidden states.

    In rounds of one position per sequence, as many as the sequence with most positions needs: the vocabulary is
    asked at these positions and no others, and `[b, V]` is all that exists of it at a time.
    """

    def one_round(state: tuple[Filling, Array]) -> tuple[Filling, Array]:
        filling, pending = state
        position = pending.argmax(axis=1)
        at_position = jnp.take_along_axis(hidden, position[:, None, None], axis=1)[:, 0]
        here = pending & (jnp.arange(pending.shape[1]) == position[:, None])
        return _draw(denoiser, categorical.fold_in(keys, position), filling, at_position, here), pending & ~here

    return jax.lax.while_loop(lambda state: state[1].any(), one_round, (filling, where))[0]


def _draw(
    denoiser: Denoiser, keys: PRNGKeyArray, filling: Filling, hidden: Float[Array, "b d"], here: Bool[Array, "b B"]
) -> Filling:
    """Draws one token for each sequence, and puts it `here`, one position or none."""
    log_probs = denoiser.log_probs(hidden)
    drawn = denoiser.draw(keys, log_probs)
    confidence = jnp.exp(jnp.take_along_axis(log_probs, drawn[:, None], axis=1))
    return Filling(jnp.where(here, drawn[:, None], filling.tokens), jnp.where(here, confidence, filling.confidence))
