"""One update: microbatches against gradients added up by hand, and what a number that is not finite changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bd3_jax.language_model import LanguageModel
from bd3_jax.special_ids import SpecialIds
from bd3_jax.training.state import init_state, make_optimizer, updates_done
from bd3_jax.training.update import make_update

ROWS = np.random.default_rng(0).integers(0, 10, (8, 16)).astype(np.int32)
IDS = SpecialIds(bos=0, eos=0, mask=10, vocab_size=11)


@pytest.fixture
def make(tiny_config):
    """Model, optimiser, a state with noise on all parameters, and the jitted update."""

    def build(string="bd3lm,block_size=4", **overrides):
        config = tiny_config(string, **{"optimizer.clip_norm": 1e6, "optimizer.warmup_steps": 0, **overrides})
        model = LanguageModel.from_config(config, IDS)
        optimizer = make_optimizer(config.optimizer, config.training.num_steps)
        state = init_state(model.network, optimizer, config, jax.random.key(1))
        rng = np.random.default_rng(1)
        noise = lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32)
        state = dataclasses.replace(state, params=jax.tree.map(noise, state.params))
        return config, model, state, jax.jit(make_update(model, optimizer, config))

    return build


def gradients(config, state):
    """Nothing was clipped, so after the first update the first moment is (1 - beta1) times the gradient."""
    return jax.tree.map(lambda m: m / (1 - config.optimizer.beta1), optax.tree.get(state.opt_state, "mu"))


def agree(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max()), ours, theirs)


@pytest.mark.parametrize("string", ["ar", "bd3lm,block_size=4"])
def test_microbatches_are_the_large_batch(make, string):
    """Without dropout, and with t = 1, so that everything is masked whatever the key."""
    still = {"model.dropout": 0.0, "noise.low": 1.0, "noise.high": 1.0}
    found = []
    for parts in (1, 4):
        config, _, state, update = make(string, **still, **{"training.microbatches": parts})
        state, metrics = update(state, ROWS)
        found.append((gradients(config, state), metrics))
    agree(found[1][0], found[0][0])
    for name in ("train/loss", "train/grad_norm", "train/param_norm"):
        assert float(found[1][1][name]) == pytest.approx(float(found[0][1][name]), rel=1e-5)


def test_every_microbatch_has_a_key_of_its_own(make):
    """Microbatch k has rows k, k + 2, ...; its key is fold_in(fold_in(fold_in(seed, 1), step), k)."""
    config, model, state, update = make(**{"training.microbatches": 2, "seed": 5})
    state = dataclasses.replace(state, step=jnp.int32(3))
    after, metrics = update(state, ROWS)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), 1), 3)
    value_and_grad = jax.jit(jax.value_and_grad(lambda *args: model.training_loss(*args)[0]))
    losses, grads = zip(
        *(value_and_grad(state.params, ROWS[k::2], jax.random.fold_in(key, k), 1e-3, 1.0) for k in range(2)),
        strict=True,
    )
    assert float(metrics["train/loss"]) == pytest.approx(float(sum(losses)) / 2, rel=1e-5)
    agree(gradients(config, after), jax.tree.map(lambda a, b: (a + b) / 2, *grads))


def test_a_step_that_is_not_finite_changes_nothing_but_counts(make):
    """A parameter that is nan makes the loss nan."""
    _, _, state, update = make(**{"training.max_skipped": 2})
    state, _ = update(state, ROWS)
    nan = state.params | {"final_norm": state.params["final_norm"] * jnp.nan}
    broken = lambda s: dataclasses.replace(s, params=nan)
    whole = lambda s: dataclasses.replace(s, params=state.params)

    skipped, metrics = update(broken(state), ROWS)
    assert not np.isfinite(metrics["train/loss"])
    assert float(metrics["train/skipped"]) == 1
    assert (int(skipped.step), int(skipped.skipped), int(updates_done(skipped))) == (2, 1, 1)
    jax.tree.map(np.testing.assert_array_equal, skipped.params, nan)
    for part in ("ema", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(skipped, part), getattr(state, part))

    taken, metrics = update(whole(skipped), ROWS)
    assert (float(metrics["train/skipped"]), int(taken.skipped), int(updates_done(taken))) == (0, 0, 2)

    # After two in a row nothing changes any more, whatever comes.
    stuck, _ = update(broken(skipped), ROWS)
    stuck, metrics = update(whole(stuck), ROWS)
    assert np.isfinite(metrics["train/loss"])
    assert (float(metrics["train/skipped"]), int(stuck.skipped), int(stuck.step)) == (1, 3, 4)
    jax.tree.map(np.testing.assert_array_equal, stuck.params, state.params)
