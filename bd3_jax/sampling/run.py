"""Text from a checkpoint: to the terminal, and to WORKDIR/samples.jsonl."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from bd3_jax.checkpoints import orbax
from bd3_jax.config import Config, SamplingConfig
from bd3_jax.data.tokenizers import FILE_NAME as TOKENIZER_FILE
from bd3_jax.data.tokenizers import Tokenizer, load_tokenizer
from bd3_jax.errors import UserError
from bd3_jax.folders import append_text, free_path, require_writable, write_text, writing
from bd3_jax.language_model import LanguageModel
from bd3_jax.sampling import statistics
from bd3_jax.sampling.drawing import Drawn, draw
from bd3_jax.sampling.infilling import resolve
from bd3_jax.sampling.sampler import Sampler
from bd3_jax.sampling.streaming import Watch
from bd3_jax.sampling.trace import Trace, page
from bd3_jax.sharding import batch_shards, make_mesh, param_shardings, row_sharding

FILE_NAME = "samples.jsonl"
TRACE_FILE = "trace.html"


@dataclasses.dataclass(frozen=True)
class Sample:
    """A line of samples.jsonl.

    Attributes:
      index: of the sample in its run; together with the seed it determines the tokens.
      seed: `sampling.seed`.
      step: of the checkpoint.
      text: without the BOS at the beginning; EOS and other special tokens are spelled out. None: no tokenizer.
      tokens: ids, BOS included.
      stopped: why it ended before `sampling.max_length`: eos or entropy (see `stopping.py`); empty: it did not.
      rejected: draws that were discarded before this one.
      drawn: tokens that were drawn; BOS, prompt and what is given of a text with gaps are not.
      nfe: network calls that drew its tokens.
      cache_calls: network calls that only stored keys and values.
      length: tokens of the re-tokenised text that are not EOS, BOS not counted.
      entropy: of the distribution of its tokens, nats.
      distinct_1, distinct_2, distinct_3: different n-grams of its tokens, divided by all of them.
      seconds: of drawing it, discarded draws included, without compilation: its share where several are drawn at once.
    """

    index: int
    seed: int
    step: int
    text: str | None
    tokens: list[int]
    stopped: str
    rejected: int
    drawn: int
    nfe: int
    cache_calls: int
    length: int
    entropy: float
    distinct_1: float
    distinct_2: float
    distinct_3: float
    seconds: float

    @classmethod
    def of(cls, drawn: Drawn, seed: int, step: int, tokenizer: Tokenizer | None) -> "Sample":
        """Without a tokenizer there is no text, and `length` counts all tokens as they were drawn."""
        tokens = drawn.tokens.tolist()
        return cls(
            index=drawn.index, seed=seed, step=step,
            text=tokenizer.decode(tokens[1:]) if tokenizer else None,
            tokens=tokens, stopped=drawn.stopped, rejected=drawn.rejected,
            drawn=int((drawn.drawn_at[: drawn.length] > 0).sum()), nfe=drawn.nfe, cache_calls=drawn.cache_calls,
            length=statistics.length(tokens, tokenizer) if tokenizer else len(tokens) - 1,
            entropy=statistics.entropy(tokens),
            **{f"distinct_{n}": statistics.distinct([tokens], n) for n in (1, 2, 3)},
            seconds=drawn.seconds,
        )  # fmt: skip

    def headline(self) -> str:
        figures = f"{self.length} tokens, {self.nfe} calls, entropy {self.entropy:.2f} nats, {self.seconds:.2f} s"
        ended = {"eos": ", ended by EOS", "entropy": ", cut off where it degenerates"}.get(self.stopped, "")
        return f"--- sample {self.index}: {figures}{ended}"


def sample(
    config: Config, workdir: epath.Path, step: int | None = None, *, trace: bool = False, watch: bool = False
) -> list[dict[str, Any]]:
    """Draws `config.sampling.num_samples` texts from a checkpoint of a run, prints and writes them.

    `WORKDIR/samples.jsonl` always holds the newest samples, one object a line (see `Sample`), written as they are
    drawn. Earlier ones are kept: the file is first renamed to samples-1.jsonl, or to the next free number. Batches and
    parameters are split over `config.mesh`; every process has all samples, the first prints and writes them.

    Args:
      config: all settings.
      workdir: of the run.
      step: of the checkpoint; the newest by default.
      trace: also writes `WORKDIR/trace.html`, which replays how the samples were drawn.
      watch: shows the first of the samples drawn at a time in the terminal, as it fills up.

    Raises:
      UserError: if there is no checkpoint, or it cannot do what is asked.
    """
    mesh = make_mesh(config.mesh)
    require_writable(workdir, "--workdir")
    orbax.require_checkpoint(workdir, step)
    if not (workdir / "tokenizer" / TOKENIZER_FILE).exists():
        raise UserError(
            f"{workdir} has no tokenizer/{TOKENIZER_FILE}, so its samples would have no text; copy there the one that "
            "it was trained with"
        )
    tokenizer = load_tokenizer(workdir / "tokenizer")
    model = LanguageModel.from_config(config, tokenizer.ids, batch_shards(mesh))
    # The prompt is checked before anything is read or compiled.
    c, given = resolve(config.sampling, tokenizer.encode)
    sampler = Sampler.from_config(model, c)
    row = sampler.canvas([given])[0]
    shardings = param_shardings(mesh, model.network)
    params, found = orbax.restore_params(config, workdir, config.sampling.weights, shardings, step)

    samples: list[Sample] = []
    path, kept, first = workdir / FILE_NAME, None, jax.process_index() == 0
    # Every process draws block by block, or none.
    watcher = (Watch(tokenizer) if first else lambda drawn: None) if watch else None
    together = batch_size(c, model.batch_shards) if not watch else model.batch_shards
    traces: list[Trace] = []
    with tqdm(total=c.num_samples, unit=" samples", file=sys.stderr, disable=not first or watch) as progress:
        for drawn in draw(sampler, params, row, c.num_samples, together, row_sharding(mesh), watcher):
            new = Sample.of(drawn, c.seed, found, tokenizer)
            if trace:
                traces.append(Trace.of(drawn, sampler.layout, tokenizer))
            if first:
                if not samples:
                    kept = _make_way(path)
                append_text(path, json.dumps(dataclasses.asdict(new)) + "\n")
                progress.write(f"{new.headline()}\n{new.text}\n", file=sys.stdout)
                progress.update()
            samples.append(new)
    if first:
        print(summary(samples))
        if trace:
            write_text(workdir / TRACE_FILE, page(f"{workdir.resolve().name}: {c.sampler}", traces))
            print(f"trace in {workdir / TRACE_FILE}")
        print(f"{len(samples)} samples in {path}" + (f"; earlier ones are now in {kept}" if kept else ""))
    return [dataclasses.asdict(sample) for sample in samples]


def batch_size(c: SamplingConfig, parts: int) -> int:
    """Sequences drawn at a time: as many as are asked for, if there are so many samples; a multiple of `parts`."""
    return -(-min(c.batch_size, c.num_samples) // parts) * parts


def summary(samples: Sequence[Sample]) -> str:
    """Means over all samples, and their drawn tokens a second; discarded draws count as time alone."""
    mean = lambda name: np.mean([getattr(sample, name) for sample in samples])
    drawn, seconds = sum(sample.drawn for sample in samples), sum(sample.seconds for sample in samples)
    lengths = [sample.length for sample in samples]
    rows = [sample.tokens for sample in samples]
    distinct = ", ".join(f"{statistics.distinct(rows, n):.3f}" for n in (1, 2, 3))
    rejected = sum(sample.rejected for sample in samples)
    return (
        f"mean NFE {mean('nfe'):.1f}, length median {np.median(lengths):.0f} and maximum {max(lengths)}, "
        f"mean entropy {mean('entropy'):.3f} nats, distinct-1, 2, 3 of all {distinct}, "
        f"{drawn / seconds:,.1f} tokens/s" + (f", {rejected} draws discarded" if rejected else "")
    )


def _make_way(path: epath.Path) -> epath.Path | None:
    """Renames an existing file to the next free number, and returns its new name."""
    if not path.exists():
        return None
    kept = free_path(path)
    with writing(path):
        path.rename(kept)
    return kept
