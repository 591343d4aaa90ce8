"""Prepared rows -> batches, through Grain; with `data.mode = 'streaming'`, what `streaming.py` makes instead.

Training reads one endless sequence of rows: epoch after epoch, each in an order of its own that follows from the seed.
Row n of it is the same for any number of hosts and threads, so the number of rows consumed is the whole state of the
pipeline: batch k holds rows [start + k b, start + (k + 1) b), and each host reads its slice of it.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from jaxtyping import Bool, Int32

from bd3_jax.config import Config, DataConfig
from bd3_jax.data.manifest import Manifest, RowSettings, is_prepared, load_manifest
from bd3_jax.data.rows import check_metadata
from bd3_jax.data.streaming import Stream, open_stream, stream_eval_batches
from bd3_jax.data.tokenizers import Tokenizer, load_tokenizer
from bd3_jax.errors import UserError
from bd3_jax.folders import in_bucket, reachable

# Batches that are read ahead, and threads that read them: enough to hide a slow file system.
_READ_OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=16)
_ROWS_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One split of a prepared corpus, with random access to its rows."""

    directory: epath.Path
    split: str
    manifest: Manifest
    tokenizer: Tokenizer
    rows: Any  # TFDS data source: rows[i]["tokens"] [L]; rows.__getitems__ reads several at once

    @property
    def settings(self) -> RowSettings:
        return self.manifest.settings

    @property
    def place(self) -> str:
        """Where the rows come from, for messages."""
        return str(self.directory)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: Sequence[int]) -> Int32[np.ndarray, "b L"]:
        """The rows at `indices`, each in [0, len(self)).

        ArrayRecord opens its files by itself, from local paths and gs:// only, and compares its checksums.

        Raises:
          UserError: they cannot be read.
        """
        rows = np.zeros((len(indices), self.manifest.settings.length), np.int32)
        try:
            for place, row in enumerate(self.rows.__getitems__(list(indices))):
                rows[place] = row["tokens"]
        except Exception as error:  # RuntimeError for most things
            raise UserError(
                f"data.directory is {self.place!r}, whose rows cannot be read ({' '.join(str(error).split())[:300]}); "
                "allowed: an undamaged folder of bd3 prepare, local, or in gs:// with permission to read it"
            ) from None
        return rows


def open_data(data: DataConfig, length: int, split: str) -> Dataset | Stream:
    """Opens a split in the way that `data.mode` says. Raises UserError as `open_dataset` and `open_stream` do."""
    return (open_stream if data.mode == "streaming" else open_dataset)(data, length, split)


def open_eval_data(config: Config, in_training: bool) -> Dataset | Stream:
    """Opens `config.eval.split`, without BOS and EOS where `config.eval.without_special` says so.

    Then a prepared split has no more rows than validations during training look at, or all of them otherwise.

    Raises:
      UserError: as `open_data` does.
    """
    data, e, search = config.data, config.eval, config.search
    plain = e.without_special == "always" or (in_training and e.without_special == "training")
    if plain and data.mode == "streaming":
        data = dataclasses.replace(data, insert_special=False, insert_eos=False)
    rows = open_data(data, config.model.length, e.split)
    if not plain or isinstance(rows, Stream):
        return rows
    wanted = max(e.num_batches * e.batch_size, search.num_batches * search.batch_size)
    return without_special(rows, wanted if in_training and e.num_batches else 0)


def without_special(dataset: Dataset, count: int) -> Dataset:
    """The first `count` rows (0: all) of the same tokens without BOS and EOS, held in memory.

    Up to the end of the corpus' first input shard they are the rows that `bd3 prepare` makes with insert_special and
    insert_eos off; what fills no row is dropped once, at the end.
    """
    settings, ids, parts, found = dataset.settings, dataset.tokenizer.ids, [], 0
    if not settings.insert_special and not settings.insert_eos:
        return dataset
    for first in range(0, len(dataset), _ROWS_AT_ONCE):
        rows = dataset.read(range(first, min(first + _ROWS_AT_ONCE, len(dataset))))
        parts.append(rows[(rows != ids.bos) & (rows != ids.eos)])
        found += parts[-1].size
        if count and found >= count * settings.length:
            break
    whole = found // settings.length if count == 0 else min(count, found // settings.length)
    if whole == 0:
        raise UserError(f"split {dataset.split!r} of {dataset.place} has too few tokens for a row without BOS and EOS")
    cut = np.concatenate(parts)[: whole * settings.length].reshape(whole, settings.length)
    plain = dataclasses.replace(settings, insert_special=False, insert_eos=False)
    manifest = dataclasses.replace(dataset.manifest, settings=plain)
    return dataclasses.replace(dataset, manifest=manifest, rows=_InMemory(cut))


class _InMemory:
    """Rows as TFDS' data sources give them."""

    def __init__(self, rows: Int32[np.ndarray, "n L"]):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Int32[np.ndarray, " L"]]]:
        return [{"tokens": self._rows[index]} for index in indices]


def open_dataset(data: DataConfig, length: int, split: str) -> Dataset:
    """Opens a split of `data.directory` after checking that it was made with the given settings.

    Raises:
      UserError: nothing is prepared there, or with other settings, or the split is unknown or has no rows.
    """
    directory = reachable(data.directory, "data.directory")
    if not is_prepared(directory):
        raise UserError(
            f"data.directory is {data.directory!r}, where nothing is prepared; run: bd3 prepare --config=..."
        )
    manifest = load_manifest(directory)
    wanted = dataclasses.replace(RowSettings.of(data, length), source="")
    manifest.settings.require(wanted, directory, "prepare it so in another data.directory, or change the setting")
    if split not in manifest.splits:
        raise UserError(f"{directory} has no split {split!r}; allowed: {', '.join(manifest.splits)}")
    counts = manifest.splits[split]
    if counts.rows == 0:
        raise UserError(f"split {split!r} of {directory} has {counts.tokens} tokens, too few for a row of {length}")
    dataset = open_rows(directory, manifest, split)
    if in_bucket(directory):
        # One row, to know now whether it may be read. Each is an HTTP request; where that is too slow for a training,
        # copy the folder to every host (`gcloud storage rsync -r`) or mount it.
        dataset.read([0])
    return dataset


def open_rows(directory: epath.Path, manifest: Manifest, split: str) -> Dataset:
    """Opens a split that has rows, whatever the settings.

    Raises:
      UserError: the tokenizer or the features are not the manifest's, or files are missing or not as long as they
        were.
    """
    tokenizer = load_tokenizer(directory / "tokenizer")
    if tokenizer.fingerprint != manifest.fingerprint:
        raise UserError(f"{directory / 'tokenizer'} is not the tokenizer that {directory} was prepared with")
    try:
        check_metadata(directory, manifest)
        builder = tfds.builder_from_directory(directory)
        info = builder.info.splits[split]
        size = sum(path.stat().length for path in info.filepaths)
    except Exception as error:  # TFDS and protobuf have no base class in common
        raise UserError(f"{directory} is damaged ({' '.join(str(error).split())}); prepare the corpus anew") from None
    if size != info.num_bytes:
        raise UserError(
            f"{directory} is damaged: the files of split {split!r} have {size:,} bytes, but {info.num_bytes:,} were "
            "written; prepare the corpus anew"
        )
    return Dataset(directory, split, manifest, tokenizer, builder.as_data_source(split))


def train_batches(
    dataset: Dataset, batch_size: int, seed: int, start_row: int, process_index: int, process_count: int
) -> Iterator[Int32[np.ndarray, "local_b L"]]:
    """This host's slices of the global batches, without end.

    Args:
      dataset: any number of rows; a batch may span several epochs.
      batch_size: rows of a global batch, over all hosts. Host p reads rows [p b // P, (p + 1) b // P) of it.
      seed: of the order, modulo 2^32.
      start_row: rows consumed before, over all hosts; 0 at the start of training.
      process_index: p, this host.
      process_count: P, at most `batch_size`.
    """
    if process_count > batch_size:
        raise UserError(f"training.batch_size is {batch_size}; allowed: {process_count} or more, a row for every host")
    low, high = (p * batch_size // process_count for p in (process_index, process_index + 1))
    order = grain.MapDataset.range(len(dataset)).seed(seed % 2**32).shuffle().repeat()

    def read(first: int) -> Int32[np.ndarray, "local_b L"]:
        return dataset.read([order[n] for n in range(first + low, first + high)])

    return iter(grain.MapDataset.range(start_row, sys.maxsize, batch_size).map(read).to_iter_dataset(_READ_OPTIONS))


def count_batches(dataset: Dataset | Stream, batch_size: int, num_batches: int) -> int | None:
    """How many batches `eval_batches` gives; None where it is not known before."""
    if isinstance(dataset, Stream):
        return num_batches or None
    count = -(-len(dataset) // batch_size)
    return min(count, num_batches) if num_batches else count


def eval_batches(
    dataset: Dataset | Stream, batch_size: int, num_batches: int
) -> Iterator[tuple[Int32[np.ndarray, "b L"], Bool[np.ndarray, " b"]]]:
    """The first `num_batches` batches in order (0: all), each with what is a row and what only fills the last batch.

    All batches have the same shape; filling rows repeat the last row and are to be left out of every count.
    """
    if isinstance(dataset, Stream):
        return stream_eval_batches(dataset, batch_size, num_batches)
    count = count_batches(dataset, batch_size, num_batches)

    def read(batch: int) -> tuple[Int32[np.ndarray, "b L"], Bool[np.ndarray, " b"]]:
        indices = np.arange(batch * batch_size, (batch + 1) * batch_size)
        return dataset.read(np.minimum(indices, len(dataset) - 1).tolist()), indices < len(dataset)

    return iter(grain.MapDataset.range(count).map(read).to_iter_dataset(_READ_OPTIONS))
