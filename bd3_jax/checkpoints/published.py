"""Files that others published: a hub id, a folder, a .safetensors or a Lightning .ckpt -> their settings and tensors.

Nothing in a file is executed: safetensors holds numbers only, and a .ckpt is read with `torch.load(weights_only=True)`.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from bd3_jax.checkpoints.pytorch import IGNORED, INTERVAL, PREFIX, order
from bd3_jax.errors import UserError

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What their config.json says of the model, in our terms.

    Attributes:
      objective: ar, mdlm, sedd or bd3lm.
      block_size: 1 for ar, L for mdlm and sedd.
      length: L, the training context.
      vocab_size: V, the mask token included.
      schedule: of losses and likelihoods; scaled_loglinear for the models of Sahoo et al. and Lou et al.
      ignore_bos: whether position 0 is never masked; not so in those older models.
    """

    objective: str
    block_size: int
    length: int
    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    cond_dim: int
    dropout: float
    adaln: bool
    time_conditioned: bool
    schedule: str
    ignore_bos: bool
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Published:
    """An opened checkpoint; tensors are read one at a time, when asked for."""

    source: str
    architecture: Architecture
    tensors: Mapping[str, np.ndarray]


def open_published(source: str, revision: str | None = None, token: str | bool | None = None) -> Published:
    """Opens a local path, or downloads a hub id into the hub's cache.

    Args:
      source: a folder with config.json and model.safetensors (or one .ckpt); such a file with config.json beside it;
        or a hub id as in `kuleshov-group/bd3lm-owt-block_size4`.
      revision: branch, tag or commit of a hub id.
      token: the hub's access token.

    Raises:
      UserError: nothing is there, or it cannot be read safely.
    """
    path = epath.Path(source)
    if not path.exists():
        path = _download(source, revision, token)
    weights = _weights(path) if path.is_dir() else path
    config_file = weights.parent / CONFIG
    if not config_file.exists():
        raise UserError(f"{config_file} does not exist; it must lie beside {weights.name} and describe the model")
    try:
        config = json.loads(config_file.read_text())
    except ValueError as error:
        raise UserError(f"{config_file} is not JSON: {error}") from None
    tensors = _open_tensors(weights)
    return Published(source, read_architecture(config, tensors, str(config_file)), tensors)


def _weights(folder: epath.Path) -> epath.Path:
    if (folder / WEIGHTS).exists():
        return folder / WEIGHTS
    found = sorted([*folder.glob("*.safetensors"), *folder.glob("*.ckpt")])
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(f"{folder} must hold {WEIGHTS}, or one .safetensors or .ckpt file; found {names}")
    return found[0]


def _download(source: str, revision: str | None, token: str | bool | None) -> epath.Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise UserError(f"{source!r} does not exist here and is no hub id; allowed: a path, or OWNER/NAME")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = huggingface_hub.snapshot_download(
            source, revision=revision, token=token, allow_patterns=[CONFIG, WEIGHTS]
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{source!r} could not be taken from the hub ({reason}); download its {CONFIG} and {WEIGHTS} into a folder "
            "and give that folder"
        ) from None
    return epath.Path(folder)


def _open_tensors(path: epath.Path) -> Mapping[str, np.ndarray]:
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix == ".ckpt":
        return _read_lightning(path)
    raise UserError(f"{path} is neither .safetensors nor .ckpt")


class SafetensorsFile(Mapping[str, np.ndarray]):
    """Names -> float32 arrays, read from disk one by one."""

    def __init__(self, path: epath.Path):
        from safetensors import SafetensorError, safe_open

        self._path = path
        try:
            self._file = safe_open(str(path), framework="numpy")
            self._names = list(self._file.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is no readable safetensors file: {error}") from None

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        try:
            tensor = self._file.get_tensor(name)
        except Exception as error:  # dtypes that numpy lacks surface in several ways
            raise UserError(f"{self._path}: tensor {name} cannot be read: {error}") from None
        # Not np.issubdtype: bfloat16 is no numpy float.
        if tensor.dtype.kind in "iub":
            raise UserError(f"{self._path}: tensor {name} has dtype {tensor.dtype}, expected a float")
        return tensor.astype(np.float32, copy=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _read_lightning(path: epath.Path) -> dict[str, np.ndarray]:
    """The EMA weights of a Lightning checkpoint, or the raw ones where it holds no EMA."""
    try:
        import torch
    except ImportError:
        raise UserError(f"{path}: reading a .ckpt needs PyTorch: pip install 'bd3_jax[torch]'") from None
    try:
        # mmap: the optimiser's moments in the file are never read.
        content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises its own, pickle's and zip's errors
        raise UserError(
            f"{path} is no .ckpt of tensors alone and is not opened further, since that could run code: "
            f"{str(error).splitlines()[0]}"
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"{path} is no Lightning checkpoint: it holds no 'state_dict'")
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in content["state_dict"].items()}
    tensors = {name: tensor for name, tensor in state.items() if name.startswith(PREFIX) or name in INTERVAL}
    shadow = content.get("ema", {}).get("shadow_params") if isinstance(content.get("ema"), dict) else None
    if shadow is not None:
        names = order(name for name in tensors if name not in INTERVAL and name.removeprefix(PREFIX) not in IGNORED)
        if len(shadow) != len(names):
            raise UserError(f"{path}: ema.shadow_params holds {len(shadow)} tensors, the model {len(names)}")
        tensors |= dict(zip(names, shadow, strict=True))
    return {name: tensor.detach().float().numpy() for name, tensor in tensors.items()}


def read_architecture(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], where: str) -> Architecture:
    """Their config.json in our terms. The interval in the tensors wins over the one in the file.

    Raises:
      UserError: naming a key that is missing, of the wrong type or contradicts another.
    """
    if isinstance(config.get("model"), Mapping):
        return _read_lou(config, where)

    def get(key: str, kind: type, default: Any = None) -> Any:
        value = config.get(key, default)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            found = "missing" if value is None else f"{value!r}"
            raise UserError(f"{where}: {key} is {found}; expected a value of type {kind.__name__}")
        return value

    length = get("model_length", int)
    # mdlm-owt was published before the other keys existed, with its older noise.
    older = "cross_attn" not in config and "causal" not in config
    causal, adaln = get("causal", bool, False), get("adaln", bool, True)
    cross, timed = get("cross_attn", bool, False), get("time_conditioning", bool)
    if causal and not adaln:
        objective = "ar"
    elif cross:
        objective = "bd3lm"
    else:
        objective = "sedd" if timed else "mdlm"
    block_size = {"ar": 1, "mdlm": length, "sedd": length}.get(objective) or get("block_size", int)
    if block_size < 1 or length % block_size:
        raise UserError(f"{where}: block_size is {block_size}; expected a divisor of model_length = {length}")
    low, high = (
        # Through str: the nearest float32 to 0.001 lies above it and would no longer count as the unclipped bound.
        float(str(np.float32(tensors[name]))) if name in tensors else get(name, float, default)
        for name, default in zip(INTERVAL, (1e-3, 1.0), strict=True)
    )
    return Architecture(
        objective=objective,
        block_size=block_size,
        length=length,
        vocab_size=get("vocab_size", int),
        width=get("hidden_dim", int),
        num_layers=get("n_blocks", int),
        num_heads=get("n_heads", int),
        cond_dim=get("cond_dim", int),
        dropout=get("dropout", float),
        adaln=adaln,
        time_conditioned=timed,
        schedule="scaled_loglinear" if older else "loglinear",
        ignore_bos=not older,
        low=low,
        high=high,
    )


def _read_lou(config: Mapping[str, Any], where: str) -> Architecture:
    """`louaaron/sedd-*`: sizes under `model`, and `tokens` without the mask."""
    model, graph = config["model"], config.get("graph", {})
    if isinstance(graph, Mapping) and graph.get("type", "absorb") != "absorb":
        raise UserError(f"{where}: graph.type is {graph['type']!r}; only the absorbing SEDD is supported")
    keys = {"hidden_size": "model", "n_blocks": "model", "n_heads": "model", "cond_dim": "model", "length": "model"}
    for key in (*keys, "tokens"):
        value = config.get(key) if key == "tokens" else model.get(key)
        if type(value) is not int:
            raise UserError(f"{where}: {keys.get(key, '')}.{key} is {value!r}; expected an int".replace(": .", ": "))
    return Architecture(
        objective="sedd",
        block_size=model["length"],
        length=model["length"],
        vocab_size=config["tokens"] + 1,
        width=model["hidden_size"],
        num_layers=model["n_blocks"],
        num_heads=model["n_heads"],
        cond_dim=model["cond_dim"],
        dropout=float(model.get("dropout", 0.1)),
        adaln=True,
        time_conditioned=True,
        schedule="scaled_loglinear",
        ignore_bos=False,
        low=1e-3,
        high=1.0,
    )
