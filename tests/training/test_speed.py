"""FLOPs per token against the products that are traced; the recipes' tables against what is computed; the clock."""

import dataclasses
import importlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bd3_jax.compiling import targets
from bd3_jax.config_dict import from_config_dict
from bd3_jax.language_model import LanguageModel
from bd3_jax.special_ids import SpecialIds
from bd3_jax.training.speed import Clock, flops_per_token, peak_flops
from bd3_jax.training.update import make_program


def traced_flops(jaxpr, times=1):
    """Two for every multiply-add of every dot_general, through loops and calls."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += times * 2 * depth * math.prod(equation.outvars[0].aval.shape)
        inner = times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                if hasattr(part, "jaxpr"):
                    total += traced_flops(part.jaxpr, inner)
                elif hasattr(part, "eqns"):
                    total += traced_flops(part, inner)
    return total


@pytest.mark.parametrize(
    ("objective", "block_size", "chunk", "copies"),
    [
        ("ar", 0, 1, 1), ("mdlm", 0, 32, 1), ("sedd", 0, 32, 1),
        ("bd3lm", 4, 4, 1), ("bd3lm", 16, 16, 1), ("bd3lm", 32, 32, 1), ("bd3lm", 16, 16, 3),
    ],
)  # fmt: skip
def test_flops_are_those_of_the_products(toy_lm, objective, block_size, chunk, copies):
    """Chunks of one block attend to what they see and to nothing else. Backward counts twice the forward pass.

    The trace has the output layer at every position, of which all are masked at t = 1.
    """
    lm = toy_lm(
        objective, block_size, length=32, width=64, num_layers=3, num_heads=2, cond_dim=2, attention="decomposed",
        attention_chunk=chunk, vocab_size=500,
    )  # fmt: skip
    lm, batch = dataclasses.replace(lm, noise_copies=copies), 4
    rows = jax.ShapeDtypeStruct((batch, 32), jnp.int32)
    loss = lambda params, rows: lm.training_loss(params, rows, jax.random.key(0), 1e-3, 1.0)[0]
    forward = traced_flops(jax.make_jaxpr(loss)(lm.network.abstract_params(), rows).jaxpr)
    for low, share in ((1e-3, 0.5), (0.6, 0.8), (1.0, 1.0)):
        share = 1 if objective == "ar" else share
        needed = forward - (1 - share) * 2 * 64 * 500 * 32 * batch * copies
        clipped = dataclasses.replace(lm, noise=dataclasses.replace(lm.noise, low=low))
        assert flops_per_token(clipped) * 32 * batch == pytest.approx(3 * needed, rel=0.02)  # adaLN is left out


VOCABULARIES = {"owt": 50258, "lm1b": 30522, "text8": 35}


def parameters(config, vocab_size):
    """Of the network as the specification lists it."""
    d, c, layers = config.model.width, config.model.cond_dim, config.model.num_layers
    block = 2 * d + 3 * d * d + d * d + (d * 4 * d + 4 * d) + (4 * d * d + d)
    count = vocab_size * d + layers * block + d + d * vocab_size + vocab_size
    if config.objective != "ar":
        count += (256 * c + c) + (c * c + c) + layers * (c * 6 * d + 6 * d) + (c * 2 * d + 2 * d)
    return count


@pytest.mark.slow
@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_recipe_is_what_its_table_says(name):
    """Every row: it traces for a mesh, nothing allocated; its parameters, FLOPs per token and chip-hours."""
    module, vocab_size = importlib.import_module(f"bd3_jax.configs.{name}"), VOCABULARIES[name]
    rows = re.findall(r"^\| (\S+) \|.* ([\d.]+) M \| ([\d.]+) G \| (\d+) \|$", module.__doc__, re.MULTILINE)
    assert [row[0].split(",")[0] for row in rows] == ["ar", "mdlm", "sedd", *["bd3lm"] * 4]
    ids = SpecialIds(bos=0, eos=0, mask=vocab_size - 1, vocab_size=vocab_size)
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    assert f"--topology={module.TOPOLOGY}" in module.__doc__
    for string, mega, giga, hours in rows:
        config = from_config_dict(module.get_config(string))
        lm = LanguageModel.from_config(config, ids)
        tokens = config.training.num_steps * config.training.batch_size * lm.length
        assert float(giga) == pytest.approx(flops_per_token(lm) / 1e9, abs=0.005)
        assert float(hours) == pytest.approx(flops_per_token(lm) * tokens / (0.4 * 197e12) / 3600, abs=0.51)
        program = make_program(lm, config, mesh)
        shapes = [leaf.shape for leaf in jax.tree.leaves(program.abstract.params)]
        assert sum(map(math.prod, shapes)) == parameters(config, vocab_size)
        assert float(mega) == pytest.approx(parameters(config, vocab_size) / 1e6, abs=0.05)
        for batch_size in (config.training.batch_size, config.eval.batch_size, config.search.batch_size):
            assert batch_size % targets.parse(module.TOPOLOGY).size == 0
        assert config.search.enabled == (string.startswith("bd3lm") and config.block_size < lm.length)
    first, own, both = map(int, re.search(r"(\d+) \+ (\d+) = (\d+)\s+chip-hours", module.__doc__).groups())
    assert (first, own) == (int(rows[3][3]), int(rows[4][3]))
    assert both == first + own


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("TPU v5", 459e12), ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12), ("cpu", None), ("NVIDIA L4", None),
    ],
)  # fmt: skip
def test_peaks(kind, peak):
    assert peak_flops(kind) == peak


def test_the_clock(monkeypatch):
    device = type("Device", (), {"device_kind": "TPU v4"})()
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    clock = Clock(tokens=1000, flops_per_token=1e9)
    for _ in range(2):
        clock.add(0.5, 0.1)
        clock.add(1.5, 0.3)
        found = clock.record()
        assert found == pytest.approx(
            {
                "train/tokens_per_second": 1000, "train/step_seconds": 1.0, "train/input_seconds": 0.2,
                "train/mfu": 1000 * 1e9 / (4 * 275e12),
            }
        )  # fmt: skip
    monkeypatch.setattr(device, "device_kind", "cpu", raising=False)
    unknown = Clock(1000, 1e9)
    unknown.add(np.float64(1), 0.0)
    assert "train/mfu" not in unknown.record()
