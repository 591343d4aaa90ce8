"""One update: gradients over microbatches, optimiser, average; left out where a number is not finite."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from bd3_jax import sharding
from bd3_jax.config import Config
from bd3_jax.language_model import LanguageModel
from bd3_jax.models.network import Params
from bd3_jax.training.state import (
    TrainState,
    init_state,
    learning_rate,
    make_optimizer,
    shard_state,
    update_ema,
    updates_done,
)

# Streams of random numbers that follow from the seed.
_INIT, _TRAIN, _SEARCH = 0, 1, 2

Metrics = dict[str, Float[Array, ""]]


def stream_key(seed: int, purpose: int) -> PRNGKeyArray:
    return jax.random.fold_in(jax.random.key(seed), purpose)


init_key = functools.partial(stream_key, purpose=_INIT)
search_key = functools.partial(stream_key, purpose=_SEARCH)


def step_key(seed: int, step: Int[Array, ""] | int) -> PRNGKeyArray:
    """Of the update after `step` others; each of its microbatches folds its number in."""
    return jax.random.fold_in(stream_key(seed, _TRAIN), step)


class Program(NamedTuple):
    """What trains a model on a mesh: its state as shapes with shardings, and the update, traced.

    Attributes:
      optimizer: see `make_optimizer`.
      init: a fresh state, to be jitted with these shardings.
      abstract: the state's shapes, dtypes and shardings; nothing is allocated.
      update: (state, rows `[b, L]`) -> (state, metrics), which takes the state's memory; to be lowered and compiled.
    """

    optimizer: optax.GradientTransformation
    init: Callable[[], TrainState]
    abstract: TrainState
    update: jax.stages.Traced


def make_program(model: LanguageModel, config: Config, mesh: Mesh) -> Program:
    """Traces the update for `mesh`, whose devices need not be there.

    Raises:
      UserError: where the batch cannot be split.
    """
    size, parts = config.training.batch_size, config.training.microbatches
    rows = sharding.batch_sharding(mesh, size // parts, "config.training.batch_size / microbatches")
    optimizer = make_optimizer(config.optimizer, config.training.num_steps)
    init = functools.partial(init_state, model.network, optimizer, config, init_key(config.seed))
    abstract = shard_state(mesh, model.network, optimizer, jax.eval_shape(init))
    shardings = jax.tree.map(lambda array: array.sharding, abstract)
    update = jax.jit(
        make_update(model, optimizer, config, rows),
        donate_argnums=0,
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
    )
    batch = jax.ShapeDtypeStruct((size, model.length), jnp.int32, sharding=rows)
    return Program(optimizer, init, abstract, update.trace(abstract, batch))


def make_update(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    config: Config,
    rows: NamedSharding | None = None,
) -> Callable[[TrainState, Int[Array, "b L"]], tuple[TrainState, Metrics]]:
    """(state, rows) -> (state after one more step, metrics of it).

    Metrics: train/loss in nats per token; train/grad_norm, unclipped; train/param_norm, after the update;
    train/learning_rate; train/interval_low and _high, what times were drawn from; train/skipped, 1 or 0.

    A step whose loss or gradient is not finite is skipped: nothing changes but the counts of steps and of skipped ones.
    After `max_skipped` in a row all later ones are, so that the state stays as the last of these found it.

    Args:
      model: what is trained.
      optimizer: see `make_optimizer`.
      config: of the run.
      rows: sharding of a microbatch, where a mesh splits it.
    """
    rate = learning_rate(config.optimizer, config.training.num_steps)

    def update(state: TrainState, x0: Int[Array, "b L"]) -> tuple[TrainState, Metrics]:
        loss, grads = loss_and_grads(model, config, state, x0, rows)
        grad_norm, done = optax.tree.norm(grads), updates_done(state)
        stuck = state.skipped >= config.training.max_skipped
        skip = stuck | ~jnp.isfinite(loss) | ~jnp.isfinite(grad_norm)

        changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, changes)
        ema = update_ema(state.ema, params, done + 1, config.optimizer.ema_decay)
        after = dataclasses.replace(state, params=params, ema=ema, opt_state=opt_state)
        state = jax.tree.map(lambda new, old: jnp.where(skip, old, new), after, state)
        state = dataclasses.replace(state, step=state.step + 1, skipped=jnp.where(skip, state.skipped + 1, 0))
        return state, {
            "train/loss": loss,
            "train/grad_norm": grad_norm,
            "train/param_norm": optax.tree.norm(state.params),
            "train/learning_rate": jnp.asarray(rate(done), jnp.float32),
            "train/interval_low": state.low,
            "train/interval_high": state.high,
            "train/skipped": skip.astype(jnp.float32),
        }

    return update


def loss_and_grads(
    model: LanguageModel, config: Config, state: TrainState, x0: Int[Array, "b L"], rows: NamedSharding | None
) -> tuple[Float[Array, ""], Params]:
    """Means over the microbatches, each with a key of its own."""
    key, parts = step_key(config.seed, state.step), config.training.microbatches

    def of(index: Int[Array, ""] | int, x0: Int[Array, "m L"]) -> tuple[Float[Array, ""], Params]:
        value_and_grad = jax.value_and_grad(model.training_loss, has_aux=True)
        with sharding.by_rows(rows):
            (loss, _), grads = value_and_grad(state.params, x0, jax.random.fold_in(key, index), state.low, state.high)
        return loss, grads

    if parts == 1:  # a scan over one would still copy the gradients
        return of(0, x0)

    # Microbatch k has the rows k, k + parts, ...: every device takes its share of each from the rows that it holds.
    microbatches = x0.reshape(-1, parts, x0.shape[1]).swapaxes(0, 1)
    if rows is not None:
        split = NamedSharding(rows.mesh, PartitionSpec(None, *rows.spec))
        microbatches = jax.lax.with_sharding_constraint(microbatches, split)

    def add(sums: tuple[Array, Params], xs: tuple[Array, Array]) -> tuple[tuple[Array, Params], None]:
        return jax.tree.map(jnp.add, sums, of(*xs)), None

    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
    sums, _ = jax.lax.scan(add, zeros, (jnp.arange(parts), microbatches))
    return jax.tree.map(lambda total: total / parts, sums)
