"""Two passes against the network's one, and the figures of a small model."""

import json

import jax
import numpy as np
import pytest


@pytest.mark.parametrize("block_size", [1, 3])
def test_two_passes_give_the_same(script, toy_lm, random_params, block_size):
    model = toy_lm("bd3lm", block_size)
    params, rng = random_params(model), np.random.default_rng(0)
    clean, noised = rng.integers(0, 11, (2, 3, 12))
    both = script("training_cost").in_two_passes(model)
    one, two = (
        jax.jit(lambda params, lm=lm: lm.network.apply(params, noised, block_size, clean=clean))(params)
        for lm in (model, both)
    )
    np.testing.assert_allclose(two, one, atol=2e-5)


@pytest.mark.slow
def test_figures(script, tmp_path):
    small = {"model.length": 64, "model.width": 32, "model.num_layers": 2, "model.num_heads": 2, "model.cond_dim": 8}
    sets = [f"--set={name}={value}" for name, value in small.items()]
    cost = script("training_cost")
    cost.main([*sets, "--rounds=2", "--vocab_size=20", f"--out={tmp_path}"])
    (cell,) = json.loads((tmp_path / "results.json").read_text())
    assert list(cell["figures"]) == [cost.ONE, cost.TWO, cost.PLAIN]
    assert cell["figures"][cost.ONE]["ratio"] == 1
    assert (tmp_path / "training_cost.png").stat().st_size > 1000
    assert cell["figures"][cost.PLAIN]["temporaries"] < cell["figures"][cost.ONE]["temporaries"]
