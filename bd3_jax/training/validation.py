"""What is measured between two steps with the averaged weights: likelihood, the best interval, samples."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from bd3_jax import sharding
from bd3_jax.config import Config
from bd3_jax.data.pipeline import Dataset, eval_batches
from bd3_jax.data.streaming import Stream
from bd3_jax.data.tokenizers import Tokenizer
from bd3_jax.evaluation.interval_search import SearchResult, candidates, search_interval
from bd3_jax.evaluation.perplexity import estimates, evaluate_params
from bd3_jax.evaluation.result import Result
from bd3_jax.language_model import LanguageModel
from bd3_jax.sampling.drawing import draw
from bd3_jax.sampling.infilling import resolve
from bd3_jax.sampling.run import Sample, batch_size
from bd3_jax.sampling.sampler import Sampler
from bd3_jax.training.signals import StopSignals
from bd3_jax.training.state import TrainState
from bd3_jax.training.update import search_key


@dataclasses.dataclass(frozen=True)
class Validation:
    """The results of the estimators, the one of `config.eval` first, and of the search, if there was one."""

    results: tuple[Result, ...]
    search: SearchResult | None

    def record(self) -> dict[str, Any]:
        """Flat names for a line of `metrics.jsonl`."""
        record = self.results[0].record()
        for other in self.results[1:]:
            record |= other.beside()
        return record | (self.search.record() if self.search else {})

    def headline(self) -> str:
        """For the terminal."""
        first = self.results[0]
        text = f"{first.split} perplexity {first.perplexity:.2f} ({first.nll:.4f} nats per token)"
        if self.search:
            text += f"\nsearch of the interval, {self.search.seconds:.1f} s\n{self.search.table()}"
        return text


def check_batches(config: Config, mesh: Mesh) -> None:
    """Raises UserError where a batch of rows to be measured cannot be split over the mesh (one of samples grows)."""
    sharding.batch_sharding(mesh, config.eval.batch_size, "config.eval.batch_size")
    if config.search.enabled:
        sharding.batch_sharding(mesh, config.search.batch_size, "config.search.batch_size")


class Validator:
    """Measures on the first rows of `config.eval.split`: the same ones always, and but for searches the same noise."""

    def __init__(self, model: LanguageModel, config: Config, mesh: Mesh, rows: Dataset | Stream):
        self._model, self._config, self._rows = model, config, rows
        self._eval = dataclasses.replace(config.eval, weights="ema")  # whatever `bd3 eval` is to take
        self._split = sharding.batch_sharding(mesh, config.eval.batch_size, "config.eval.batch_size")

    def __call__(self, state: TrainState, step: int, stop: StopSignals) -> Validation:
        """Raises Stopped when it is time to stop."""
        c, search = self._config, None
        results = tuple(
            evaluate_params(
                self._model, state.ema, self._rows, settings, settings.num_batches, self._split, watch=stop.checked
            )
            for settings in estimates(self._model, self._eval)
        )
        if c.search.enabled:
            search = search_interval(
                self._model,
                state.ema,
                candidates(self._model.block_size, c.search.widths),
                stop.checked(eval_batches(self._rows, c.search.batch_size, c.search.num_batches)),
                jax.random.fold_in(search_key(c.seed), step),
                self._split,
            )
        return Validation(results, search)


def with_interval(state: TrainState, interval: tuple[float, float]) -> TrainState:
    """The state whose next update draws t ~ U[low, high]."""
    low, high = (sharding.place(np.float32(bound), state.low.sharding) for bound in interval)
    return dataclasses.replace(state, low=low, high=high)


class Samples:
    """Draws `config.sampling.num_samples` texts; the same seed at every step."""

    def __init__(self, model: LanguageModel, config: Config, mesh: Mesh, tokenizer: Tokenizer):
        """Raises UserError for a prompt that is too long."""
        self._config, given = resolve(config.sampling, tokenizer.encode)
        self._tokenizer, self._batch_size = tokenizer, batch_size(self._config, model.batch_shards)
        self._split = sharding.row_sharding(mesh)
        self._sampler = Sampler.from_config(model, self._config)
        self._row = self._sampler.canvas([given])[0]

    def __call__(self, state: TrainState, step: int, stop: StopSignals) -> dict[str, Any]:
        """Flat names for a line of `metrics.jsonl`: the texts, and means over them. Raises Stopped."""
        c = self._config
        weights = state.ema if c.weights == "ema" else state.params
        drawn = [
            Sample.of(sample, c.seed, step, self._tokenizer)
            for sample in draw(
                self._sampler, weights, self._row, c.num_samples, self._batch_size, self._split,
                redraws=False,  # those of a model that has learnt little may well be degenerate
                before_step=stop.check,
            )
        ]  # fmt: skip
        means = {name: sum(getattr(s, name) for s in drawn) / len(drawn) for name in ("nfe", "length", "entropy")}
        return {"samples/text": [s.text for s in drawn]} | {f"samples/{name}": mean for name, mean in means.items()}
