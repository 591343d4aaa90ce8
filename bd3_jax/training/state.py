"""What an update changes: parameters, their average, optimiser and interval. The optimiser and the learning rate."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from bd3_jax.config import Config, OptimizerConfig
from bd3_jax.models.network import Network, Params
from bd3_jax.sharding import param_shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a resumed run needs besides its data position.

    There is no random key: every draw folds the step into the seed.

    Attributes:
      step: batches seen: updates done, and those that were skipped.
      skipped: how many of the last ones were skipped, in a row.
      params: float32.
      ema: exponential moving average of `params`, the weights that are evaluated and sampled.
      opt_state: Adam's moments and counts.
      low: t ~ U[low, high] in the next update.
      high: see `low`.
    """

    step: Int[Array, ""]
    skipped: Int[Array, ""]
    params: Params
    ema: Params
    opt_state: optax.OptState
    low: Float[Array, ""]
    high: Float[Array, ""]


def init_state(
    network: Network, optimizer: optax.GradientTransformation, config: Config, key: PRNGKeyArray
) -> TrainState:
    """The state before the first update, from fresh parameters."""
    return start_state(optimizer, config, network.init(key))


def start_state(optimizer: optax.GradientTransformation, config: Config, params: Params) -> TrainState:
    """The state before the first update, from any parameters; the average starts at them, all else anew."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),  # never the same buffer: each is updated in place
        opt_state=optimizer.init(params),
        low=jnp.float32(config.noise.low),
        high=jnp.float32(config.noise.high),
    )


def shard_state(
    mesh: Mesh, network: Network, optimizer: optax.GradientTransformation, abstract: TrainState
) -> TrainState:
    """The abstract state with shardings: average and moments lie as the parameters do, scalars are everywhere."""
    shardings, everywhere = param_shardings(mesh, network), NamedSharding(mesh, PartitionSpec())

    def place(array: jax.ShapeDtypeStruct, own: NamedSharding = everywhere) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=own)

    return dataclasses.replace(
        jax.tree.map(place, abstract),
        params=jax.tree.map(place, abstract.params, shardings),
        ema=jax.tree.map(place, abstract.ema, shardings),
        opt_state=optax.tree.map_params(optimizer, place, abstract.opt_state, shardings, transform_non_params=place),
    )


def updates_done(state: TrainState) -> Int[Array, ""]:
    """The optimiser's own count, without the steps that were skipped: learning rate and average follow it."""
    return optax.tree.get(
        state.opt_state, "count", filtering=lambda path, _: path[-1].tuple_name == "ScaleByScheduleState"
    )


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """The rate as a function of the updates done before, n - 1 for update n (from 1).

    It rises from 0 by learning_rate / warmup_steps an update, then stays, or falls as a cosine to 0 at `num_steps`.
    """
    if config.decay == "cosine":
        after = optax.cosine_decay_schedule(config.learning_rate, max(num_steps - config.warmup_steps, 1))
    else:
        after = optax.constant_schedule(config.learning_rate)
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Clipping of the global gradient norm, then AdamW with weight decay on all parameters."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, num_steps), config.beta1, config.beta2, config.eps, weight_decay=config.weight_decay
        ),
    )


def update_ema(ema: Params, params: Params, step: Int[Array, ""], max_decay: float) -> Params:
    """ema <- decay * ema + (1 - decay) * params, decay = min(max_decay, (1 + n) / (10 + n)), n = `step` from 1."""
    # 1 - decay directly: in float32, 1 - 0.9999 would be wrong by 2 parts in 10,000.
    share = jnp.maximum(1 - max_decay, 9 / (10 + step))
    return jax.tree.map(lambda average, value: average + share * (value - average), ema, params)
