"""Programs traced from settings alone, and the operations counted in them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bd3_jax.compiling import programs, targets
from bd3_jax.config_dict import from_config_dict
from bd3_jax.configs import base, owt
from bd3_jax.data.tokenizers import load_tokenizer
from bd3_jax.errors import UserError
from bd3_jax.sampling.drawing import Slots
from bd3_jax.sampling.sampler import Sampler


def test_products_are_counted_through_scans_branches_and_gradients():
    x, w = jnp.ones((5, 4)), jnp.ones((4, 4))

    def deep(x, w):
        x, _ = jax.lax.scan(lambda x, _: (jax.nn.relu(x @ w), None), x, length=3)
        return jax.lax.cond(x.sum() > 0, lambda x: x @ w @ w, lambda x: x @ w, x).sum()

    one = 2 * 5 * 4 * 4
    assert programs.product_flops(jax.make_jaxpr(deep)(x, w)) == (3 + 2) * one
    gradient = jax.make_jaxpr(jax.grad(lambda x, w: ((x @ w) ** 2).sum(), (0, 1)))(x, w)
    assert programs.product_flops(gradient) == 3 * one
    batched = jax.make_jaxpr(lambda a, b: jnp.einsum("bij,bjk->bik", a, b))(jnp.ones((7, 2, 3)), jnp.ones((7, 3, 5)))
    assert programs.product_flops(batched) == 2 * 7 * 2 * 3 * 5


def test_a_loop_of_unknown_length_is_counted_as_often_as_one_says():
    loop = lambda n, x: jax.lax.fori_loop(0, n, lambda _, x: x @ x, x @ x)
    jaxpr = jax.make_jaxpr(loop)(3, jnp.ones((4, 4)))
    assert programs.product_flops(jaxpr, 10) == 11 * 2 * 4**3
    assert programs.product_flops(jaxpr) == 2 * 2 * 4**3


def tiny(string, **model):
    config = base.get_config(string)
    config.model.update({**dict(length=16, width=16, num_layers=2, num_heads=2, cond_dim=8), **model})
    config.training.batch_size = config.eval.batch_size = config.sampling.batch_size = 4
    config.sampling.update(max_length=16, min_entropy=0.0)
    return from_config_dict(config)


# Backward: the gradients of hidden states, kernel and bias.
@pytest.mark.parametrize(("mode", "products"), [("eval", 16), ("train", 3 * 16 + 1)])
def test_the_output_layer_counts_at_every_position_however_it_is_chunked(mode, products):
    flops = {}
    for max_logits, vocab_size in ((1600, 100), (1600, 200), (2**20, 100)):
        config = tiny("bd3lm,block_size=4", max_logits=max_logits)
        flops[max_logits, vocab_size] = programs.trace(config, mode, jax.devices()[:1], "cpu", vocab_size).flops
    assert flops[1600, 200] - flops[1600, 100] == 2 * 4 * 16 * products * 100
    assert flops[1600, 100] == flops[2**20, 100]


@pytest.mark.slow
@pytest.mark.parametrize("string", ["bd3lm,block_size=4", "mdlm"])
def test_what_is_compiled_is_what_samples(string, toy_lm, random_params):
    """The arguments of a run fit the program that is traced without any, with the same results and memory."""
    config = tiny(string)
    program = programs.trace(config, "sample", jax.devices()[:1], "cpu", 11)
    lm = toy_lm(config.objective, config.block_size, length=16, scan_unroll=0)
    sampler, params = Sampler.from_config(lm, config.sampling), random_params(lm)
    ours, theirs = (Slots(sampler, params, sampler.canvas([[3]])[0], 4) for _ in range(2))
    for slots in (ours, theirs):
        slots.begin({slot: slots.new(slot) for slot in range(4)})
    assert program.held["context of samples"] == sum(leaf.nbytes for leaf in jax.tree.leaves(ours._memory))
    _, filled = program.traced.lower().compile()(ours._weights, ours._memory, *ours._inputs())
    np.testing.assert_array_equal(filled.tokens, [drawn.row for drawn in theirs.step()])


@pytest.mark.slow
def test_weights_are_held_once_where_sampling_has_none_of_its_own():
    made = lambda string: programs.trace(tiny(string), "sample", jax.devices()[:1], "cpu", 300)
    whole, frozen = made("mdlm"), made("bd3lm,block_size=4")
    assert whole.held.keys() == {"parameters", "context of samples"}
    assert not whole.beside
    assert frozen.held.keys() == {"weights for sampling", "context of samples"}
    assert frozen.beside == {"parameters": whole.held["parameters"]}


def test_products_of_sampling_are_those_of_a_call_for_every_token():
    """A layer more: 12 d^2 + 2 L d multiplications for each query. First calls of a block store the one before too."""
    made = lambda layers: programs.trace(
        tiny("bd3lm,block_size=8", num_layers=layers), "sample", jax.devices()[:1], "cpu", 300
    )
    fewer, more = made(2), made(3)
    calls = more.calls.number + more.calls.number // 8
    assert more.flops - fewer.flops == pytest.approx(2 * (12 * 16**2 + 2 * 16 * 16) * more.rows * 8 * calls, rel=0.05)


def test_every_program_lowers_for_a_tpu():
    """Where a whole row of 128 is read attention is a kernel; a cache is read without one."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    script = Path(__file__).parent / "lower_for_tpu.py"
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name for name, kernels in found.items() if not kernels} == {"ar sample", "bd3lm sample"}
    assert len(found) == 13


def test_the_largest_values_are_products_and_what_scans_keep():
    def kept(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), x @ w), x, length=3)[1]

    jaxpr = jax.make_jaxpr(kept)(jnp.ones((8, 4)), jnp.ones((4, 4)))
    stacked, product = programs.largest_values(jaxpr, rows=8, shards=2)
    assert (stacked.size, stacked.shape) == (3 * 8 * 4 * 4 // 2, "float32[3,8,4]")
    assert (product.size, product.shape) == (8 * 4 * 4 // 2, "float32[8,4]")


def test_the_ids_are_those_of_the_tokenizer_without_reading_it():
    config = from_config_dict(owt.get_config("mdlm"))
    assert programs.special_ids(config, 0).vocab_size == 50258
    assert programs.special_ids(config, 0).mask == 50257
    assert programs.special_ids(config, 99).vocab_size == 99
    assert programs.special_ids(from_config_dict(base.get_config("mdlm")), 0).vocab_size == 2001
    unknown = owt.get_config("mdlm")
    unknown.data.tokenizer = "some/where"
    with pytest.raises(UserError, match="--vocab_size"):
        programs.special_ids(from_config_dict(unknown), 0)


@pytest.mark.parametrize("name", ["bytes", "text8", "gpt2"])
def test_the_table_agrees_with_the_tokenizers(name):
    ids = load_tokenizer(name).ids
    assert programs.VOCABULARIES[name] == (ids.vocab_size, ids.mask)


@pytest.mark.parametrize(
    ("text", "name", "size"),
    [
        ("v5e:16x16", "v5e", 256),
        ("v5p:2x2x1", "v5p", 4),
        ("h100:8", "h100", 8),
        ("cpu:2", "cpu", 2),
        ("2xv5e:4x4", "v5e", 32),
    ],
)
def test_topologies(text, name, size):
    target = targets.parse(text)
    assert (target.name, target.size) == (name, size)


@pytest.mark.parametrize(
    "text",
    ["v5e", "v5e:", "v5e:0x4", "v5e:2x2x2x2", "a100:8", "v5e:2 x2", "v5e:-1", "2xh100:8", "0xv5e:2x2", "2xcpu:2"],
)
def test_no_topologies(text):
    with pytest.raises(UserError, match="CHIP:SHAPE"):
        targets.parse(text)
