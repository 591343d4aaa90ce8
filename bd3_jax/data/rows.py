"""Token rows on disk: packing, ArrayRecord files with TFDS' features, and the metadata by which TFDS opens them."""

import collections
import contextlib
import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from jaxtyping import Int

from bd3_jax.data.manifest import Manifest, RowSettings, SplitCounts
from bd3_jax.data.tokenizers import Tokenizer
from bd3_jax.errors import UserError
from bd3_jax.folders import in_bucket, move
from bd3_jax.special_ids import SpecialIds

BATCH_CHARACTERS = 2**20  # of documents that are tokenised at once


def pack(
    stream: Int[np.ndarray, " n"], length: int, ids: SpecialIds, insert_special: bool
) -> tuple[Int[np.ndarray, "rows L"], Int[np.ndarray, " rest"]]:
    """Cuts a stream of tokens into rows, and returns them with what is left."""
    body = length - 2 if insert_special else length
    count = len(stream) // body
    rows = stream[: count * body].reshape(count, body)
    if insert_special:
        rows = np.pad(rows, ((0, 0), (1, 1)), constant_values=((0, 0), (ids.bos, ids.eos)))
    return rows, stream[count * body :]


class Packer:
    """Documents -> rows, the same for the same documents however they come in batches."""

    def __init__(self, tokenizer: Tokenizer, settings: RowSettings, rest: Sequence[int] = ()):
        """`rest`: tokens left from the documents before."""
        self._tokenizer = tokenizer
        self._settings = settings
        self.rest: Int[np.ndarray, " rest"] = np.array(rest, np.int32)

    def pack(self, texts: Sequence[str]) -> tuple[Int[np.ndarray, "rows L"], list[int]]:
        """The rows that are full now, and the number of tokens of every text without EOS."""
        ids, settings = self._tokenizer.ids, self._settings
        eos = [ids.eos] if settings.insert_eos else []
        encoded = self._tokenizer.encode_batch(texts)
        tokens = [np.array(tokens + eos, np.int32) for tokens in encoded]
        rows, self.rest = pack(np.concatenate([self.rest, *tokens]), settings.length, ids, settings.insert_special)
        return rows, [len(tokens) for tokens in encoded]


class RowWriter:
    """Writes documents as rows into one file, which appears under its name when it is complete.

    Raises:
      UserError: the file cannot be written.
    """

    def __init__(self, path: epath.Path, tokenizer: Tokenizer, settings: RowSettings, scratch: epath.Path):
        """`scratch`: a local folder of this process alone, where the file lies until then."""
        self._path, self._temporary = path, scratch / path.name
        with _writing(path):
            self._writer = ArrayRecordWriter(str(self._temporary), "group_size:1")  # one row a read, as Grain wants it
        self._features = _features(settings.length, tokenizer.ids)
        self._packer = Packer(tokenizer, settings)
        self._eos = int(settings.insert_eos)
        self._texts: list[str] = []
        self._characters = 0
        self.lengths: collections.Counter[int] = collections.Counter()  # of documents, in tokens without EOS
        self._counts = SplitCounts(0, 0, 0, 0)
        self._sha256 = hashlib.sha256()

    def add(self, text: str) -> None:
        self._texts.append(text)
        self._characters += len(text)
        if self._characters >= BATCH_CHARACTERS:
            self._flush()

    @property
    def sha256(self) -> str:
        """Of the rows so far, hex; see `manifest.join_digests`."""
        return self._sha256.hexdigest()

    def close(self) -> SplitCounts:
        self._flush()
        with _writing(self._path):
            self._writer.close()
            move(self._temporary, self._path)
        return dataclasses.replace(self._counts, dropped=len(self._packer.rest))

    def _flush(self) -> None:
        rows, lengths = self._packer.pack(self._texts)
        self.lengths.update(lengths)
        self._sha256.update(rows.astype("<i4").tobytes())
        with _writing(self._path):
            for row in rows.astype(self._features["tokens"].np_dtype):
                self._writer.write(self._features.serialize_example({"tokens": row}))
        tokens = sum(lengths) + self._eos * len(lengths)
        self._counts += SplitCounts(documents=len(lengths), tokens=tokens, rows=len(rows), dropped=0)
        self._texts, self._characters = [], 0


def shard_path(directory: epath.Path, corpus: str, split: str, number: int, count: int) -> epath.Path:
    """Where TFDS looks for shard `number` of `count`."""
    return _template(directory, corpus, split).sharded_filepath(shard_index=number, num_shards=count)


def write_metadata(directory: epath.Path, manifest: Manifest, rows: Mapping[str, Sequence[int]]) -> None:
    """Makes `directory` a data set for `tfds.builder_from_directory`; `rows` has the rows of every shard of a split."""
    corpus, length = manifest.settings.corpus, manifest.settings.length
    splits = []
    for split, lengths in rows.items():
        template = _template(directory, corpus, split)
        size = sum(path.stat().length for path in template.sharded_filepaths(len(lengths)))
        splits.append(
            tfds.core.SplitInfo(name=split, shard_lengths=list(lengths), num_bytes=size, filename_template=template)
        )
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=_features(length, manifest.ids),
        split_infos=splits,
        check_data=False,  # it would read through TensorFlow, which is not installed
        description=f"{corpus} as rows of {length} tokens",
        license=manifest.licence,
    )


def check_metadata(directory: epath.Path, manifest: Manifest) -> None:
    """Makes sure that TFDS runs none of the code that the metadata of `directory` may name.

    TFDS imports the module of every `pythonClassName`, in `features.json` and in what `dataset_info.json` may hold
    under `features`, and the folder may be somebody else's.

    Raises:
      ValueError: a file names other features than `write_metadata` writes for such rows.
      OSError: a file cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        _features(manifest.settings.length, manifest.ids).save_config(folder)
        expected = _read_json(epath.Path(folder) / "features.json")
    if _read_json(directory / "features.json") != expected:
        raise ValueError(f"features.json is not that of rows of {manifest.settings.length} tokens")
    if "features" in _read_json(directory / "dataset_info.json"):
        raise ValueError("dataset_info.json has features of its own")


def _read_json(path: epath.Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _features(length: int, ids: SpecialIds) -> tfds.features.FeaturesDict:
    dtype = np.uint16 if ids.vocab_size <= 2**16 else np.int32
    return tfds.features.FeaturesDict({"tokens": tfds.features.Tensor(shape=(length,), dtype=dtype, encoding="bytes")})


def _template(directory: epath.Path, corpus: str, split: str) -> tfds.core.ShardedFileTemplate:
    return tfds.core.ShardedFileTemplate(
        data_dir=directory, dataset_name=corpus, split=split, filetype_suffix="array_record"
    )


@contextlib.contextmanager
def _writing(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # ArrayRecord raises RuntimeError for a full disk, and the libraries of buckets have errors of their own.
        if not isinstance(error, OSError | RuntimeError) and not in_bucket(path):
            raise
        raise UserError(
            f"cannot write {path}: {' '.join(str(error).split())}; finished shards stay, so run the same command again "
            "when that is set right"
        ) from None
