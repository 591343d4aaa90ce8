"""The samplers of a language model: chosen by name, pure functions that draw the next blocks of a batch."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from bd3_jax.config import SamplingConfig
from bd3_jax.diffusion import objectives
from bd3_jax.errors import UserError
from bd3_jax.language_model import LanguageModel
from bd3_jax.models.network import AnyParams, Params
from bd3_jax.sampling import analytic
from bd3_jax.sampling.block import Filled, Layout, fill_blocks
from bd3_jax.sampling.confidence import EntropyBounded, MostConfident, Remasking, Threshold
from bd3_jax.sampling.contexts import Cached, CachedNextToken, Context, Memory, Windowed, WindowedNextToken
from bd3_jax.sampling.truncation import Truncation
from bd3_jax.sampling.updates import Ancestral, Denoiser, FirstHitting, Update

TOKENS_PER_CALL = 32
"""Blocks are drawn so many tokens at a time, or one by one if they are longer, before the host looks at them."""

# What fills a block. AR is first-hitting in blocks of one token.
UPDATES: dict[str, Callable[[SamplingConfig], Update]] = {
    "autoregressive": lambda c: FirstHitting(),
    "first_hitting": lambda c: FirstHitting(),
    "ancestral": lambda c: Ancestral(c.num_steps),
    "confidence": lambda c: MostConfident(c.tokens_per_step),
    "threshold": lambda c: Threshold(c.threshold),
    "entropy_bounded": lambda c: EntropyBounded(c.entropy_bound),
    "remasking": lambda c: Remasking(c.num_steps, c.remasking),
}


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Static and hashable; `advance` is a pure function for `jax.jit`.

    Attributes:
      model: what is sampled from.
      config: what is asked for; nothing in it that concerns texts or files is read here.
    """

    model: LanguageModel
    config: SamplingConfig

    @classmethod
    def from_config(cls, model: LanguageModel, c: SamplingConfig) -> "Sampler":
        """Of the model's network as it is fastest for sampling. Raises UserError where it cannot do what is asked."""
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
        return cls(dataclasses.replace(model, network=model.network.for_sampling()), c)

    @property
    def program(self) -> "Sampler":
        """The sampler that `advance` is compiled for: what it does not read has one value."""
        c = dataclasses.replace(
            self.config, seed=0, num_samples=1, batch_size=1, prompt="", infill="", weights="ema",
            variable_length=False, min_entropy=0.0, max_length=min(self.canvas_length, self.model.length),
        )  # fmt: skip
        return dataclasses.replace(self, config=c)

    @property
    def layout(self) -> Layout:
        return Layout.of(self.model.block_size, self.model.length, self.config.max_length)

    @property
    def blocks_per_call(self) -> int:
        """K: how many blocks one call of `advance` fills, as `draw` calls it; windows that overlap go one by one."""
        layout = self.layout
        if layout.stride < layout.size:
            return 1
        return min(max(1, TOKENS_PER_CALL // layout.size), layout.num_blocks)

    @property
    def canvas_length(self) -> int:
        """S: `max_length` rounded up to whole blocks."""
        return self.layout.length

    def canvas(self, prompts: Sequence[Sequence[int | None]]) -> Int[np.ndarray, "b S"]:
        """One row of whole blocks per prompt: BOS, the prompt, and the mask's id wherever a token is to be drawn.

        A prompt may have gaps, where it is None.

        Raises:
          UserError: a prompt is longer than the context or than `max_length`, or holds what is no token of a text.
        """
        canvas = np.full((len(prompts), self.canvas_length), self.model.ids.mask, np.int32)
        for row, prompt in zip(canvas, prompts, strict=True):
            given = [self.model.ids.bos, *prompt]
            limit = self.config.max_length if None in prompt else min(self.config.max_length, self.model.length)
            if len(given) > limit:
                raise UserError(
                    f"config.sampling.prompt has {len(given)} tokens with BOS; allowed: up to {limit} "
                    "(the smaller of sampling.max_length and model.length)"
                )
            vocab_size, mask = self.model.ids.vocab_size, self.model.ids.mask
            tokens = [token for token in given if token is not None]
            if wrong := [token for token in tokens if not 0 <= token < vocab_size or token == mask]:
                raise UserError(
                    f"the prompt holds the id {wrong[0]}; allowed: 0 to {vocab_size - 1}, but for {mask}, the mask"
                )
            row[: len(given)] = [mask if token is None else token for token in given]
        return canvas

    def log_probs(self, params: AnyParams, hidden: Float[Array, "*n d"]) -> Float[Array, "*n V"]:
        """What AR and SUBS models say: temperature included, the mask excluded."""
        logits = self.model.network.unembed(params, hidden) / self.config.temperature
        return objectives.log_probs_without_mask(logits, self.model.ids.mask)

    @property
    def _context(self) -> Context:
        network, size, layout = self.model.network, self.model.block_size, self.layout
        window = min(self.model.length, layout.length)
        capacity = max(size, window - size)
        if self.model.objective == "ar":
            if self.config.kv_cache:
                return CachedNextToken(network, size, capacity)
            return WindowedNextToken(network, window)
        if self.config.kv_cache and size < self.model.length:
            return Cached(network, size, capacity)
        return Windowed(network, size, window)

    def freeze(self, params: Params) -> AnyParams:
        """The parameters as `start` and `advance` want them: what follows from them alone is computed once."""
        return params if self.model.objective == "sedd" else self._context.freeze(params)

    def start(self, params: AnyParams, row: Int[np.ndarray, "S"], index: int) -> Memory:
        """What `advance` needs to know of the first `index` blocks of a row, which are finished; batch 1.

        Prompts of similar length share a compiled function.
        """
        if self.model.objective == "sedd":
            nothing: Any = np.zeros((1, 0), np.int32)
            return Memory(None, nothing)
        return self._context.start(params, row, index)

    def __call__(self, params: Params, keys: PRNGKeyArray, canvas: Int[Array, "b S"]) -> Filled:
        """The whole canvas from its beginning in one call, without stops: one program, to be timed or looked at.

        `drawing.draw` gives the same tokens, some blocks at a time.
        """
        layout, batch, weights = self.layout, canvas.shape[0], self.freeze(params)
        memory = self.start(weights, np.zeros(canvas.shape[1], np.int32), 0).tile(batch)
        first = jnp.zeros(batch, jnp.int32)
        end = jnp.full(batch, layout.end(self.config.max_length))
        if layout.stride == layout.size:
            return self.advance(weights, keys, memory, first, canvas, end)[1]
        filled = []
        for number in range(layout.num_blocks):
            here = slice(number * layout.stride, number * layout.stride + layout.size)
            memory, window = self.advance(weights, keys, memory, first + number, canvas[:, here], end - here.start)
            canvas = canvas.at[:, here].set(window.tokens)
            fresh = slice(0 if number == 0 else layout.size - layout.stride, None)
            tokens, confidence, drawn_at = (x[:, fresh] for x in (window.tokens, window.confidence, window.drawn_at))
            filled.append(Filled(tokens, confidence, drawn_at, window.nfe, window.cache_calls))
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *filled)

    def advance(
        self,
        weights: AnyParams,
        keys: PRNGKeyArray,
        memory: Memory,
        first: Int[Array, "b"],
        given: Int[Array, "b n"],
        end: Int[Array, "b"],
    ) -> tuple[Memory, Filled]:
        """Fills the next blocks of every sequence; see `block.fill_blocks` for the arguments. SEDD knows no `end`.

        `weights` are those of `freeze`. `memory` may be donated.
        One compiled function serves every prompt and every length of L tokens and K blocks or more. Below, each number
        of blocks has one of its own, which reads no more than the canvas holds.
        """
        c, mask = self.config, self.model.ids.mask
        if self.model.objective == "sedd":
            network, size, params = self.model.network, self.model.block_size, weights
            assert isinstance(params, dict)  # as they are, see `freeze`
            return memory, analytic.sample(
                lambda tokens, sigma: network.apply(params, tokens, size, sigma=sigma),
                lambda hidden, sigma: _masked_log_score(network.unembed(params, hidden), sigma, mask),
                c.num_steps, c.nucleus, mask, keys, given, self.model.batch_shards,
            )  # fmt: skip
        truncation = Truncation(c.nucleus, c.top_k)
        denoiser = Denoiser(functools.partial(self.log_probs, weights), truncation.draw, mask)
        return fill_blocks(self._context, denoiser, UPDATES[c.sampler](c), weights, keys, memory, first, given, end)


def _masked_log_score(logits: Float[Array, "*n V"], sigma: Float[Array, ""], mask: int) -> Float[Array, "*n V"]:
    """SEDD's log-ratios where x_t is the mask."""
    shape = logits.shape[:-1]
    return objectives.sedd_log_score(logits, jnp.full(shape, mask), jnp.broadcast_to(sigma, shape), mask)


def sequence_keys(
    seed: int | Int[Array, ""], indices: Int[Array | np.ndarray, "b"], attempts: Int[Array | np.ndarray, "b"] | int = 0
) -> PRNGKeyArray:
    """The key of each sample's each draw: it depends on these numbers only, not on a place in a batch."""
    indices = jnp.asarray(indices)
    fold = lambda index, attempt: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), attempt)
    return jax.vmap(fold)(indices, jnp.broadcast_to(jnp.asarray(attempts), indices.shape))
