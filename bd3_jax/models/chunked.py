"""Attention in chunks of queries, on any backend: never `[2L, 2L]`, and memory that grows linearly in L.

As in FlashAttention (Dao et al., 2022) the forward pass keeps the log-sum-exp of every query, and the backward pass
computes the probabilities again. The keys of a chunk come in two groups: a prefix of the clean stream, and, for noised
queries, the noised tokens of their own blocks. One softmax runs over both, which are never laid side by side.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from bd3_jax.precision import precision_of

Heads = Float[Array, "b h L k"]
Index = int | Int[Array, ""]
Carry = TypeVar("Carry")
T = TypeVar("T")

RESIDUALS = "attention"
"""Names what the backward pass reads besides q, k and v, for rematerialisation policies."""

_MAX_STAGES = 8
"""So many prefixes of the clean stream have a program of their own. Up to so many chunks, none is laid over more keys
than it sees; beyond, chunks share them, so that programs stay small at any L for at most 1/8 more scores."""


class KV(NamedTuple):
    """Keys and values of one stream."""

    k: Heads
    v: Heads


@dataclasses.dataclass(frozen=True)
class Plan:
    """How L queries are cut into chunks: into units of whole blocks, and those into `pieces`, the last ones padded.

    A unit is as many blocks as fit into a chunk; or one block, in several pieces, where blocks are larger.
    """

    length: int
    block_size: int
    unit: int
    pieces: int

    @classmethod
    def of(cls, length: int, block_size: int, chunk: int) -> "Plan":
        if block_size > chunk:
            return cls(length, block_size, block_size, -(-block_size // chunk))
        return cls(length, block_size, min(chunk // block_size * block_size, length), 1)

    @property
    def size(self) -> int:
        """Queries per chunk."""
        return -(-self.unit // self.pieces)

    @property
    def count(self) -> int:
        return -(-self.length // self.unit) * self.pieces

    def stages(self) -> Iterator[range]:
        """Consecutive chunks that are laid over the same clean prefix."""
        number = min(self.count, _MAX_STAGES)
        bounds = [self.count * n // number for n in range(number + 1)]
        return (range(*pair) for pair in itertools.pairwise(bounds))

    def prefix(self, stage: range, strict: bool) -> int:
        """How many clean tokens the chunks of a stage see at most."""
        end = min((stage[-1] // self.pieces + 1) * self.unit, self.length)
        return end - self.block_size if strict else end

    def split(self, x: Float[Array, "b h L *k"]) -> Float[Array, "b h count size *k"]:
        x = _pad(x, -self.length % self.unit)
        x = _pad(x.reshape(*x.shape[:2], -1, self.unit, *x.shape[3:]), self.pieces * self.size - self.unit, axis=3)
        return x.reshape(*x.shape[:2], self.count, self.size, *x.shape[4:])

    def streams(self, clean: KV, noised: KV | None) -> list[KV]:
        """Clean, and noised, each padded to whole units."""
        return [KV(*(_pad(x, -self.length % self.unit) for x in s)) for s in (clean, noised) if s is not None]

    def join(self, chunks: Float[Array, "b h count size k"]) -> Heads:
        b, h, _, _, k = chunks.shape
        units = chunks.reshape(b, h, -1, self.pieces * self.size, k)[:, :, :, : self.unit]
        return units.reshape(b, h, -1, k)[:, :, : self.length]

    def groups(self, index: Index, stage: range, streams: Sequence[KV]) -> "list[_Group]":
        """What chunk `index` of a stage is laid over; `streams`: clean, or clean and noised (see `streams`)."""
        strict = len(streams) > 1
        first = index // self.pieces * self.unit
        start = first + index % self.pieces * self.size
        # What pads the last piece of a unit is taken for the unit's last query, so that no query sees nothing.
        query = jnp.minimum(start + jnp.arange(self.size), first + self.unit - 1)
        block = query[:, None] // self.block_size
        whole = self.unit == self.block_size and len(stage) == 1  # every query sees every key
        groups = []
        if end := self.prefix(stage, strict):
            keys = jnp.arange(end) // self.block_size
            groups.append(_Group(0, 0, end, None if whole else block > keys if strict else block >= keys))
        if strict:
            keys = (first + jnp.arange(self.unit)) // self.block_size
            groups.append(_Group(1, first, self.unit, None if whole else block == keys))
        return groups


class _Group(NamedTuple):
    """Keys [first, first + size) of a stream; `visible` None: all of them."""

    stream: int
    first: Index
    size: int
    visible: Bool[Array, "q k"] | None

    def of(self, x: Heads) -> Heads:
        return jax.lax.dynamic_slice_in_dim(x, self.first, self.size, axis=2)

    def scores(self, q: Heads, k: Heads) -> Float[Array, "b h q k"]:
        scores = product("bhqd,bhkd->bhqk", q, self.of(k)) * q.shape[-1] ** -0.5
        return scores if self.visible is None else jnp.where(self.visible, scores, -jnp.inf)

    def add(self, total: Heads, part: Heads) -> Heads:
        """`total` of a stream with `part`, that of this group, added."""
        return jax.lax.dynamic_update_slice_in_dim(total, self.of(total) + part, self.first, axis=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def attend(q: Heads, clean: KV, noised: KV | None, block_size: int, chunk: int) -> Heads:
    """Queries over the clean stream up to their own blocks; or over its earlier blocks and their own `noised` ones.

    `chunk`: at most so many queries at a time, rounded down to whole blocks.
    """
    return _forward(q, clean, noised, block_size, chunk)[0]


def _forward(
    q: Heads, clean: KV, noised: KV | None, block_size: int, chunk: int
) -> tuple[Heads, Float[Array, "b h count size"]]:
    """Also the log-sum-exp of the scores."""
    plan = Plan.of(q.shape[2], block_size, chunk)
    queries, streams = plan.split(q), plan.streams(clean, noised)

    def attend_chunk(stage: range, _: None, index: Index) -> tuple[None, tuple[Array, Array]]:
        groups = plan.groups(index, stage, streams)
        scores = [group.scores(_take(queries, index), streams[group.stream].k) for group in groups]
        top = functools.reduce(jnp.maximum, [part.max(-1, keepdims=True) for part in scores])
        total, out = jnp.zeros(()), jnp.zeros(())
        for group, part in zip(groups, scores, strict=True):
            weights = jnp.exp(part - top)
            total += weights.sum(-1, keepdims=True)
            out += product("bhqk,bhkd->bhqd", weights.astype(q.dtype), group.of(streams[group.stream].v))
        return None, ((out / total).astype(q.dtype), (top + jnp.log(total))[..., 0])

    _, (out, log_sum) = _over_stages(plan, attend_chunk, None)
    return plan.join(out), log_sum


def _attend_fwd(q: Heads, clean: KV, noised: KV | None, block_size: int, chunk: int) -> tuple[Heads, tuple]:
    out, log_sum = _forward(q, clean, noised, block_size, chunk)
    out, log_sum = checkpoint_name(out, RESIDUALS), checkpoint_name(log_sum, RESIDUALS)
    return out, (q, clean, noised, out, log_sum)


def _attend_bwd(block_size: int, chunk: int, residuals: tuple, dout: Heads) -> tuple[Heads, KV, KV | None]:
    q, clean, noised, out, log_sum = residuals
    plan = Plan.of(q.shape[2], block_size, chunk)
    delta = plan.split((dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1))
    queries, gradients, streams = plan.split(q), plan.split(dout), plan.streams(clean, noised)

    def pull_back(stage: range, totals: list[KV], index: Index) -> tuple[list[KV], Heads]:
        query, gradient = _take(queries, index), _take(gradients, index)
        dq, totals = jnp.zeros(()), list(totals)
        for group in plan.groups(index, stage, streams):
            k, v = streams[group.stream]
            weights = jnp.exp(group.scores(query, k) - _take(log_sum, index)[..., None])
            dweights = product("bhqd,bhkd->bhqk", gradient, group.of(v))
            dscores = weights * (dweights - _take(delta, index)[..., None]) * q.shape[-1] ** -0.5
            weights, dscores = weights.astype(q.dtype), dscores.astype(q.dtype)
            dq += product("bhqk,bhkd->bhqd", dscores, group.of(k))
            dk, dv = totals[group.stream]
            dk = group.add(dk, product("bhqk,bhqd->bhkd", dscores, query))
            totals[group.stream] = KV(dk, group.add(dv, product("bhqk,bhqd->bhkd", weights, gradient)))
        return totals, dq.astype(q.dtype)

    zeros = [KV(*(jnp.zeros(x.shape, jnp.float32) for x in stream)) for stream in streams]
    totals, dq = _over_stages(plan, pull_back, zeros)
    dclean, *dnoised = (KV(*(x[:, :, : plan.length].astype(q.dtype) for x in total)) for total in totals)
    return plan.join(dq), dclean, dnoised[0] if dnoised else None


attend.defvjp(_attend_fwd, _attend_bwd)


def _over_stages(plan: Plan, step: Callable[[range, Carry, Index], tuple[Carry, T]], carry: Carry) -> tuple[Carry, T]:
    """Runs `step(stage, carry, index)` for every chunk in order; its results are laid along axis 2."""
    parts = []
    for stage in plan.stages():
        if len(stage) == 1:
            carry, part = step(stage, carry, stage[0])
            parts.append(jax.tree.map(lambda x: x[:, :, None], part))
        else:
            carry, part = jax.lax.scan(functools.partial(step, stage), carry, jnp.arange(stage.start, stage.stop))
            parts.append(jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), part))
    return carry, jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=2), *parts)


def _take(x: Float[Array, "b h count size *k"], index: Index) -> Float[Array, "b h size *k"]:
    return jax.lax.dynamic_index_in_dim(x, index, axis=2, keepdims=False)


def _pad(x: Array, surplus: int, axis: int = 2) -> Array:
    return jnp.pad(x, [(0, surplus if at == axis else 0) for at in range(x.ndim)]) if surplus else x


def product(subscripts: str, a: Array, b: Array) -> Float[Array, "..."]:
    return jnp.einsum(subscripts, a, b, precision=precision_of(a), preferred_element_type=jnp.float32)
