"""The authors' tensor layout: names, shapes, and their place in our parameter tree, in both directions."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from bd3_jax.errors import UserError

PREFIX = "backbone."
INTERVAL = ("sampling_eps_min", "sampling_eps_max")
"""Scalars of a model that searched its clipped interval; they stand without the prefix."""
INVERSE_FREQUENCIES = "rotary_emb.inv_freq"
IGNORED = (INVERSE_FREQUENCIES,)


class Stored(Protocol):
    """A tensor that may still lie on disk; `np.asarray` reads it."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __array__(self) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of theirs: PyTorch keeps Linear weights as [out, in], we as [in..., out...]."""

    name: str
    path: tuple[str, ...]
    inputs: int = 0
    """Leading axes of ours that form `in`; 0: not a Linear weight."""

    def to_ours(self, theirs: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return (theirs.T if self.inputs else theirs).reshape(shape)

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        if not self.inputs:
            return ours.reshape(self.their_shape(ours.shape))
        return np.ascontiguousarray(ours.reshape(self.their_shape(ours.shape)[::-1]).T)

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.inputs:
            return int(np.prod(shape[self.inputs :])), int(np.prod(shape[: self.inputs]))
        return shape if self.path == ("embedding",) else (int(np.prod(shape)),)


_OUTSIDE = (
    Tensor("vocab_embed.embedding", ("embedding",)),
    Tensor("sigma_map.mlp.0.weight", ("time", "input", "kernel"), 1),
    Tensor("sigma_map.mlp.0.bias", ("time", "input", "bias")),
    Tensor("sigma_map.mlp.2.weight", ("time", "output", "kernel"), 1),
    Tensor("sigma_map.mlp.2.bias", ("time", "output", "bias")),
)
_BLOCK = (
    Tensor("norm1.weight", ("attention_norm",)),
    Tensor("attn_qkv.weight", ("qkv",), 1),
    Tensor("attn_out.weight", ("attention_out",), 2),
    Tensor("norm2.weight", ("mlp_norm",)),
    Tensor("mlp.0.weight", ("mlp_in", "kernel"), 1),
    Tensor("mlp.0.bias", ("mlp_in", "bias")),
    Tensor("mlp.2.weight", ("mlp_out", "kernel"), 1),
    Tensor("mlp.2.bias", ("mlp_out", "bias")),
    Tensor("adaLN_modulation.weight", ("modulation", "kernel"), 1),
    Tensor("adaLN_modulation.bias", ("modulation", "bias")),
)
_OUTPUT = (
    Tensor("output_layer.norm_final.weight", ("final_norm",)),
    Tensor("output_layer.linear.weight", ("output", "kernel"), 1),
    Tensor("output_layer.linear.bias", ("output", "bias")),
    Tensor("output_layer.adaLN_modulation.weight", ("final_modulation", "kernel"), 1),
    Tensor("output_layer.adaLN_modulation.bias", ("final_modulation", "bias")),
)


def order(names: Iterable[str]) -> list[str]:
    """Tensor names (with or without the prefix) in the order of the authors' parameters; unknown ones last."""
    outside, block, output = ([tensor.name for tensor in group] for group in (_OUTSIDE, _BLOCK, _OUTPUT))

    def place(name: str) -> tuple[int, ...]:
        name = name.removeprefix(PREFIX)
        in_block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if in_block and in_block[2] in block:
            return 1, int(in_block[1]), block.index(in_block[2])
        if name in outside:
            return 0, outside.index(name)
        return (2, output.index(name)) if name in output else (3,)

    return sorted(names, key=place)


def _get(tree: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        if name not in tree:
            return None
        tree = tree[name]
    return tree


def _entries(params: Any) -> Iterator[tuple[Tensor, int | None, Any]]:
    """Their tensors in their order, with the layer and our leaf; a model without adaLN lacks some."""
    for tensor in _OUTSIDE:
        if (leaf := _get(params, tensor.path)) is not None:
            yield tensor, None, leaf
    for layer in range(params["blocks"]["qkv"].shape[0]):
        for tensor in _BLOCK:
            if (leaf := _get(params["blocks"], tensor.path)) is not None:
                yield dataclasses.replace(tensor, name=f"blocks.{layer}.{tensor.name}"), layer, leaf
    for tensor in _OUTPUT:
        if (leaf := _get(params, tensor.path)) is not None:
            yield tensor, None, leaf


def to_tensors(params: Any) -> dict[str, np.ndarray]:
    """Our parameters as their tensors, in their order."""
    return {
        PREFIX + tensor.name: tensor.to_theirs(np.asarray(leaf if layer is None else leaf[layer]))
        for tensor, layer, leaf in _entries(params)
    }


def from_tensors(tensors: Mapping[str, Stored], abstract_params: Any, shardings: Any = None) -> Any:
    """Their tensors as our float32 parameters.

    Names and shapes are compared before anything is read. Then one parameter at a time is read, so that little more
    than the parameters themselves is ever held.

    Args:
      tensors: by name, with or without the `backbone.` prefix.
      abstract_params: shapes of the parameters to fill (`Network.abstract_params`).
      shardings: where each parameter is to lie, on all hosts; None gives numpy arrays.

    Raises:
      UserError: listing tensors that are missing, unexpected, misshapen or not finite.
    """
    theirs = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name not in INTERVAL}
    entries = list(_entries(abstract_params))
    expected = {
        tensor.name: tensor.their_shape(leaf.shape if layer is None else leaf.shape[1:])
        for tensor, layer, leaf in entries
    }
    problems = [f"missing {name} {shape}" for name, shape in expected.items() if name not in theirs]
    problems += [
        f"{name} stands with and without the prefix {PREFIX}"
        for name in theirs
        if {name, PREFIX + name} <= tensors.keys()
    ]
    for name, value in theirs.items():
        if name not in expected and name not in IGNORED:
            problems.append(f"unexpected {name} {value.shape}")
        elif name in expected and value.shape != expected[name]:
            problems.append(f"{name} has shape {value.shape}, expected {expected[name]}")
    _refuse(problems)

    parts: dict[tuple[str, ...], list[tuple[Tensor, int | None]]] = {}
    for tensor, layer, _ in entries:
        path = tensor.path if layer is None else ("blocks", *tensor.path)
        parts.setdefault(path, []).append((tensor, layer))

    def read(path: tuple[Any, ...], leaf: Any, sharding: jax.sharding.Sharding | None = None) -> Any:
        array = np.empty(leaf.shape, np.float32)
        for tensor, layer in parts[tuple(key.key for key in path)]:
            value = np.asarray(theirs[tensor.name])
            if not np.isfinite(value).all():
                problems.append(f"{tensor.name} {value.shape} holds values that are not finite")
            target = array if layer is None else array[layer]
            target[...] = tensor.to_ours(value, target.shape)
        return array if sharding is None else jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    params = jax.tree_util.tree_map_with_path(read, abstract_params, *([] if shardings is None else [shardings]))
    _refuse(problems)
    return params


def _refuse(problems: list[str]) -> None:
    if problems:
        raise UserError("tensors do not fit the model: " + "; ".join(problems))
