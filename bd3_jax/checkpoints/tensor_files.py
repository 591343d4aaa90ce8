"""Files of tensors -> names and shapes, read when asked for. Nothing in a file is executed.

safetensors holds numbers only; a .ckpt is read with `torch.load(weights_only=True)`, which refuses everything else.
"""

import dataclasses
import functools
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from etils import epath

from bd3_jax.checkpoints.pytorch import IGNORED, INTERVAL, PREFIX, order
from bd3_jax.errors import UserError

SAFETENSORS, LIGHTNING = ".safetensors", ".ckpt"
_FLOATS = ("F16", "BF16", "F32", "F64")


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file; `np.asarray` reads it as float32, and nothing is kept."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        with np.errstate(over="ignore"):  # what is beyond float32 becomes inf, which no model accepts
            return self.read().astype(dtype or np.float32, copy=False)


def open_tensors(path: epath.Path, weights: Literal["ema", "raw"] = "ema") -> Mapping[str, LazyTensor]:
    """The tensors of a .safetensors or a Lightning .ckpt.

    Args:
      path: of the file.
      weights: of a .ckpt that has both: the averaged ones, which are the model, or those the optimiser works on.

    Raises:
      UserError: the file is damaged, holds anything but floating-point tensors, or not the wanted weights.
    """
    if path.suffix == SAFETENSORS:
        if weights == "raw":
            raise UserError(f"{path} holds one set of weights, the published ones; allowed: weights = ema")
        return _open_safetensors(path)
    if path.suffix == LIGHTNING:
        return _open_lightning(path, weights)
    raise UserError(f"{path} is neither {SAFETENSORS} nor {LIGHTNING}")


def _open_safetensors(path: epath.Path) -> dict[str, LazyTensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(tensor.get_shape()) for name, tensor in found.items()}
            dtypes = {name: tensor.get_dtype() for name, tensor in found.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is no readable safetensors file: {error}") from None
    wrong = [f"{name} {shapes[name]} of {dtype}" for name, dtype in dtypes.items() if dtype not in _FLOATS]
    if wrong:
        raise UserError(f"{path} holds tensors that are not {', '.join(_FLOATS)}: {'; '.join(wrong)}")

    def read(name: str) -> np.ndarray:
        # Opened anew for every tensor: the pages of a file that stays mapped would add up to the whole of it.
        with safe_open(str(path), framework="numpy") as file:
            return file.get_tensor(name)

    return {name: LazyTensor(shape, functools.partial(read, name)) for name, shape in shapes.items()}


def _open_lightning(path: epath.Path, weights: Literal["ema", "raw"]) -> dict[str, LazyTensor]:
    try:
        import torch
    except ImportError:
        raise UserError(f"{path}: reading a .ckpt needs PyTorch: pip install 'bd3_jax[torch]'") from None
    try:
        # mmap: the optimiser's moments in the file are never read.
        content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises its own, pickle's and zip's errors
        raise UserError(
            f"{path} is no .ckpt of tensors alone and is not opened further, since that could run code: "
            f"{_reason(error)}"
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"{path} is no Lightning checkpoint: it holds no 'state_dict'")
    state = {str(name).replace("_orig_mod.", ""): tensor for name, tensor in content["state_dict"].items()}
    tensors = {name: tensor for name, tensor in state.items() if name.startswith(PREFIX) or name in INTERVAL}
    averaged = content.get("ema")
    if weights == "ema" and averaged is not None:
        shadow = averaged.get("shadow_params") if isinstance(averaged, dict) else None
        names = order(name for name in tensors if name not in INTERVAL and name.removeprefix(PREFIX) not in IGNORED)
        if not isinstance(shadow, list) or len(shadow) != len(names):
            found = f"{len(shadow)} tensors" if isinstance(shadow, list) else "no list"
            raise UserError(f"{path}: ema.shadow_params holds {found}, the model {len(names)} tensors")
        tensors |= dict(zip(names, shadow, strict=True))
    wrong = [
        name for name, tensor in tensors.items() if not (torch.is_tensor(tensor) and torch.is_floating_point(tensor))
    ]
    if wrong:
        raise UserError(f"{path} holds entries that are no floating-point tensors: {'; '.join(wrong)}")

    def read(tensor: Any) -> np.ndarray:
        return tensor.detach().float().numpy()

    return {name: LazyTensor(tuple(tensor.shape), functools.partial(read, tensor)) for name, tensor in tensors.items()}


def _reason(error: Exception) -> str:
    """The one sentence of torch's pages of advice that says what was found."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "nsupported" in line or "Error" in line]
    return telling[0] if telling else f"{type(error).__name__} {' '.join(lines[:1])}".strip()
