"""Programs traced from settings alone, and the operations counted in them."""

import jax
import jax.numpy as jnp
import pytest

from bd3_jax.compiling import programs, targets
from bd3_jax.config import from_config_dict
from bd3_jax.configs import base, owt
from bd3_jax.data.tokenizers import load_tokenizer
from bd3_jax.errors import UserError


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
    [("v5e:16x16", "v5e", 256), ("v5p:2x2x1", "v5p", 4), ("h100:8", "h100", 8), ("cpu:2", "cpu", 2)],
)
def test_topologies(text, name, size):
    target = targets.parse(text)
    assert (target.name, target.size) == (name, size)


@pytest.mark.parametrize("text", ["v5e", "v5e:", "v5e:0x4", "v5e:2x2x2x2", "a100:8", "v5e:2 x2", "v5e:-1"])
def test_no_topologies(text):
    with pytest.raises(UserError, match="CHIP:SHAPE"):
        targets.parse(text)
