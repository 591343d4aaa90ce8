"""How fast a run trains: time per step, what of it is spent waiting for data, model FLOP utilisation; a profile."""

from typing import Any

import jax
from etils import epath

from bd3_jax.diffusion.likelihood import masked_share
from bd3_jax.language_model import LanguageModel

# Device kind as JAX names it -> dense bfloat16 FLOP/s, from the makers' data sheets. The first that fits is taken.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,  # v6e
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
}
_PROFILE_AFTER = 10  # steps of a session: caches and queues are full by then


def peak_flops(device_kind: str) -> float | None:
    """Of one device, in FLOP/s; None where it is not known."""
    return next((peak for kind, peak in PEAKS.items() if device_kind.startswith(kind)), None)


def flops_per_token(lm: LanguageModel) -> float:
    """Floating-point operations that training needs for each of the L tokens of a row, forward and backward.

    Counted are the matrix products that the loss depends on, 2 operations a multiply-add and three times the forward
    pass in all: not what is computed again to save memory, nor scores that a mask throws away, nor what is small beside
    them (adaLN, whose products are for rows and not for tokens; norms; softmax). The loss depends on the output layer
    at masked tokens only: half of them for t ~ U[0, 1], and the share that belongs to the settings' interval in
    general; an interval that is searched for has another. For AR it is all tokens.
    """
    model, block, length = lm.network.model, lm.block_size, lm.length
    width, layers = model.width, model.num_layers
    seen = (length + block) / 2  # keys that a query sees on average under a block-causal mask
    keys_values, rest = 2 * width**2, (2 + 8) * width**2  # of a layer's weights; rest: q, output, MLP
    stream = layers * (keys_values + rest + 2 * width * seen)
    share = 1.0 if lm.objective == "ar" else masked_share(lm.noise)
    total = lm.noise_copies * (stream + share * width * lm.network.vocab_size)
    if lm.objective == "bd3lm" and block < length:
        # A noised stream sees its own block and the clean ones before it: as many. The clean stream ends with the
        # last layer's keys and values.
        total += stream - (rest + 2 * width * seen)
    return 3 * 2 * total


class Clock:
    """Times since the last record."""

    def __init__(self, tokens: int, flops_per_token: float):
        """`tokens` of a step, over all devices."""
        self._tokens = tokens
        peak = peak_flops(jax.devices()[0].device_kind)
        self._share = flops_per_token / (peak * jax.device_count()) if peak else None
        self._seconds, self._waited, self._steps = 0.0, 0.0, 0

    def add(self, seconds: float, waited: float) -> None:
        """A step took `seconds`, `waited` of them for its rows."""
        self._seconds, self._waited, self._steps = self._seconds + seconds, self._waited + waited, self._steps + 1

    def record(self) -> dict[str, float]:
        """Flat names for a line of `metrics.jsonl`; starts anew."""
        speed = self._steps * self._tokens / self._seconds
        values = {
            "train/tokens_per_second": speed,
            "train/step_seconds": self._seconds / self._steps,
            "train/input_seconds": self._waited / self._steps,
        }
        if self._share is not None:
            values["train/mfu"] = speed * self._share
        self._seconds, self._waited, self._steps = 0.0, 0.0, 0
        return values


class Profiler:
    """Traces some steps into WORKDIR/profile, for TensorBoard and Perfetto."""

    def __init__(self, workdir: epath.Path, start: int, steps: int):
        """`start`: steps done before this session; `steps`: how many to trace, 0 for none."""
        self._path = workdir / "profile"
        self._first = start + _PROFILE_AFTER + 1 if steps else 0
        self._last = start + _PROFILE_AFTER + steps
        self._runs = False

    def before(self, step: int) -> None:
        if step == self._first:
            jax.profiler.start_trace(str(self._path))
            self._runs = True

    def after(self, step: int, metrics: Any) -> None:
        if self._runs and step == self._last:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        if self._runs:
            jax.profiler.stop_trace()
            self._runs = False
