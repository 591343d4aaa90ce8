"""The authors' tensor layout; that it means what they mean by it is shown by tests/test_golden.py."""

import re

import jax
import numpy as np
import pytest

from bd3_jax.checkpoints.pytorch import INTERVAL, from_tensors, order, to_tensors
from bd3_jax.errors import UserError

FOLDERS = ["bd3lm_block4", "bd3lm_block1", "mdlm", "sedd", "ar"]


@pytest.mark.parametrize("name", FOLDERS)
def test_round_trip_of_their_tensors(golden, name):
    case = golden(name)
    back = to_tensors(case.params)
    expected = {name: value for name, value in case.tensors.items() if "inv_freq" not in name and name not in INTERVAL}
    assert back.keys() == expected.keys()
    for key, value in expected.items():
        assert back[key].dtype == value.dtype
        np.testing.assert_array_equal(back[key], value)


@pytest.mark.parametrize("objective", ["ar", "mdlm"])
def test_round_trip_of_our_parameters(toy_lm, random_params, objective):
    lm = toy_lm(objective, num_layers=3)
    params = random_params(lm)
    again = from_tensors(to_tensors(params), lm.network.abstract_params())
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert sum(value.size for value in to_tensors(params).values()) == sum(x.size for x in jax.tree.leaves(params))


def test_order_is_theirs(golden):
    """EMA weights come as a nameless list, in the order in which PyTorch registers parameters."""
    case = golden("mdlm")
    layer = ["norm1", "attn_qkv", "attn_out", "norm2", "mlp.0", "mlp.0", "mlp.2", "mlp.2", "adaLN", "adaLN"]
    names = [key.removeprefix("backbone.") for key in to_tensors(case.params)]
    assert names[0] == "vocab_embed.embedding"
    assert [re.split(r"\.weight|\.bias|_modulation", n)[0] for n in names[1:5]] == ["sigma_map.mlp.0"] * 2 + [
        "sigma_map.mlp.2"
    ] * 2
    for i in (0, 1):
        found = names[5 + 10 * i : 15 + 10 * i]
        assert all(name.startswith(f"blocks.{i}.{part}") for name, part in zip(found, layer, strict=True))
    assert names[25:] == [
        "output_layer.norm_final.weight",
        "output_layer.linear.weight",
        "output_layer.linear.bias",
        "output_layer.adaLN_modulation.weight",
        "output_layer.adaLN_modulation.bias",
    ]
    assert order(sorted(names)) == names


def test_ten_layers_are_in_the_order_of_numbers():
    assert order(["blocks.10.norm1.weight", "blocks.9.norm1.weight"])[0] == "blocks.9.norm1.weight"


def test_prefix_and_the_other_scalars_do_not_matter(golden):
    case = golden("mdlm")
    bare = {name.removeprefix("backbone."): value for name, value in case.tensors.items()}
    bare |= {name: np.float32(0.5) for name in INTERVAL}
    again = from_tensors(bare, case.lm.network.abstract_params())
    jax.tree.map(np.testing.assert_array_equal, again, case.params)


def test_half_precision_is_widened(golden):
    case = golden("ar")
    half = {name: value.astype(np.float16) for name, value in case.tensors.items()}
    again = from_tensors(half, case.lm.network.abstract_params())
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(again))
    np.testing.assert_array_equal(again["embedding"], np.float32(np.float16(case.params["embedding"])))


def test_all_problems_are_listed(golden):
    case = golden("mdlm")
    tensors = dict(case.tensors)
    tensors.pop("backbone.blocks.1.mlp.0.bias")
    tensors["backbone.blocks.2.norm1.weight"] = np.ones(32, np.float32)
    tensors["backbone.output_layer.linear.weight"] = np.ones((32, 31), np.float32)
    with pytest.raises(UserError) as error:
        from_tensors(tensors, case.lm.network.abstract_params())
    text = str(error.value)
    assert "missing blocks.1.mlp.0.bias (128,)" in text
    assert "unexpected blocks.2.norm1.weight (32,)" in text
    assert "output_layer.linear.weight has shape (32, 31), expected (31, 32)" in text
    assert text.count(";") == 2
    assert "\n" not in text


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(golden, value):
    case = golden("mdlm")
    tensors = {name: array.copy() for name, array in case.tensors.items()}
    tensors["backbone.blocks.1.attn_qkv.weight"][5, 3] = value
    with pytest.raises(UserError, match=r"blocks.1.attn_qkv.weight \(96, 32\) holds values that are not finite"):
        from_tensors(tensors, case.lm.network.abstract_params())
