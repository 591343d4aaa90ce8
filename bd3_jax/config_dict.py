"""ConfigDict -> `Config`. An unknown or impossible setting fails here, by name; nothing behind it sees a ConfigDict."""

import dataclasses
import difflib
import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args, get_origin

import ml_collections

from bd3_jax.config import EPS, SAMPLERS, Config, can_clip
from bd3_jax.errors import UserError, require_text

T = TypeVar("T")


def from_config_dict(config: ml_collections.ConfigDict) -> Config:
    """Checks every field's name, type and range.

    Raises:
      UserError: naming the first setting that is missing, unknown, of the wrong type or impossible.
    """
    settings = config.to_dict()
    if "objective" in settings and "block_size" in settings and isinstance(settings.get("model"), dict):
        settings["block_size"] = _block_size(settings)
    resolved = _build(Config, settings, "config")
    _check(resolved)
    return resolved


def unknown(name: str, allowed: list[str], path: str) -> UserError:
    """The error for `name`, which is none of the `allowed` settings of the group `path`."""
    near = difflib.get_close_matches(name, allowed, n=1)
    hint = f"did you mean {path}.{near[0]}?" if near else f"allowed: {', '.join(allowed)}"
    return UserError(f"unknown setting {path}.{name}; {hint}")


def _block_size(settings: dict[str, Any]) -> Any:
    """0 stands for the only block size an objective has: 1 for AR, L for MDLM and SEDD."""
    own = {"ar": 1, "mdlm": settings["model"].get("length"), "sedd": settings["model"].get("length")}
    block_size, objective = settings["block_size"], settings["objective"]
    return own.get(objective, 0) if isinstance(objective, str) and block_size == 0 else block_size


def _build(cls: type[T], settings: dict[str, Any], path: str) -> T:
    fields = {field.name: field.type for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in settings:
        if name not in fields:
            raise unknown(name, list(fields), path)
    for name in fields:
        if name not in settings:
            raise UserError(f"missing setting {path}.{name}")
    return cls(**{name: _convert(kind, settings[name], f"{path}.{name}") for name, kind in fields.items()})


def _convert(kind: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"{path} must be a group of settings, found {value!r}")
        return _build(kind, value, path)  # type: ignore[arg-type]
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise UserError(f"{path} must be one of {', '.join(get_args(kind))}; found {value!r}")
        return value
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple | list) or not value:  # a list, where it comes from JSON
            raise UserError(f"{path} must be a tuple of {get_args(kind)[0].__name__} values, found {value!r}")
        return tuple(_convert(get_args(kind)[0], item, path) for item in value)
    if kind is float and type(value) is int and abs(value) < 2**63:
        return float(value)
    if type(value) is not kind:
        raise UserError(f"{path} must be of type {kind.__name__}, found {value!r}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{path} must be finite, found {value!r}")
    if kind is int and not path.endswith("seed") and abs(value) >= 2**31:
        raise UserError(f"{path} is {value}; allowed: integers up to 2**31 - 1")
    if kind is str:
        require_text(value, path)
    return value


def _check(c: Config) -> None:
    def require(ok: bool, path: str, value: Any, allowed: str) -> None:
        if not ok:
            raise UserError(f"config.{path} is {value!r}; allowed: {allowed}")

    def at_least(low: int, path: str) -> None:
        group, name = path.split(".")
        value = getattr(getattr(c, group), name)
        require(value >= low, path, value, f"{low} or more")

    def fraction(path: str) -> None:
        group, name = path.split(".")
        value = getattr(getattr(c, group), name)
        require(0 <= value < 1, path, value, "0 <= x < 1")

    for path, seed in (("seed", c.seed), ("eval.seed", c.eval.seed), ("sampling.seed", c.sampling.seed)):
        require(0 <= seed < 2**32, path, seed, "0 <= seed < 2**32")

    m, n, length = c.model, c.noise, c.model.length
    at_least(2, "model.length")  # of one token, either BOS or left without a target, nothing can be learnt
    for path in ("model.width", "model.num_layers", "model.num_heads", "model.cond_dim"):
        at_least(1, path)
    at_least(0, "model.attention_chunk")
    at_least(0, "model.scan_unroll")
    at_least(0, "model.max_logits")
    require(m.width % m.num_heads == 0, "model.num_heads", m.num_heads, f"a divisor of model.width = {m.width}")
    require(m.width // m.num_heads % 2 == 0, "model.num_heads", m.num_heads, "an even width per head (rotary pairs)")
    # Rates are rounded to 1/65,536, and what is left is scaled up by 1 / (1 - rate).
    require(0 <= m.dropout <= 0.99, "model.dropout", m.dropout, "0 to 0.99")

    if c.objective == "bd3lm":
        divides = c.block_size >= 1 and length % c.block_size == 0
        require(divides, "block_size", c.block_size, f"a divisor of model.length = {length}")
    else:
        only = 1 if c.objective == "ar" else length
        require(c.block_size == only, "block_size", c.block_size, f"{only} (or 0) for objective {c.objective}")

    require(0 < n.low <= n.high <= 1, "noise.low, noise.high", (n.low, n.high), "0 < low <= high <= 1")
    weighted = c.objective != "sedd" or n.low <= 0.5  # above it the loss weight is 1, which is for the others
    require(weighted, "noise.low", n.low, "up to 0.5 for objective sedd")
    if n.resample:
        holds = f"a range that holds k/{c.block_size} for some k"
        require(can_clip(c.block_size, n.low, n.high), "noise.low, noise.high", (n.low, n.high), holds)
    if n.schedule != "loglinear":
        full = n.low <= EPS and n.high == 1
        require(full, "noise.schedule", n.schedule, "loglinear where noise.low or noise.high clips the interval")

    require(c.data.vocab_size > 0, "data.vocab_size", c.data.vocab_size, "1 or more")
    require(c.data.corpus != "", "data.corpus", c.data.corpus, "the name of a corpus")
    require(c.data.directory != "", "data.directory", c.data.directory, "a folder")
    require(c.eval.split != "", "eval.split", c.eval.split, "the name of a split")

    o = c.optimizer
    require(o.learning_rate > 0, "optimizer.learning_rate", o.learning_rate, "above 0")
    require(o.eps > 0, "optimizer.eps", o.eps, "above 0")
    require(o.weight_decay >= 0, "optimizer.weight_decay", o.weight_decay, "0 or more")
    require(o.clip_norm > 0, "optimizer.clip_norm", o.clip_norm, "above 0")
    for path in ("optimizer.beta1", "optimizer.beta2", "optimizer.ema_decay"):
        fraction(path)
    at_least(0, "optimizer.warmup_steps")

    _check_training(c, require, at_least)

    at_least(1, "eval.batch_size")
    at_least(0, "eval.num_batches")
    if c.objective != "ar" and c.eval.estimator != "monte_carlo":
        # It needs a network that is not conditioned on time; the mean of low_variance is the loglinear schedule's.
        masked = c.objective in ("mdlm", "bd3lm")
        require(masked, "eval.estimator", c.eval.estimator, f"monte_carlo for objective {c.objective}")
        plain = n.schedule != "scaled_loglinear" or c.eval.estimator != "low_variance"
        require(plain, "eval.estimator", c.eval.estimator, f"monte_carlo with noise.schedule {n.schedule}")

    s = c.sampling
    allowed = SAMPLERS[c.objective]
    require(s.sampler in allowed, "sampling.sampler", s.sampler, f"{', '.join(allowed)} for objective {c.objective}")
    for name in ("num_samples", "batch_size", "num_steps", "tokens_per_step"):
        at_least(1, f"sampling.{name}")
    at_least(2, "sampling.max_length")
    _check_batches(c, require)
    require(0 < s.nucleus <= 1, "sampling.nucleus", s.nucleus, "0 < P <= 1")
    fillable = c.objective != "ar" or not s.infill
    require(fillable, "sampling.infill", s.infill, "empty for objective ar, which cannot see what follows a gap")
    require(0 <= s.threshold <= 1, "sampling.threshold", s.threshold, "0 to 1")
    require(s.entropy_bound >= 0, "sampling.entropy_bound", s.entropy_bound, "0 or more")
    require(0 <= s.remasking <= 1, "sampling.remasking", s.remasking, "0 to 1")
    at_least(0, "sampling.top_k")
    untruncated = c.objective != "sedd" or s.top_k == 0
    require(untruncated, "sampling.top_k", s.top_k, "0 for objective sedd, whose scores are ratios of probabilities")
    auto = s.min_entropy == -1 or s.min_entropy >= 0
    require(auto, "sampling.min_entropy", s.min_entropy, "0 or more, or -1 for the tokenizer's own")
    require(s.temperature >= 1e-3, "sampling.temperature", s.temperature, "1e-3 or more")

    for name in ("fsdp", "tensor"):
        at_least(1, f"mesh.{name}")
    require(c.mesh.data == -1 or c.mesh.data >= 1, "mesh.data", c.mesh.data, "1 or more, or -1 for all other devices")


def _check_training(c: Config, require: Callable[..., None], at_least: Callable[[int, str], None]) -> None:
    t, s = c.training, c.search
    for name in (
        "num_steps", "batch_size", "microbatches", "noise_copies", "max_skipped",
        "log_every", "eval_every", "checkpoint_every", "keep_checkpoints",
    ):  # fmt: skip
        at_least(1, f"training.{name}")
    for name in ("sample_every", "keep_every", "keep_best"):
        at_least(0, f"training.{name}")
    saved = t.keep_every % max(t.checkpoint_every, 1) == 0
    require(
        saved, "training.keep_every", t.keep_every, f"a multiple of training.checkpoint_every = {t.checkpoint_every}"
    )
    divides = t.batch_size % t.microbatches == 0
    require(divides, "training.microbatches", t.microbatches, f"a divisor of training.batch_size = {t.batch_size}")
    # Elsewhere there is no clean half, and rows of their own are worth more than copies.
    shares = t.noise_copies == 1 or (c.objective == "bd3lm" and c.block_size < c.model.length)
    allowed = f"1 for objective {c.objective}" if c.objective != "bd3lm" else "1 where a block is the whole row"
    require(shares, "training.noise_copies", t.noise_copies, allowed)
    require(0 <= t.sigterm_status < 256, "training.sigterm_status", t.sigterm_status, "0 to 255")
    require(c.profile_steps >= 0, "profile_steps", c.profile_steps, "0 or more")

    at_least(1, "search.num_batches")
    at_least(1, "search.batch_size")
    blocks = s.batch_size * (c.model.length // max(c.block_size, 1))
    varies = not s.enabled or blocks > 1
    require(varies, "search.batch_size", s.batch_size, "2 or more where a row is one block, whose variance is searched")
    for width in s.widths:
        require(0 < width < 1, "search.widths", s.widths, "0 < width < 1")
    if s.enabled:
        require(c.objective in ("mdlm", "bd3lm"), "search.enabled", True, f"False for objective {c.objective}")
        plain = c.noise.schedule == "loglinear"
        require(plain, "search.enabled", True, f"False with noise.schedule {c.noise.schedule}")
        if c.noise.resample and c.block_size > 1:
            # So that every interval of that width holds k/B for some k.
            require(min(s.widths) >= 1 / c.block_size, "search.widths", s.widths, f"1/{c.block_size} or more")


def _check_batches(c: Config, require: Callable[..., None]) -> None:
    """A slip of the finger would else end in the system's killing a program that fills the memory, without a word."""
    for path, size in (
        (
            "training.batch_size, training.noise_copies, model.length",
            (c.training.batch_size, c.training.noise_copies, c.model.length),
        ),
        ("search.batch_size, model.length", (c.search.batch_size, c.model.length)),
        ("eval.batch_size, model.length", (c.eval.batch_size, c.model.length)),
        ("sampling.batch_size, sampling.max_length", (c.sampling.batch_size, c.sampling.max_length)),
    ):
        require(math.prod(size) <= 2**28, path, size, "up to 2**28 tokens a batch")
