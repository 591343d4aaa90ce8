"""Learning rate, optimiser and average against their definitions, written out in numpy float64."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bd3_jax.config import OptimizerConfig
from bd3_jax.training.state import init_state, learning_rate, make_optimizer, start_state, update_ema

NUM_STEPS = 30


def settings(**changes) -> OptimizerConfig:
    values = dict(
        learning_rate=0.01, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, clip_norm=1.0, warmup_steps=5,
        decay="constant", ema_decay=0.9999,
    )  # fmt: skip
    return OptimizerConfig(**values | changes)


def rate(c: OptimizerConfig, n: int) -> float:
    """Of update n, from 1."""
    if n - 1 < c.warmup_steps:
        return c.learning_rate * (n - 1) / c.warmup_steps
    if c.decay == "constant":
        return c.learning_rate
    done = (n - 1 - c.warmup_steps) / (NUM_STEPS - c.warmup_steps)
    return c.learning_rate * (1 + math.cos(math.pi * done)) / 2


@pytest.mark.parametrize("decay", ["constant", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 5])
def test_learning_rate(decay, warmup_steps):
    c = settings(decay=decay, warmup_steps=warmup_steps)
    schedule = learning_rate(c, NUM_STEPS)
    ours = [float(schedule(n - 1)) for n in range(1, NUM_STEPS + 1)]
    np.testing.assert_allclose(ours, [rate(c, n) for n in range(1, NUM_STEPS + 1)], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_updates(decay):
    c = settings(decay=decay)
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(3, 4)), "b": {"c": rng.normal(size=5)}}
    # Global norms on both sides of the bound.
    grads = [
        jax.tree.map(lambda p, n=n: rng.normal(size=p.shape) * 10 ** rng.uniform(-2, 1), params) for n in range(12)
    ]
    norms = [math.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grad))) for grad in grads]
    assert min(norms) < c.clip_norm < max(norms)

    optimizer = make_optimizer(c, NUM_STEPS)
    ours = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    state = optimizer.init(ours)
    first, second = jax.tree.map(np.zeros_like, params), jax.tree.map(np.zeros_like, params)
    for n, (grad, norm) in enumerate(zip(grads, norms, strict=True), start=1):
        changes, state = optimizer.update(jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), grad), state, ours)
        ours = optax.apply_updates(ours, changes)

        grad = jax.tree.map(lambda g, norm=norm: g * min(1, c.clip_norm / norm), grad)
        first = jax.tree.map(lambda m, g: c.beta1 * m + (1 - c.beta1) * g, first, grad)
        second = jax.tree.map(lambda v, g: c.beta2 * v + (1 - c.beta2) * g**2, second, grad)

        def step(p, m, v, n=n):
            adam = m / (1 - c.beta1**n) / (np.sqrt(v / (1 - c.beta2**n)) + c.eps)
            return p - rate(c, n) * (adam + c.weight_decay * p)

        params = jax.tree.map(step, params, first, second)
        jax.tree.map(lambda mine, theirs: np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-6), ours, params)


def test_ema_agrees_with_the_authors():
    with np.load(Path(__file__).parents[1] / "golden" / "ema.npz") as golden:
        values, wanted, max_decay = golden["params"], golden["shadow"], float(golden["decay"])
    average = {"x": jnp.zeros(())}
    for n, (value, expected) in enumerate(zip(values, wanted, strict=True), start=1):
        average = update_ema(average, {"x": jnp.float32(value)}, jnp.int32(n), max_decay)
        assert abs(float(average["x"]) - expected) <= 2e-5 + 1e-5 * abs(expected)


@pytest.mark.parametrize(("n", "max_decay", "decay"), [(1, 0.9999, 2 / 11), (10**6, 0.9999, 0.9999), (100, 0.5, 0.5)])
def test_ema_decay(n, max_decay, decay):
    average = update_ema({"x": jnp.zeros(())}, {"x": jnp.ones(())}, jnp.int32(n), max_decay)
    np.testing.assert_allclose(average["x"], 1 - decay, rtol=1e-5)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, lambda f: jax.jit(f, donate_argnums=0)])
def test_parameters_and_average_share_no_memory(tiny_config, wrap):
    config = tiny_config("ar")
    params = {"a": jnp.ones((3, 4)), "b": {"c": jnp.zeros(5)}}
    state = wrap(lambda params: start_state(make_optimizer(config.optimizer, 10), config, params))(params)
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state.params, state.ema))]
    assert len(set(buffers)) == 4


def test_state_starts_anew(tiny_config, toy_lm):
    config = tiny_config("bd3lm,block_size=4", **{"noise.low": 0.25, "noise.high": 0.75})
    network = toy_lm("bd3lm", 4).network
    state = init_state(network, make_optimizer(config.optimizer, 10), config, jax.random.key(3))
    assert (int(state.step), float(state.low), float(state.high)) == (0, 0.25, 0.75)
    jax.tree.map(np.testing.assert_array_equal, state.params, network.init(jax.random.key(3)))
    jax.tree.map(np.testing.assert_array_equal, state.ema, state.params)
    moments = optax.tree.get(state.opt_state, "mu")
    assert jax.tree.structure(moments) == jax.tree.structure(state.params)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(moments))
