"""The authors' checkpoints as files, read and written: config.json with model.safetensors or a Lightning .ckpt."""

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from etils import epath

from bd3_jax.checkpoints import tensor_files
from bd3_jax.checkpoints.architecture import Architecture, config_json, read_architecture
from bd3_jax.checkpoints.pytorch import INTERVAL, INVERSE_FREQUENCIES, PREFIX, Stored, to_tensors
from bd3_jax.errors import UserError
from bd3_jax.folders import in_bucket

WEIGHTS, CONFIG = "model.safetensors", "config.json"
TOKENIZER = "tokenizer.json"
"""Beside them in what we export; the authors' own checkpoints come without."""


@dataclasses.dataclass(frozen=True)
class Published:
    """An opened checkpoint; tensors are read when asked for."""

    architecture: Architecture
    tensors: Mapping[str, Stored]


def open_published(path: epath.Path, weights: Literal["ema", "raw"] = "ema") -> Published:
    """Opens a checkpoint of the authors.

    Args:
      path: a folder with config.json and model.safetensors (or one .safetensors or .ckpt of any name), or such a file
        with config.json beside it.
      weights: see `tensor_files.open_tensors`.

    Raises:
      UserError: it is in a bucket, incomplete, damaged or contradicts itself, or cannot be read without executing it.
    """
    if in_bucket(path):
        raise UserError(
            f"{path} is in a bucket; allowed: the authors' layout in a local folder, into which it is copied"
        )
    file = _weights(path) if path.is_dir() else path
    config_file = file.parent / CONFIG
    if not config_file.exists():
        raise UserError(f"{config_file} does not exist; it must lie beside {file.name} and describe the model")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{config_file} cannot be read as JSON: {error}") from None
    tensors = tensor_files.open_tensors(file, weights)
    return Published(read_architecture(config, tensors, str(config_file)), tensors)


def download(source: str, revision: str | None = None, token: str | bool | None = None) -> epath.Path:
    """The folder of a hub id, in the hub's cache; a progress bar shows what is still to come.

    Args:
      source: as in `kuleshov-group/bd3lm-owt-block_size4`.
      revision: branch, tag or commit.
      token: the hub's access token.

    Raises:
      UserError: it is no hub id, or the hub does not give it.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise UserError(f"{source!r} does not exist here and is no hub id; allowed: a path, or OWNER/NAME")
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            source, revision=revision, token=token, allow_patterns=[CONFIG, WEIGHTS, TOKENIZER]
        )
    except Exception as error:  # the library's errors have no base class in common
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{source!r} is no path here and could not be taken from the Hugging Face hub ({reason}); download its "
            f"{CONFIG}, {WEIGHTS} and, if it has one, {TOKENIZER} into a folder and give that folder"
        ) from None
    return epath.Path(folder)


def _weights(folder: epath.Path) -> epath.Path:
    if (folder / WEIGHTS).exists():
        return folder / WEIGHTS
    kinds = (tensor_files.SAFETENSORS, tensor_files.LIGHTNING)
    found = sorted(path for path in folder.iterdir() if path.suffix in kinds)
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(f"{folder} must hold {WEIGHTS}, or one .safetensors or .ckpt file; found {names}")
    return found[0]


def write_published(folder: epath.Path, architecture: Architecture, params: Any) -> None:
    """Writes config.json and model.safetensors as the authors do; `folder` exists."""
    from safetensors.numpy import save_file

    tensors = to_tensors(params)
    # Rounded at every step, as the authors' float32 arithmetic rounds.
    exponents = np.arange(0, _head_dim(architecture), 2).astype(np.float32) / np.float32(_head_dim(architecture))
    tensors[PREFIX + INVERSE_FREQUENCIES] = np.float32(1) / (10000.0 ** exponents.astype(np.float64)).astype(np.float32)
    if architecture.searched:
        tensors |= {
            name: np.asarray(value, np.float32)
            for name, value in zip(INTERVAL, (architecture.low, architecture.high), strict=True)
        }
    save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config_json(architecture), indent=2) + "\n", encoding="utf-8")
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors lets nobody else read its files


def _head_dim(architecture: Architecture) -> int:
    return architecture.width // architecture.num_heads
