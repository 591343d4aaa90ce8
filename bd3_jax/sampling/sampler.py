"""The samplers of a language model: chosen by name, compiled once, called with parameters, keys and a canvas."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from bd3_jax.config import SamplingConfig
from bd3_jax.diffusion import objectives
from bd3_jax.errors import UserError
from bd3_jax.language_model import LanguageModel
from bd3_jax.models.transformer import Params
from bd3_jax.sampling import analytic, autoregressive, block
from bd3_jax.sampling.block import Layout, Samples
from bd3_jax.sampling.nucleus import nucleus
from bd3_jax.sampling.updates import Ancestral, FirstHitting, Update

# What fills a block of MDLM or BD3-LM, made from T.
UPDATES: dict[str, Callable[[int], Update]] = {
    "first_hitting": lambda num_steps: FirstHitting(),
    "ancestral": Ancestral,
}


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A pure function `(params, keys, canvas) -> Samples`, for `jax.jit`; static and hashable.

    Attributes:
      model: what is sampled from.
      name: first_hitting, ancestral, analytic or autoregressive.
      max_length: tokens wanted, the prompt and BOS included; a canvas may be longer, the surplus is cut.
      num_steps: T of ancestral (for each block) and analytic.
      nucleus: P in (0, 1].
      temperature: divides the logits.
      kv_cache: keep keys and values of finished blocks or tokens (BD3-LM, AR).
    """

    model: LanguageModel
    name: str
    max_length: int
    num_steps: int
    nucleus: float
    temperature: float
    kv_cache: bool

    @classmethod
    def from_config(cls, model: LanguageModel, c: SamplingConfig) -> "Sampler":
        """Raises UserError where the model cannot do what is asked."""
        if c.sampler == "analytic":
            if c.max_length > model.length:
                raise UserError(
                    f"config.sampling.max_length is {c.max_length}; allowed: up to model.length = {model.length}, "
                    "since sedd denoises its whole context at once and cannot go on from there"
                )
            if c.temperature != 1:
                raise UserError(
                    f"config.sampling.temperature is {c.temperature}; allowed: 1 with the analytic sampler, "
                    "whose scores are ratios of probabilities"
                )
        return cls(model, c.sampler, c.max_length, c.num_steps, c.nucleus, c.temperature, c.kv_cache)

    @property
    def layout(self) -> Layout:
        return Layout.of(self.model.block_size, self.model.length, self.max_length)

    @property
    def canvas_length(self) -> int:
        """S: `max_length`, for diffusion rounded up to whole blocks."""
        return self.max_length if self.name == "autoregressive" else self.layout.length

    def canvas(self, prompts: Sequence[Sequence[int]]) -> Int[np.ndarray, "b S"]:
        """One row per prompt: BOS, the prompt, and the mask's id wherever a token is to be drawn.

        Raises:
          UserError: a prompt is longer than the context or than `max_length`, or holds what is no token of a text.
        """
        canvas = np.full((len(prompts), self.canvas_length), self.model.ids.mask, np.int32)
        for row, prompt in zip(canvas, prompts, strict=True):
            given = [self.model.ids.bos, *prompt]
            limit = min(self.max_length, self.model.length)
            if len(given) > limit:
                raise UserError(
                    f"config.sampling.prompt has {len(given)} tokens with BOS; allowed: up to {limit} "
                    "(the smaller of sampling.max_length and model.length)"
                )
            vocab_size, mask = self.model.ids.vocab_size, self.model.ids.mask
            if wrong := [token for token in given if not 0 <= token < vocab_size or token == mask]:
                raise UserError(
                    f"the prompt holds the id {wrong[0]}; allowed: 0 to {vocab_size - 1}, but for {mask}, the mask"
                )
            row[: len(given)] = given
        return canvas

    def log_probs(self, params: Params, hidden: Float[Array, "*n d"]) -> Float[Array, "*n V"]:
        """What AR and SUBS models draw from: temperature, then nucleus. The mask is never drawn."""
        logits = self.model.network.unembed(params, hidden) / self.temperature
        return nucleus(objectives.log_probs_without_mask(logits, self.model.ids.mask), self.nucleus)

    def __call__(self, params: Params, keys: PRNGKeyArray, canvas: Int[Array, "b S"]) -> Samples:
        """Fills the canvas; see `block.Samples`. `keys` is `[b]`, one for each sequence."""
        samples = self._fill(params, keys, canvas)
        return dataclasses.replace(samples, tokens=samples.tokens[:, : self.max_length])

    def _fill(self, params: Params, keys: PRNGKeyArray, canvas: Int[Array, "b S"]) -> Samples:
        network, mask = self.model.network, self.model.ids.mask
        batch, block_size = canvas.shape[0], self.model.block_size
        window = min(self.model.length, canvas.shape[1])
        log_probs = functools.partial(self.log_probs, params)

        if self.name == "analytic":
            return analytic.sample(
                lambda tokens, sigma: network.apply(params, tokens, block_size, sigma=sigma),
                lambda hidden, sigma: _masked_log_score(network.unembed(params, hidden), sigma, mask),
                self.num_steps, self.nucleus, mask, keys, canvas, self.model.batch_shards,
            )  # fmt: skip
        if self.name == "autoregressive":
            tokens_seen = (
                autoregressive.cached(network, params, batch, window - 1)
                if self.kv_cache
                else autoregressive.windowed(network, params, window)
            )
            return autoregressive.sample(tokens_seen, log_probs, mask, keys, canvas)
        update = UPDATES[self.name](self.num_steps)
        blocks_seen = (
            block.cached(network, params, batch, window - block_size)
            if self.kv_cache and block_size < self.model.length
            else block.windowed(network, params, window, block_size)
        )
        return block.sample(blocks_seen, log_probs, update, self.layout, mask, keys, canvas)


def _masked_log_score(logits: Float[Array, "*n V"], sigma: Float[Array, ""], mask: int) -> Float[Array, "*n V"]:
    """SEDD's log-ratios where x_t is the mask."""
    shape = logits.shape[:-1]
    return objectives.sedd_log_score(logits, jnp.full(shape, mask), jnp.broadcast_to(sigma, shape), mask)


def sequence_keys(seed: int, indices: Int[Array | np.ndarray, "b"]) -> PRNGKeyArray:
    """The key of each sample: it depends on the seed and the sample's index only, not on its place in a batch."""
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(indices)
