"""Updates that look at the model's own confidence: several tokens a call where it is sure, second thoughts where not.

A candidate is drawn for every masked position at every step; those that are not chosen are forgotten. Choosing by
confidence changes the distribution that is drawn from, which is the point: fewer calls, or likelier text.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from bd3_jax.sampling import categorical
from bd3_jax.sampling.updates import Call, Denoiser, Filling, UntilNoneIsMasked, fill

ROWS = 16
"""The vocabulary is asked at so many positions at a time, all sequences together, or at one of each if that is more."""


class Candidates(NamedTuple):
    """What would be drawn at each masked position; zeros elsewhere.

    confidence: the candidate's probability before truncation.
    entropy: of the whole distribution, nats.
    """

    tokens: Int[Array, "b B"]
    confidence: Float[Array, "b B"]
    entropy: Float[Array, "b B"]


def candidates(
    denoiser: Denoiser, keys: PRNGKeyArray, masked: Bool[Array, "b B"], hidden: Float[Array, "b B d"]
) -> Candidates:
    """Independent draws at all masked positions; positions where no sequence is masked cost nothing."""
    batch, size = masked.shape
    width = max(n for n in range(1, size + 1) if size % n == 0 and (n == 1 or n * batch <= ROWS))

    def of_some(part: tuple[Array, Array, Array]) -> Candidates:
        positions, masked, hidden = part  # [n], [n, b], [n, b, d]

        def ask() -> Candidates:
            flat = lambda x: x.reshape(-1, *x.shape[2:])
            own = jax.vmap(lambda position: categorical.fold_in(keys, position))(positions)
            log_probs = denoiser.log_probs(flat(hidden))
            tokens = denoiser.draw(flat(own), log_probs)
            confidence = jnp.exp(jnp.take_along_axis(log_probs, tokens[:, None], axis=1)[:, 0])
            entropy = -jnp.where(log_probs > -jnp.inf, jnp.exp(log_probs) * log_probs, 0).sum(axis=1)
            drawn = Candidates(tokens, confidence, entropy)
            return jax.tree.map(lambda x: jnp.where(masked, x.reshape(masked.shape), 0), drawn)

        shape = masked.shape
        nothing = Candidates(jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.zeros(shape))
        return jax.lax.cond(masked.any(), ask, lambda: nothing)

    in_parts = lambda x: jnp.moveaxis(x, 1, 0).reshape(size // width, width, *x.shape[:1], *x.shape[2:])
    parts = jnp.arange(size).reshape(-1, width), in_parts(masked), in_parts(hidden)
    return jax.tree.map(lambda x: x.reshape(size, batch).T, jax.lax.map(of_some, parts))


class ByConfidence(UntilNoneIsMasked):
    """Draws candidates everywhere and keeps those that `choose` picks, at least one."""

    def init(self, keys: PRNGKeyArray, masked: Bool[Array, "b B"]) -> tuple[()]:
        return ()

    def positions(self, masked: Bool[Array, "b B"], carry: tuple[()]) -> None:
        return None

    def choose(self, masked: Bool[Array, "b B"], drawn: Candidates) -> Bool[Array, "b B"]:
        raise NotImplementedError

    def step(self, call: Call, carry: tuple[()]) -> tuple[Filling, tuple[()]]:
        drawn = candidates(call.denoiser, call.keys, call.masked, call.hidden)
        chosen = call.masked & self.choose(call.masked, drawn)
        tokens = jnp.where(chosen, drawn.tokens, call.filling.tokens)
        return Filling(tokens, jnp.where(chosen, drawn.confidence, call.filling.confidence)), carry


@dataclasses.dataclass(frozen=True)
class MostConfident(ByConfidence):
    """The k candidates of highest confidence a step: B / k calls a block (Chang et al., 2022; Nie et al., 2025)."""

    tokens_per_step: int

    def choose(self, masked: Bool[Array, "b B"], drawn: Candidates) -> Bool[Array, "b B"]:
        return _rank(jnp.where(masked, -drawn.confidence, jnp.inf)) < self.tokens_per_step


@dataclasses.dataclass(frozen=True)
class Threshold(ByConfidence):
    """All candidates whose confidence exceeds tau, and the most confident in any case (Wu et al., 2025)."""

    threshold: float

    def choose(self, masked: Bool[Array, "b B"], drawn: Candidates) -> Bool[Array, "b B"]:
        best = _rank(jnp.where(masked, -drawn.confidence, jnp.inf)) == 0
        return best | (drawn.confidence > self.threshold)


@dataclasses.dataclass(frozen=True)
class EntropyBounded(ByConfidence):
    """As many positions, from that of the smallest entropy on, as keep the joint error small (Ben-Hamu et al., 2025).

    Tokens drawn independently of each other miss at most sum H_i - max H_i nats of mutual information; positions are
    taken as long as this is at most gamma. With gamma = 0 that is one, or several of which all but one are certain.
    """

    bound: float

    def choose(self, masked: Bool[Array, "b B"], drawn: Candidates) -> Bool[Array, "b B"]:
        entropies = jnp.where(masked, drawn.entropy, jnp.inf)
        rank = _rank(entropies)
        before = jnp.where(rank[:, None, :] < rank[:, :, None], drawn.entropy[:, None, :], 0).sum(axis=2)
        return (before <= self.bound) | (rank == 0)


def _rank(values: Float[Array, "b B"]) -> Int[Array, "b B"]:
    """Place of each value in ascending order, from 0; equal ones in the order of their positions."""
    return jnp.argsort(jnp.argsort(values, axis=1, stable=True), axis=1)


@dataclasses.dataclass(frozen=True)
class Remasking:
    """Ancestral steps that may take tokens back, rather those of low confidence (ReMDM-conf, Wang et al., 2025).

    From t to s = t - 1/T, with alpha = 1 - t: a masked token is unmasked with probability (alpha_s - alpha_t) /
    (1 - alpha_t); a token that was drawn is masked again with probability eta * softmax(-psi) * min(1, (1 - alpha_s) /
    alpha_t), the softmax over all drawn tokens of the block, psi the confidence each was drawn with. The last step
    takes nothing back. T calls a block.
    """

    num_steps: int
    eta: float

    def init(self, keys: PRNGKeyArray, masked: Bool[Array, "b B"]) -> tuple[Array, Array]:
        """The step, and which positions are ours: given tokens are never taken back."""
        return jnp.zeros((), jnp.int32), masked

    def positions(self, masked: Bool[Array, "b B"], carry: tuple[Array, Array]) -> None:
        return None

    def step(self, call: Call, carry: tuple[Array, Array]) -> tuple[Filling, tuple[Array, Array]]:
        denoiser, keys, filling, masked, hidden = call
        step, ours = carry
        keys_draw, keys_move = categorical.split(keys)
        uniform = jax.vmap(lambda key: jax.random.uniform(key, masked.shape[1:]))(keys_move)
        # alpha_t = step / T: in integers, so that the last step leaves no mask.
        unmask = masked & (uniform * (self.num_steps - step) < 1)
        drawn = ours & ~masked
        weight = jnp.where(drawn, jnp.exp(-filling.confidence), 0)
        share = weight / jnp.where(drawn.any(axis=1, keepdims=True), weight.sum(axis=1, keepdims=True), 1)
        most = jnp.minimum(1, (self.num_steps - step - 1) / jnp.maximum(step, 1))
        remask = drawn & (uniform < self.eta * share * most)
        filled = fill(denoiser, keys_draw, filling, hidden, unmask)
        tokens = jnp.where(remask, denoiser.mask, filled.tokens)
        return Filling(tokens, jnp.where(remask, 0, filled.confidence)), (step + 1, ours)

    def unfinished(self, masked: Bool[Array, "b B"], carry: Any) -> Bool[Array, "b"]:
        step, ours = carry
        return ours.any(axis=1) & (step < self.num_steps)
