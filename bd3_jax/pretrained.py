"""A model in one line: `bd3_jax.load_pretrained("kuleshov-group/bd3lm-owt-block_size4").sample()`."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from bd3_jax.checkpoints.architecture import TOKENIZERS, USUAL_IDS, Architecture
from bd3_jax.checkpoints.published import TOKENIZER
from bd3_jax.checkpoints.source import Source, Weights, open_source
from bd3_jax.config import SAMPLERS, Config, EvalConfig, ModelConfig, SamplingConfig, can_clip
from bd3_jax.config_dict import from_config_dict
from bd3_jax.data.tokenizers import Tokenizer, load_tokenizer
from bd3_jax.errors import UserError
from bd3_jax.evaluation.perplexity import batches, sequence_losses
from bd3_jax.evaluation.result import Result
from bd3_jax.language_model import LanguageModel
from bd3_jax.models.network import Params
from bd3_jax.sampling.drawing import Drawn, draw
from bd3_jax.sampling.infilling import resolve
from bd3_jax.sampling.run import Sample, batch_size
from bd3_jax.sampling.sampler import Sampler
from bd3_jax.sampling.streaming import pieces
from bd3_jax.sampling.trace import Replay, Trace
from bd3_jax.special_ids import SpecialIds


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """Weights with all that is needed to use them.

    Attributes:
      source: where they come from.
      architecture: what the source says they are weights of, overrides included; its `ids` are None where neither the
        source nor a tokenizer says them, and then nothing can be sampled or evaluated.
      config: complete settings; evaluation and sampling take their defaults from here.
      model: the objective bound to the network.
      params: float32, on the default device.
      weights: which they are, ema or raw.
      tokenizer: None if none could be had: everything but texts works without.
      run: the workdir, if it is one of ours.
      step: updates done in training; None if the source does not say.
      no_tokenizer: why there is no tokenizer.
    """

    source: str
    architecture: Architecture
    config: Config
    model: LanguageModel
    params: Params = dataclasses.field(repr=False)
    weights: Weights
    tokenizer: Tokenizer | None = dataclasses.field(repr=False)
    run: epath.Path | None = None
    step: int | None = None
    no_tokenizer: str = ""

    @property
    def objective(self) -> str:
        """Ar, mdlm, sedd or bd3lm."""
        return self.model.objective

    @property
    def block_size(self) -> int:
        """B; 1 for ar, L for mdlm and sedd."""
        return self.model.block_size

    @property
    def mask_id(self) -> int:
        """Raises UserError where it is not known, as `sample` and `perplexity` do."""
        return self._ids().mask

    @property
    def model_config(self) -> ModelConfig:
        """Length, width, depth and the like."""
        return self.model.network.model

    @property
    def interval(self) -> tuple[float, float]:
        """Clipped interval [low, high] of t in training."""
        return self.architecture.low, self.architecture.high

    def apply(
        self,
        tokens: Int[Any, "b L"],
        *,
        clean: Int[Any, "b L"] | None = None,
        sigma: Float[Any, "b"] | None = None,
    ) -> Float[Array, "b L V"]:
        """The network's float32 logits; the mask's is included.

        Args:
          tokens: up to the training context, a multiple of the block size.
          clean: for bd3lm, the pass over [tokens ; clean] of its likelihood; without it, the block-causal pass of its
            samplers.
          sigma: total noise, which sedd is fed; see `diffusion.schedules`.

        Raises:
          UserError: tokens, or what comes with them, do not fit the model.
        """
        tokens = self._rows(tokens, "tokens")
        model = self._fitted(tokens.shape[1])
        if clean is not None:
            clean = self._rows(clean, "clean")
            if self.objective != "bd3lm" or clean.shape != tokens.shape:
                raise UserError("clean is for bd3lm alone, and has the shape of tokens")
        if model.network.time_conditioned and sigma is None:
            raise UserError("sigma is missing: the network is fed the total noise of every sequence")
        return _apply(model)(self.params, tokens, clean, sigma)

    def sample(
        self, prompt: str | Sequence[int] = "", *, infill: str | Sequence[int | None] = "", **settings: Any
    ) -> list[Sample]:
        """Draws samples that begin with the prompt, or fill the gaps of `infill`.

        Args:
          prompt: text, or token ids without BOS.
          infill: a text with gaps, as in "The [MASK*3] of the city", or token ids without BOS, None where one is to be
            drawn. BD3-LM sees what comes before a gap and the rest of its block, MDLM and SEDD see all.
          **settings: fields of `config.sampling`, as in num_samples=8, max_length=256, nucleus=0.95, seed=1; what is
            left out is as in `self.config.sampling`. The weights are those that were loaded.

        Raises:
          UserError: a setting that is unknown or that the model cannot serve, or a text without a tokenizer.
        """
        sampler, row = self._sampler(prompt, infill, settings)
        seed, step = sampler.config.seed, self.step or 0
        return [Sample.of(drawn, seed, step, self.tokenizer) for drawn in self._draw(sampler, row)]

    def replay(
        self, prompt: str | Sequence[int] = "", *, infill: str | Sequence[int | None] = "", **settings: Any
    ) -> Replay:
        """How the samples of `sample` come about, call by call: a notebook shows it; `Replay.html` is a page."""
        sampler, row = self._sampler(prompt, infill, settings)
        tokenizer = self.text_tokenizer()
        traces = tuple(Trace.of(drawn, sampler.layout, tokenizer) for drawn in self._draw(sampler, row))
        return Replay(f"{self.source}: {sampler.config.sampler}", traces)

    def stream(self, prompt: str | Sequence[int] = "", **settings: Any) -> Iterator[str]:
        """Pieces of one sample's text, prompt included, as its blocks finish: those of `sample(prompt, ...)[0]`.

        A sample that becomes degenerate is not drawn anew but ends. Raises UserError like `sample`, before any piece.
        """
        sampler, row = self._sampler(prompt, "", settings | {"num_samples": 1})
        return pieces(sampler, self.params, row, self.text_tokenizer())

    def _draw(self, sampler: Sampler, row: Int[np.ndarray, "S"]) -> Iterator[Drawn]:
        c = sampler.config
        return draw(sampler, self.params, row, c.num_samples, batch_size(c, self.model.batch_shards))

    def _sampler(
        self, prompt: str | Sequence[int], infill: str | Sequence[int | None], settings: dict[str, Any]
    ) -> tuple[Sampler, Int[np.ndarray, "S"]]:
        _refuse(settings, ("weights",))
        c = self.sampling(**settings)
        if len(infill) and self.objective == "ar":
            raise UserError("infill is for models that denoise; ar cannot see what follows a gap")
        c, given = resolve(c, lambda text: self.text_tokenizer().encode(text), prompt, infill)
        sampler = Sampler.from_config(self.model, c)
        return sampler, sampler.canvas([given])[0]

    def perplexity(self, texts: str | Sequence[str] | Int[Any, "n L"], **settings: Any) -> Result:
        """NLL (bound), perplexity and standard error, without dropout; position 0 counts as the model wants it.

        Args:
          texts: documents, which are joined with EOS after each and cut into rows of L tokens, the rest dropped (one
            shorter row where there are fewer than L); or rows of tokens as they are to be read, up to L long.
          **settings: fields of `config.eval`: estimator, batch_size, seed.

        Raises:
          UserError: a setting that is unknown, tokens that do not fit the model, or texts without a tokenizer.
        """
        _refuse(settings, ("weights", "split", "num_batches", "without_special", "both_estimators"))
        c = self.evaluation(**settings)
        texts = [texts] if isinstance(texts, str) else texts
        are_texts = len(texts) > 0 and isinstance(texts[0], str)
        rows = self._pack(texts) if are_texts else self._rows(texts, "rows")
        if (rows == self.mask_id).any():
            raise UserError(f"rows hold the mask's id {self.mask_id}, which is no token of a text")
        model = self._fitted(rows.shape[1])
        if not model.counted(rows.shape[1]).any():
            raise UserError("rows have 1 token, whose loss does not count; allowed: 2 or more")
        losses = sequence_losses(model, self.params, batches(rows, c.batch_size), c)
        return Result.of(
            model, losses, rows.shape[1], dataclasses.replace(c, weights=self.weights),
            split="given", insert_special=False, insert_eos=are_texts,
        )  # fmt: skip

    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises UserError that says what to do where there is none."""
        if self.tokenizer is None:
            raise UserError(
                f"{self.source} has no tokenizer here ({self.no_tokenizer}); pass load_pretrained(..., tokenizer=...) "
                "its tokenizer.json, the folder that holds it, or a name from bd3_jax/data/tokenizers.py"
            )
        return self.tokenizer

    def _ids(self) -> SpecialIds:
        if self.architecture.ids is None:
            raise UserError(
                f"{self.source} does not say which ids are BOS, EOS and the mask, for it has no {TOKENIZER}; put the "
                f"one it was trained with there, or pass load_pretrained(..., tokenizer=...) that {TOKENIZER}"
            )
        return self.architecture.ids

    def sampling(self, **settings: Any) -> SamplingConfig:
        """`config.sampling` with some fields replaced. Raises UserError where it, or the model, cannot serve."""
        self._ids()
        if self.objective != "sedd" and self.model.network.time_conditioned:
            raise UserError(
                f"{self.source} is conditioned on time; {self.objective}'s samplers are for models that are not"
            )
        return self._with("sampling", settings).sampling

    def evaluation(self, **settings: Any) -> EvalConfig:
        """`config.eval` with some fields replaced. Raises UserError where it, or the model, cannot serve."""
        self._ids()
        c = self._with("eval", settings).eval
        if self.model.network.time_conditioned and self.objective != "ar":
            if self.block_size < self.model.length:
                raise UserError(
                    f"{self.source} is conditioned on time; {self.objective}'s blocks are for models that are not"
                )
            if c.estimator != "monte_carlo":
                raise UserError(f"{self.source} is conditioned on time; allowed: estimator='monte_carlo'")
        return c

    def _with(self, group: str, settings: dict[str, Any]) -> Config:
        """The config with some fields of a group replaced, checked like any other."""
        content = self.config.to_dict()
        content[group] |= settings
        return from_config_dict(ConfigDict(content))

    def _pack(self, texts: Sequence[str]) -> Int[np.ndarray, "n L"]:
        tokenizer, length = self.text_tokenizer(), self.model.length
        ids = [token for text in tokenizer.encode_batch(texts) for token in (*text, tokenizer.ids.eos)]
        if len(ids) < length:
            size = 1 if self.block_size == length else self.block_size
            length = len(ids) // size * size
        if length < 2:
            raise UserError(f"the texts have {len(ids)} tokens with EOS; allowed: {max(2, self.block_size)} or more")
        return np.array(ids[: len(ids) // length * length], np.int32).reshape(-1, length)

    def _rows(self, tokens: Any, name: str) -> Int[np.ndarray, "b L"]:
        try:
            rows = np.asarray(tokens)
        except ValueError:
            raise UserError(f"{name} must be rows of one length") from None
        if rows.ndim != 2 or rows.size == 0 or not np.issubdtype(rows.dtype, np.integer):
            raise UserError(f"{name} must be integers [b, L], found {rows.dtype} {list(rows.shape)}")
        vocab_size = self.model.ids.vocab_size
        if rows.min() < 0 or rows.max() >= vocab_size:
            raise UserError(f"{name} has ids from {rows.min()} to {rows.max()}; allowed: 0 to {vocab_size - 1}")
        return rows.astype(np.int32)

    def _fitted(self, length: int) -> LanguageModel:
        """The model for rows of `length`: where one block is the whole row, the block is as long as the row."""
        if length > self.model.length:
            raise UserError(f"rows have {length} tokens; allowed: up to the training context of {self.model.length}")
        if self.block_size == self.model.length:
            return dataclasses.replace(self.model, block_size=length)
        if length % self.block_size:
            raise UserError(f"rows have {length} tokens; allowed: a multiple of the block size {self.block_size}")
        return self.model


def _refuse(settings: dict[str, Any], names: tuple[str, ...]) -> None:
    """Raises UserError for what would change nothing here: weights are loaded, and texts given."""
    if found := [name for name in names if name in settings]:
        advice = "load_pretrained(..., weights=...)" if found[0] == "weights" else "bd3 eval on a run"
        raise UserError(f"{found[0]} is of no use here; allowed: {advice}")


@functools.lru_cache(maxsize=16)
def _apply(model: LanguageModel) -> Callable[..., Float[Array, "b L V"]]:
    def logits(params: Params, tokens: Array, clean: Array | None, sigma: Array | None) -> Array:
        hidden = model.network.apply(params, tokens, model.block_size, clean=clean, sigma=sigma)
        return model.network.unembed(params, hidden)

    return jax.jit(logits)


def load_pretrained(
    source: str,
    *,
    objective: str | None = None,
    block_size: int | None = None,
    tokenizer: Tokenizer | str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    weights: Weights = "ema",
    step: int | None = None,
) -> Pretrained:
    """Loads a checkpoint of ours or of the authors. Nothing in it is executed; memory stays near the weights' own size.

    Args:
      source: a workdir of ours; a folder with config.json and model.safetensors; a .safetensors or Lightning .ckpt
        with config.json beside it; or a hub id, as in `kuleshov-group/bd3lm-owt-block_size4`.
      objective: ar, mdlm, sedd or bd3lm; None: what the source says.
      block_size: B of bd3lm; None: what the source says.
      tokenizer: itself, a name from `bd3_jax.data.tokenizers`, a tokenizer.json or its folder; None: the workdir's, or
        gpt2 or bert-base-uncased by the size of the vocabulary, where they can be had.
      revision: branch, tag or commit of a hub id.
      token: the hub's access token.
      weights: ema or raw; the published ones are the averaged (ema).
      step: of the checkpoint of a workdir; None: the newest.

    Raises:
      UserError: nothing is there, it is damaged or does not fit, or could not be read without executing it.
    """
    opened = open_source(str(source), weights, revision, token, step)
    architecture, config = _override(opened, objective, block_size)
    found, reason = _find_tokenizer(opened, tokenizer)
    vocab_size, ids = architecture.vocab_size, architecture.ids
    if found and found.ids.vocab_size != vocab_size:
        raise UserError(f"the tokenizer has V = {found.ids.vocab_size} with the mask, {source} {vocab_size}")
    if found and ids not in (None, found.ids):
        raise UserError(f"the tokenizer has {found.ids}, but the config.json of {source} says {ids}")
    ids = found.ids if found else ids or USUAL_IDS.get(vocab_size)
    architecture = dataclasses.replace(architecture, ids=ids)
    # Where nobody says them: those of the authors' stored numbers, for `bd3 parity`. `apply` needs none.
    last = SpecialIds(bos=vocab_size - 2, eos=vocab_size - 2, mask=vocab_size - 1, vocab_size=vocab_size)
    model = LanguageModel.from_config(config, ids or last)
    network = dataclasses.replace(model.network, time_conditioned=architecture.time_conditioned)
    model = dataclasses.replace(model, network=network)
    everywhere = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = network.abstract_params()
    params = opened.load(abstract, jax.tree.map(lambda _: everywhere, abstract))
    return Pretrained(str(source), architecture, config, model, params, weights, found, opened.run, opened.step, reason)


def stream(model: Pretrained, prompt: str | Sequence[int] = "", **settings: Any) -> Iterator[str]:
    """`for piece in bd3_jax.stream(model, "The city"): print(piece, end="", flush=True)`; see `Pretrained.stream`."""
    return model.stream(prompt, **settings)


def _override(source: Source, objective: str | None, block_size: int | None) -> tuple[Architecture, Config]:
    found = source.architecture
    if objective is None and block_size is None:
        return found, source.config
    objective = objective or found.objective
    if objective not in SAMPLERS:
        raise UserError(f"objective is {objective!r}; allowed: {', '.join(SAMPLERS)}")
    if (objective != "ar") != found.adaln:
        has = "has" if found.adaln else "has no"
        raise UserError(
            f"objective is {objective!r}, but {source.name} {has} adaLN tensors: it is of {found.objective}"
        )
    if block_size is None:
        block_size = {"ar": 1, "bd3lm": found.block_size}.get(objective, found.length)
    wanted = dataclasses.replace(found, objective=objective, block_size=block_size)
    fresh = wanted.to_config()
    if source.run is None:
        return wanted, fresh
    # A run keeps its own settings but for those of training, which may be of this objective or block size alone; and
    # the masked fraction is kept within the interval only where blocks of this size have one there.
    other = ("training", "search", *(("eval", "sampling", "noise") if objective != found.objective else ()))
    own = source.config.to_dict()
    own |= {"objective": objective, "block_size": block_size}
    own |= {group: fresh.to_dict()[group] for group in other}
    noise = own["noise"]
    noise["resample"] &= can_clip(block_size, noise["low"], noise["high"])
    return wanted, from_config_dict(ConfigDict(own))


def _find_tokenizer(source: Source, wanted: Tokenizer | str | None) -> tuple[Tokenizer | None, str]:
    """The tokenizer, or None and the reason."""
    if isinstance(wanted, Tokenizer):
        return wanted, ""
    if wanted is not None:
        return load_tokenizer(wanted), ""
    if source.tokenizer is not None:
        return load_tokenizer(source.tokenizer), ""
    vocab_size, ids = source.architecture.vocab_size, source.architecture.ids
    if vocab_size not in TOKENIZERS or ids not in (None, USUAL_IDS[vocab_size]):
        return None, f"none is known for V = {vocab_size}"
    try:
        return load_tokenizer(TOKENIZERS[vocab_size]), ""
    except UserError as error:
        return None, str(error)
