"""What 'auto' and 0 stand for in a model's settings: the one place that decides by platform."""

import dataclasses

from bd3_jax.config import ModelConfig
from bd3_jax.models import triton
from bd3_jax.models.tiles import LANES

CHUNKS = {"flash": 512, "splash": 512, "triton": 64}
"""Tiles of the kernels; see triton.py for its."""


def settle(model: ModelConfig, platform: str) -> ModelConfig:
    """The settings with every choice made for `platform`: cpu, tpu, or gpu and its other names.

    - Activations are float32 on CPU, bfloat16 elsewhere.
    - Attention is flash, in tiles of 512, on TPU where the length permits it. Elsewhere, also where a kernel was asked
      for that does not run there, it is decomposed: in chunks of 64 queries on CPU, which stay near its caches, and of
      256 on others. On GPUs `triton` has to be asked for, since no GPU has run it yet; see triton.py.
    - Layers are scanned. Programs are smaller, and on CPU a training step takes less memory and time than it does
      unrolled (experiments/results/step_settings). In a loop over calls it is otherwise: see `for_sampling`.
    - The logits that exist at once take 64 MiB on CPU, 256 MiB elsewhere.
    """
    on_cpu, on_tpu = platform == "cpu", platform == "tpu"
    attention = "flash" if model.attention == "auto" else model.attention
    if attention in ("flash", "splash") and not (on_tpu and model.length % LANES == 0):
        attention = "decomposed"
    sizes = model.length, model.width // model.num_heads, model.attention_chunk or CHUNKS["triton"]
    if attention == "triton" and (on_cpu or on_tpu or not triton.supports(*sizes)):
        attention = "decomposed"
    return dataclasses.replace(
        model,
        dtype=("float32" if on_cpu else "bfloat16") if model.dtype == "auto" else model.dtype,
        attention=attention,
        attention_chunk=model.attention_chunk or CHUNKS.get(attention, 64 if on_cpu else 256),
        scan_unroll=model.scan_unroll or 1,
        max_logits=model.max_logits or (2**24 if on_cpu else 2**26),
    )


def for_sampling(model: ModelConfig, platform: str) -> ModelConfig:
    """The settings of a network that is called in a loop. On CPU its layers are unrolled, where nothing else is asked.

    A scan copies each layer's weights at every call, which on CPU takes 1.1 to 1.6 times as long in most cases.
    """
    if platform != "cpu" or model.scan_unroll:
        return model
    return dataclasses.replace(model, scan_unroll=model.num_layers)


def flat_products(platform: str) -> bool:
    """Whether products over several axes are computed as those of plain matrices.

    On CPU their gradients are faster. On TPU an array is copied whenever heads become one axis or separate ones, which
    by its compiler's estimates costs more.
    """
    return platform != "tpu"
