"""How the masked positions of a block are filled, step by step. SUBS models (MDLM, BD3-LM).

An update decides which positions to unmask and asks the model about them. It sees the model as two functions, so
that it fits any network, or a table in a test. To add one, write a class with `init` and `step`, and name it in
`sampler.UPDATES`, `config.SamplerName` and `config.SAMPLERS`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from bd3_jax.sampling import categorical

LogProbs = Callable[[Float[Array, "*n d"]], Float[Array, "*n V"]]


class Denoiser(NamedTuple):
    """The model at the current block.

    hidden: tokens `[b, B]` -> hidden states `[b, B, d]`; one network call.
    log_probs: hidden states at masked positions -> log p(x0 | x_t) as it is to be drawn from, temperature and nucleus
      included; the mask's is -inf.
    mask: its id.
    """

    hidden: Callable[[Int[Array, "b B"]], Float[Array, "b B d"]]
    log_probs: LogProbs
    mask: int


class Update(Protocol):
    """Steps are taken until no sequence has a masked position left in the block."""

    def init(self, keys: PRNGKeyArray, tokens: Int[Array, "b B"]) -> Any:
        """What the steps of a block carry along, a pytree. `keys` is `[b]`."""

    def step(
        self, denoiser: Denoiser, keys: PRNGKeyArray, tokens: Int[Array, "b B"], carry: Any
    ) -> tuple[Int[Array, "b B"], Any]:
        """Unmasks at least one position of every sequence that has one, by one network call; others never change."""


class InRandomOrder:
    """Unmasks each position at a time of its own, drawn before the model is asked anything.

    Our SUBS networks do not see the time, so the times matter through their order alone: moments in which nothing
    happens cost nothing, and every sequence of a batch goes straight to its own next event.
    """

    def step(
        self, denoiser: Denoiser, keys: PRNGKeyArray, tokens: Int[Array, "b B"], carry: Int[Array, "b B"]
    ) -> tuple[Int[Array, "b B"], Int[Array, "b B"]]:
        masked = tokens == denoiser.mask
        times = jnp.where(masked, carry, jnp.iinfo(jnp.int32).max)
        due = masked & (times == times.min(axis=1, keepdims=True))
        return fill(denoiser.log_probs, keys, tokens, denoiser.hidden(tokens), due), carry


@dataclasses.dataclass(frozen=True)
class FirstHitting(InRandomOrder):
    """One uniformly chosen masked position a step: B calls a block (Zheng et al., 2024; Block Diffusion, appendix C).

    With n masked left the next is unmasked at t u^(1/n), any of them equally likely. The times need not be drawn.
    """

    def init(self, keys: PRNGKeyArray, tokens: Int[Array, "b B"]) -> Int[Array, "b B"]:
        return jax.vmap(lambda key: jax.random.permutation(key, tokens.shape[1]))(keys)


@dataclasses.dataclass(frozen=True)
class Ancestral(InRandomOrder):
    """T steps from t = 1 to 0, dt = 1/T; a masked token stays masked with probability p(t - dt) / p(t).

    (MDLM, section 3.2.3 and its caching.) With the loglinear p(t) = t, on which samplers run, the survival up to step
    i is 1 - i/T: the step in which a token is unmasked is uniform over the T steps, and is drawn at once. Steps in
    which nothing changes would reuse the network's output; here they are not taken at all. T calls a block at most.
    """

    num_steps: int

    def init(self, keys: PRNGKeyArray, tokens: Int[Array, "b B"]) -> Int[Array, "b B"]:
        return jax.vmap(lambda key: jax.random.randint(key, tokens.shape[1:], 0, self.num_steps))(keys)


def fill(
    log_probs: LogProbs,
    keys: PRNGKeyArray,
    tokens: Int[Array, "b B"],
    hidden: Float[Array, "b B d"],
    where: Bool[Array, "b B"],
) -> Int[Array, "b B"]:
    """Draws the tokens at `where`, independently given the hidden states.

    In rounds of one position per sequence, as many as the sequence with most positions needs: the vocabulary is
    asked at these positions and no others, and `[b, V]` is all that exists of it at a time.
    """

    def one_round(state: tuple[Array, Array]) -> tuple[Array, Array]:
        tokens, pending = state
        position = pending.argmax(axis=1)
        at_position = jnp.take_along_axis(hidden, position[:, None, None], axis=1)[:, 0]
        drawn = categorical.draw(categorical.fold_in(keys, position), log_probs(at_position))
        here = pending & (jnp.arange(tokens.shape[1]) == position[:, None])
        return jnp.where(here, drawn[:, None], tokens), pending & ~here

    return jax.lax.while_loop(lambda state: state[1].any(), one_round, (tokens, where))[0]
