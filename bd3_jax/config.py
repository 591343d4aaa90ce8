"""The settings' types: frozen dataclasses. Values and their meaning stand in `configs/base.py`, one comment a field.

`config_dict.py` makes them, and has the rules that tie fields together.
"""

import dataclasses
from typing import Any, Literal

Objective = Literal["ar", "mdlm", "sedd", "bd3lm"]
ScheduleName = Literal["loglinear", "square", "square_root", "log", "cosine", "scaled_loglinear"]
Estimator = Literal["monte_carlo", "low_variance", "left_to_right", "most_confident"]
SamplerName = Literal[
    "first_hitting", "ancestral", "confidence", "threshold", "entropy_bounded", "remasking",
    "analytic", "autoregressive",
]  # fmt: skip

EPS = 1e-3
"""The smallest time that is drawn, and the smallest survival probability: where an interval of noise begins."""

# Which samplers can draw from which model: SUBS models predict x0, SEDD a ratio, AR the next token.
_OF_MASKED_MODELS = ("first_hitting", "ancestral", "confidence", "threshold", "entropy_bounded", "remasking")
SAMPLERS: dict[str, tuple[str, ...]] = {
    "ar": ("autoregressive",),
    "mdlm": _OF_MASKED_MODELS,
    "bd3lm": _OF_MASKED_MODELS,
    "sedd": ("analytic",),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    length: int
    width: int
    num_layers: int
    num_heads: int
    cond_dim: int
    dropout: float
    dtype: Literal["auto", "float32", "bfloat16"]
    attention: Literal["auto", "dense", "decomposed", "splash", "flash", "triton"]
    attention_chunk: int
    scan_unroll: int
    remat: Literal["none", "block", "full"]
    max_logits: int


@dataclasses.dataclass(frozen=True)
class NoiseConfig:
    schedule: ScheduleName
    low: float
    high: float
    resample: bool
    ignore_bos: bool


@dataclasses.dataclass(frozen=True)
class DataConfig:
    mode: Literal["prepared", "streaming"]
    corpus: str
    source: str
    field: str
    directory: str
    tokenizer: str
    vocab_size: int
    insert_special: bool
    insert_eos: bool


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip_norm: float
    warmup_steps: int
    decay: Literal["constant", "cosine"]
    ema_decay: float


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    num_steps: int
    batch_size: int
    microbatches: int
    noise_copies: int
    max_skipped: int
    log_every: int
    eval_every: int
    sample_every: int
    checkpoint_every: int
    keep_checkpoints: int
    keep_every: int
    keep_best: int
    sigterm_status: int
    wandb_project: str


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    enabled: bool
    widths: tuple[float, ...]
    num_batches: int
    batch_size: int


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    split: str
    batch_size: int
    num_batches: int
    estimator: Estimator
    without_special: Literal["never", "training", "always"]
    both_estimators: bool
    seed: int
    weights: Literal["ema", "raw"]


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    sampler: SamplerName
    num_samples: int
    batch_size: int
    prompt: str
    infill: str
    max_length: int
    num_steps: int
    tokens_per_step: int
    threshold: float
    entropy_bound: float
    remasking: float
    nucleus: float
    top_k: int
    temperature: float
    variable_length: bool
    min_entropy: float
    kv_cache: bool
    seed: int
    weights: Literal["ema", "raw"]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int
    fsdp: int
    tensor: int


@dataclasses.dataclass(frozen=True)
class Config:
    objective: Objective
    block_size: int
    init_from: str
    seed: int
    profile_steps: int
    model: ModelConfig
    noise: NoiseConfig
    data: DataConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    search: SearchConfig
    eval: EvalConfig
    sampling: SamplingConfig
    mesh: MeshConfig

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def lies_within(fraction: Any, low: Any, high: Any) -> Any:
    """Whether the masked fraction of a block lies in the clipped interval [low, high]; for numbers and arrays alike.

    The bounds are inclusive, and k/B rounds in float32, hence the slack. At its end, EPS or 1, a bound is waived.
    """
    slack = 1e-6
    return ((fraction >= low - slack) | (low <= EPS)) & ((fraction <= high + slack) | (high >= 1))


def can_clip(block_size: int, low: float, high: float) -> bool:
    """Whether [low, high] holds k/B for some number k of masked tokens."""
    return any(lies_within(k / block_size, low, high) for k in range(block_size + 1))
