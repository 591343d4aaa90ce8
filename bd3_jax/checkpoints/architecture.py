"""What a checkpoint is a model of, in our terms and in those of the authors' config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from bd3_jax.checkpoints.pytorch import INTERVAL, Stored
from bd3_jax.config import Config, NoiseConfig, can_clip
from bd3_jax.config_dict import from_config_dict
from bd3_jax.errors import UserError
from bd3_jax.special_ids import SpecialIds

# Keys that the checkpoints of Sahoo et al. and Lou et al. lack. They go with their noise: scaled_loglinear, and
# position 0 masked like any other.
_LATER_KEYS = ("block_size", "cross_attn", "adaln", "causal", "var_min")

# BOS, EOS and mask, under the names that transformers has for them; in what we export, but not in the authors' files.
_IDS = ("bos_token_id", "eos_token_id", "mask_token_id")

# `noise.schedule` and `noise.ignore_bos`; in what we export, where the other keys would be read as another noise.
_NOISE = ("noise_schedule", "ignore_bos")

# V -> the tokenizer that published models of that V were trained with, and its ids.
TOKENIZERS = {50258: "gpt2", 30522: "bert-base-uncased"}
USUAL_IDS = {
    50258: SpecialIds(bos=50256, eos=50256, mask=50257, vocab_size=50258),
    30522: SpecialIds(bos=101, eos=101, mask=103, vocab_size=30522),
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a checkpoint is a model of.

    Attributes:
      objective: ar, mdlm, sedd or bd3lm.
      block_size: 1 for ar, L for mdlm and sedd.
      length: L, the training context.
      vocab_size: V, the mask token included.
      adaln: False for ar.
      time_conditioned: whether the network is fed sigma(t), as sedd is, or 0.
      schedule: of losses and likelihoods; where config.json does not say it, loglinear, and scaled_loglinear for the
        models of Sahoo et al. and Lou et al.
      ignore_bos: whether position 0 is never masked; where config.json does not say it, not so in those older models.
      low: t ~ U[low, high] in training.
      high: see `low`.
      var_min: config.json's word for training in a searched interval.
      searched: whether the interval lies among the tensors.
      ids: BOS, EOS and mask, as far as the source says them itself; None: its tokenizer does.
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
    var_min: bool
    searched: bool
    ids: SpecialIds | None

    @classmethod
    def of(cls, config: Config, vocab_size: int, low: float, high: float) -> "Architecture":
        """Of one of our own runs; `low` and `high` are those of its checkpoint."""
        m, searched = config.model, config.noise.resample
        return cls(
            objective=config.objective, block_size=config.block_size, length=m.length, vocab_size=vocab_size,
            width=m.width, num_layers=m.num_layers, num_heads=m.num_heads, cond_dim=m.cond_dim, dropout=m.dropout,
            adaln=config.objective != "ar", time_conditioned=config.objective == "sedd",
            schedule=config.noise.schedule, ignore_bos=config.noise.ignore_bos,
            low=low, high=high, var_min=searched, searched=searched, ids=None,
        )  # fmt: skip

    def to_config(self) -> Config:
        """Complete settings: the base config with this architecture, for evaluation and sampling.

        Raises:
          UserError: naming the setting that makes the architecture impossible.
        """
        from bd3_jax.configs import base

        config: ConfigDict = base.get_config("bd3lm,block_size=1" if self.objective == "bd3lm" else self.objective)
        config.block_size = self.block_size
        config.model.update(
            length=self.length, width=self.width, num_layers=self.num_layers, num_heads=self.num_heads,
            cond_dim=self.cond_dim, dropout=self.dropout,
        )  # fmt: skip
        resample = self.searched and can_clip(self.block_size, self.low, self.high)
        config.noise = dataclasses.asdict(
            NoiseConfig(self.schedule, self.low, self.high, resample, self.ignore_bos)  # type: ignore[arg-type]
        )
        config.data.update(corpus="openwebtext", directory="data/openwebtext")
        config.data.tokenizer = TOKENIZERS.get(self.vocab_size, config.data.tokenizer)
        config.sampling.max_length = self.length
        return from_config_dict(config)


def read_architecture(config: Any, tensors: Mapping[str, Stored], where: str) -> Architecture:
    """Their config.json in our terms. The interval in the tensors wins over the one in the file.

    Args:
      config: the parsed file.
      tensors: of the same checkpoint.
      where: names the file in errors.

    Raises:
      UserError: naming a key that is missing, of the wrong type, impossible or contradicted.
    """
    if not isinstance(config, dict):
        raise UserError(f"{where} must hold an object of settings, found {type(config).__name__}")
    if isinstance(config.get("model"), dict):
        config = _in_later_terms(config, where)
    low, high = _interval(config, tensors, where)

    def get(key: str, kind: type, default: Any = None) -> Any:
        return _get(config, key, kind, where, default)

    length, layers = get("model_length", int), get("n_blocks", int)
    older = "cross_attn" not in config and "causal" not in config
    causal, adaln = get("causal", bool, False), get("adaln", bool, True)
    cross, timed = get("cross_attn", bool, False), get("time_conditioning", bool)
    if causal == adaln or (causal and cross):
        raise UserError(
            f"{where}: causal, adaln, cross_attn are {causal}, {adaln}, {cross}; expected True, False, False of an "
            "autoregressive model, and False, True and either of all others"
        )
    if layers > len(tensors):
        raise UserError(f"{where}: n_blocks is {layers}, but there are {len(tensors)} tensors in all")
    objective = "ar" if causal else "bd3lm" if cross else "sedd" if timed else "mdlm"
    if objective == "bd3lm":
        block_size = get("block_size", int)
    else:
        block_size = 1 if causal else length
    architecture = Architecture(
        objective=objective,
        block_size=block_size,
        length=length,
        vocab_size=get("vocab_size", int),
        width=get("hidden_dim", int),
        num_layers=layers,
        num_heads=get("n_heads", int),
        cond_dim=get("cond_dim", int),
        dropout=get("dropout", float),
        adaln=adaln,
        time_conditioned=timed,
        schedule=get(_NOISE[0], str, "scaled_loglinear" if older else "loglinear"),
        ignore_bos=get(_NOISE[1], bool, not older),
        low=low,
        high=high,
        var_min=get("var_min", bool, False),
        searched=any(name in tensors for name in INTERVAL),
        ids=_ids(config, where),
    )
    if architecture.vocab_size < 2:
        raise UserError(f"{where}: vocab_size is {architecture.vocab_size}; expected 2 or more, the mask included")
    try:
        architecture.to_config()
    except UserError as error:
        raise UserError(f"{where} describes no possible model: {error}") from None
    return architecture


def _get(config: Mapping[str, Any], key: str, kind: type, where: str, default: Any = None) -> Any:
    value = config.get(key, default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        found = "missing" if key not in config else f"{value!r}"
        raise UserError(f"{where}: {key} is {found}; expected a value of type {kind.__name__}")
    return value


def _ids(config: Mapping[str, Any], where: str) -> SpecialIds | None:
    if "mask_token_id" not in config:
        return None
    vocab_size = _get(config, "vocab_size", int, where)
    bos, eos, mask = found = [_get(config, name, int, where) for name in _IDS]
    if not all(0 <= id < vocab_size for id in found) or mask in (bos, eos):
        raise UserError(
            f"{where}: {', '.join(_IDS)} are {bos}, {eos}, {mask}; expected ids from 0 to {vocab_size - 1}, and the "
            "mask's its own"
        )
    return SpecialIds(bos, eos, mask, vocab_size)


def _interval(config: Mapping[str, Any], tensors: Mapping[str, Stored], where: str) -> tuple[float, float]:
    values = []
    for name, default in zip(INTERVAL, (1e-3, 1.0), strict=True):
        if name in tensors:
            if int(np.prod(tensors[name].shape)) != 1:
                raise UserError(f"{where}: tensor {name} has shape {tensors[name].shape}, expected a scalar")
            # Through str: the nearest float32 to 0.001 lies above it and would no longer count as the unclipped bound.
            values.append(float(str(np.asarray(tensors[name]).reshape(()).astype(np.float32)[()])))
        else:
            values.append(_get(config, name, float, where, default))
    low, high = values
    if not 0 < low <= high <= 1:
        raise UserError(f"{where}: {', '.join(INTERVAL)} are {low}, {high}; expected 0 < min <= max <= 1")
    return low, high


def _in_later_terms(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The config.json of `louaaron/sedd-*`: sizes under `model`, and `tokens` without the mask."""
    model, graph = config["model"], config.get("graph")
    if isinstance(graph, dict) and graph.get("type", "absorb") != "absorb":
        raise UserError(f"{where}: graph.type is {graph['type']!r}; only the absorbing SEDD is supported")
    if model.get("scale_by_sigma", True) is not True:
        raise UserError(f"{where}: model.scale_by_sigma is {model['scale_by_sigma']!r}; only true is supported")
    return {
        "model_length": _get(model, "length", int, f"{where}, model"),
        "vocab_size": _get(config, "tokens", int, where) + 1,
        "hidden_dim": _get(model, "hidden_size", int, f"{where}, model"),
        "n_blocks": _get(model, "n_blocks", int, f"{where}, model"),
        "n_heads": _get(model, "n_heads", int, f"{where}, model"),
        "cond_dim": _get(model, "cond_dim", int, f"{where}, model"),
        "dropout": _get(model, "dropout", float, f"{where}, model", 0.1),
        "time_conditioning": True,
    }


def config_json(architecture: Architecture) -> dict[str, Any]:
    """Their config.json, of which `read_architecture` makes the same architecture again."""
    a = architecture
    noise = (a.schedule, a.ignore_bos)
    older = noise == ("scaled_loglinear", False) and a.objective in ("mdlm", "sedd") and not a.var_min
    content = {
        "model_type": "mdlm" if older else "bd3lm",
        "architectures": ["MDLM" if older else "BD3LM"],
        "block_size": a.block_size,
        "vocab_size": a.vocab_size,
        "model_length": a.length,
        "cross_attn": a.objective == "bd3lm",
        "adaln": a.adaln,
        "attn_backend": "sdpa",
        "causal": a.objective == "ar",
        "hidden_dim": a.width,
        "cond_dim": a.cond_dim,
        "n_blocks": a.num_layers,
        "n_heads": a.num_heads,
        "dropout": a.dropout,
        "time_conditioning": a.time_conditioned,
        "var_min": a.var_min,
        "sampling_eps_min": a.low,
        "sampling_eps_max": a.high,
        "torch_dtype": "float32",
    }
    if a.ids is not None:
        content |= zip(_IDS, (a.ids.bos, a.ids.eos, a.ids.mask), strict=True)
    if not older and noise != ("loglinear", True):
        content |= zip(_NOISE, noise, strict=True)
    return {key: value for key, value in content.items() if not (older and key in _LATER_KEYS)}
