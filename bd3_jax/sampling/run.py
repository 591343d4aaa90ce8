"""Text from a checkpoint: to the terminal, and to WORKDIR/samples.jsonl."""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int
from tqdm import tqdm

from bd3_jax.checkpoints import orbax
from bd3_jax.config import Config, SamplingConfig
from bd3_jax.data.tokenizers import FILE_NAME as TOKENIZER_FILE
from bd3_jax.data.tokenizers import Tokenizer, load_tokenizer
from bd3_jax.errors import UserError
from bd3_jax.folders import free_path, require_writable, writing
from bd3_jax.language_model import LanguageModel
from bd3_jax.models.transformer import Params
from bd3_jax.sampling import statistics
from bd3_jax.sampling.block import Samples
from bd3_jax.sampling.sampler import Sampler, sequence_keys
from bd3_jax.sharding import batch_sharding, batch_shards, make_mesh, param_shardings

FILE_NAME = "samples.jsonl"


@dataclasses.dataclass(frozen=True)
class Sample:
    """A line of samples.jsonl.

    Attributes:
      index: of the sample in its run; together with the seed it determines the tokens.
      seed: `sampling.seed`.
      step: of the checkpoint.
      text: without the BOS at the beginning; EOS and other special tokens are spelled out. None: no tokenizer.
      tokens: ids, BOS included.
      nfe: network calls that drew its tokens.
      cache_calls: network calls that only stored keys and values.
      length: tokens of the re-tokenised text that are not EOS, BOS not counted.
      entropy: of the distribution of its tokens, nats.
      seconds: of drawing its batch, without compilation, divided by the samples in it.
    """

    index: int
    seed: int
    step: int
    text: str | None
    tokens: list[int]
    nfe: int
    cache_calls: int
    length: int
    entropy: float
    seconds: float

    def headline(self) -> str:
        figures = f"{self.length} tokens, {self.nfe} calls, entropy {self.entropy:.2f} nats, {self.seconds:.2f} s"
        return f"--- sample {self.index}: {figures}"


def sample(config: Config, workdir: epath.Path) -> list[dict[str, Any]]:
    """Draws `config.sampling.num_samples` texts from a run's newest checkpoint, prints and writes them.

    `WORKDIR/samples.jsonl` always holds the newest samples, one object a line (see `Sample`), written as they are
    drawn. Earlier ones are kept: the file is first renamed to samples-1.jsonl, or to the next free number. Batches and
    parameters are split over `config.mesh`; every host has all samples, the first prints and writes them.

    Raises:
      UserError: if there is no checkpoint, or it cannot do what is asked.
    """
    mesh = make_mesh(config.mesh)
    split_rows = batch_sharding(mesh, config.sampling.batch_size, "config.sampling.batch_size")
    require_writable(workdir, "--workdir")
    orbax.require_checkpoint(workdir)
    if not (workdir / "tokenizer" / TOKENIZER_FILE).exists():
        raise UserError(
            f"{workdir} has no tokenizer/{TOKENIZER_FILE}, so its samples would have no text; copy there the one that "
            "it was trained with"
        )
    tokenizer = load_tokenizer(workdir / "tokenizer")
    model = LanguageModel.from_config(config, tokenizer.ids, batch_shards(mesh))
    sampler = Sampler.from_config(model, config.sampling)
    # The prompt is checked before anything is read or compiled.
    row = sampler.canvas([tokenizer.encode(config.sampling.prompt)])[0]
    shardings = param_shardings(mesh, model.network)
    params, step = orbax.restore_params(config, workdir, config.sampling.weights, shardings)

    samples: list[Sample] = []
    path, kept, first = workdir / FILE_NAME, None, jax.process_index() == 0
    with tqdm(total=config.sampling.num_samples, unit=" samples", file=sys.stderr, disable=not first) as progress:
        for batch in draw(config.sampling, sampler, params, row, tokenizer, step, split_rows):
            if first:
                with writing(path):
                    if not samples:
                        kept = _make_way(path)
                    with path.open("a") as file:
                        file.writelines(json.dumps(dataclasses.asdict(drawn)) + "\n" for drawn in batch)
                for drawn in batch:
                    progress.write(f"{drawn.headline()}\n{drawn.text}\n", file=sys.stdout)
                progress.update(len(batch))
            samples += batch
    if first:
        print(f"{len(samples)} samples in {path}" + (f"; earlier ones are now in {kept}" if kept else ""))
    return [dataclasses.asdict(drawn) for drawn in samples]


def draw(
    c: SamplingConfig,
    sampler: Sampler,
    params: Params,
    row: Int[np.ndarray, "S"],
    tokenizer: Tokenizer | None,
    step: int,
    sharding: NamedSharding | None = None,
) -> Iterator[list[Sample]]:
    """Samples of one canvas row, batch by batch. All batches have one shape: the surplus of the last is dropped.

    Without a tokenizer they have no text, and their length counts the tokens as they were drawn. `sharding` is that of
    a batch of `c.batch_size` rows, where `params` are spread over a mesh; every host then gets all samples.
    """
    eos, parts = sampler.model.ids.eos, sampler.model.batch_shards
    batch = min(c.batch_size, -(-c.num_samples // parts) * parts)
    everywhere = None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec())

    def fill(params: Params, indices: Int[Array, "b"], canvas: Int[Array, "b S"]) -> Samples:
        return sampler(params, sequence_keys(c.seed, indices), canvas)

    def indices(first: int) -> Int[Array, "b"]:
        return jax.device_put(np.arange(first, first + batch), sharding)

    canvas = jax.device_put(np.tile(row, (batch, 1)), sharding)
    compiled = jax.jit(fill, out_shardings=everywhere).lower(params, indices(0), canvas).compile()
    for first in range(0, c.num_samples, batch):
        began = time.perf_counter()
        result = jax.device_get(compiled(params, indices(first), canvas))
        real = min(batch, c.num_samples - first)
        seconds = (time.perf_counter() - began) / real
        rows = [tokens.tolist() for tokens in result.tokens[:real]]
        yield [
            Sample(
                index=first + place,
                seed=c.seed,
                step=step,
                text=tokenizer.decode(tokens[1:]) if tokenizer else None,
                tokens=tokens,
                nfe=int(result.nfe[place]),
                cache_calls=int(result.cache_calls[place]),
                length=statistics.length(tokens, tokenizer) if tokenizer else sum(id != eos for id in tokens[1:]),
                entropy=statistics.entropy(tokens),
                seconds=seconds,
            )
            for place, tokens in enumerate(rows)
        ]


def _make_way(path: epath.Path) -> epath.Path | None:
    """Renames an existing file to the next free number, and returns its new name."""
    if not path.exists():
        return None
    kept = free_path(path)
    path.rename(kept)
    return kept
