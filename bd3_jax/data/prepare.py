"""Documents -> tokens -> rows of L tokens in ArrayRecord files that TFDS opens, with a manifest.

    DIRECTORY/
      manifest.json                                      settings, tokenizer fingerprint, special ids, counts
      tokenizer/tokenizer.json
      dataset_info.json, features.json                   for `tfds.builder_from_directory(DIRECTORY)`
      CORPUS-SPLIT.array_record-00000-of-00001, ...      {"tokens": uint16 [L]} (int32 where V > 65,536), in order

The tokens of a split's documents, EOS after each if `insert_eos`, are one stream. It is cut into rows of L tokens, or
with `insert_special` into L - 2 tokens between BOS and EOS. What fills no row is dropped, once per input shard; a small
corpus is one shard.

Everything is written into `DIRECTORY.unfinished`, where a file has its name only when it is complete, and moved into
place at the end. A preparation that was interrupted goes on with the first shard that is missing and ends with the same
bytes.
"""

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from jaxtyping import Int
from tqdm import tqdm

from bd3_jax.config import DataConfig
from bd3_jax.data.corpora import Corpus, Shard, get_corpus
from bd3_jax.data.manifest import Manifest, RowSettings, SplitCounts, is_prepared, load_manifest
from bd3_jax.data.tokenizers import TRAINED, SpecialIds, Tokenizer, load_tokenizer, train_bpe
from bd3_jax.errors import UserError

_BATCH_CHARACTERS = 2**20  # of documents that are tokenised at once


def prepare(data: DataConfig, length: int) -> Manifest:
    """Prepares the corpus that `data` names as rows of `length` tokens, unless that is done already.

    Prints the licence and the counts of every split.

    Raises:
      UserError: unknown corpus, missing or malformed source, too little text for a row, or a folder in the way that
        holds other things or rows made with other settings.
    """
    settings = RowSettings.of(data, length)
    directory = epath.Path(data.directory)
    if is_prepared(directory):
        manifest = load_manifest(directory)
        manifest.settings.require(settings, directory, "choose another data.directory, or delete this one")
        print(f"Already prepared: {directory}\n{manifest.describe()}")
        return manifest
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(
            f"data.directory is {data.directory!r}, which holds other things; allowed: a new or empty folder"
        )

    corpus = get_corpus(data.corpus)
    unfinished = directory.parent / f"{directory.name}.unfinished"
    with tempfile.TemporaryDirectory() as scratch:
        shards = corpus.shards(data.source, epath.Path(scratch))
        _begin(unfinished, settings, shards)
        try:
            manifest = _write(unfinished, corpus, shards, settings)
        except UserError:  # what is wrong will be set right, and the input will then be another
            unfinished.rmtree()
            raise
    if directory.exists():  # and is empty
        directory.rmdir()
    unfinished.rename(directory)
    print(f"Prepared: {directory}\n{manifest.describe()}")
    return manifest


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


def _begin(unfinished: epath.Path, settings: RowSettings, shards: list[Shard]) -> None:
    """Makes the folder, or makes sure that what lies there was begun from the same settings and files."""
    inputs = [[shard.split, shard.size, [path.name for path in shard.files]] for shard in shards]
    begun = {
        "settings": dataclasses.asdict(settings),
        "inputs": hashlib.sha256(json.dumps(inputs).encode()).hexdigest(),
    }
    marker = unfinished / "begun.json"
    advice = "delete that folder to start over"
    if marker.exists():
        found = json.loads(marker.read_text())
        RowSettings(**found["settings"]).require(settings, unfinished, advice)
        if found["inputs"] != begun["inputs"]:
            raise UserError(f"{unfinished} was begun from other files than {settings.corpus} now has; {advice}")
        print(f"Continuing {unfinished}")
        return
    if unfinished.exists() and any(unfinished.iterdir()):
        raise UserError(f"{unfinished} is in the way; {advice}")
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        _write_text(marker, json.dumps(begun))
    except OSError as error:
        raise UserError(f"data.directory: cannot write {unfinished} ({error.strerror})") from None


def _write(unfinished: epath.Path, corpus: Corpus, shards: list[Shard], settings: RowSettings) -> Manifest:
    tokenizer = _tokenizer(unfinished / "tokenizer", corpus, shards, settings)
    names = {split: sum(split in shard.splits for shard in shards) for shard in shards for split in shard.splits}
    counts: dict[str, list[SplitCounts]] = {split: [] for split in names}
    with _progress_bar("tokenising", shards) as bar:
        for number, shard in enumerate(shards):
            paths = {
                split: _template(unfinished, corpus.name, split).sharded_filepath(
                    shard_index=len(counts[split]), num_shards=names[split]
                )
                for split in shard.splits
            }
            done = unfinished / f"shard-{number:05d}.json"
            if not done.exists():
                shard_counts = _write_shard(corpus, shard, tokenizer, settings, paths, bar)
                _write_text(done, json.dumps({split: dataclasses.asdict(n) for split, n in shard_counts.items()}))
            for split, n in json.loads(done.read_text()).items():
                counts[split].append(SplitCounts(**n))
            bar.update(sum(s.size for s in shards[: number + 1]) - bar.n)
    manifest = Manifest(
        settings=settings,
        licence=corpus.licence,
        fingerprint=tokenizer.fingerprint,
        ids=tokenizer.ids,
        splits={split: sum(parts, SplitCounts(0, 0, 0, 0)) for split, parts in counts.items()},
    )
    if all(split.documents == 0 for split in manifest.splits.values()):
        raise UserError(f"corpus {corpus.name} (data.source = {settings.source!r}) has no documents")
    train = manifest.splits.get("train")
    if train and train.rows == 0:
        raise UserError(
            f"corpus {corpus.name} has {train.tokens} training tokens, too few for a row of {settings.length}"
        )
    _write_metadata(unfinished, corpus, settings, tokenizer, counts)
    manifest.save(unfinished)
    for leftover in (*unfinished.glob("shard-*.json"), unfinished / "begun.json"):
        leftover.unlink()
    return manifest


def _tokenizer(directory: epath.Path, corpus: Corpus, shards: list[Shard], settings: RowSettings) -> Tokenizer:
    """Loads the tokenizer of the settings, or trains it; a copy stays with the rows."""
    if directory.exists():
        return load_tokenizer(directory)
    if settings.tokenizer == TRAINED:
        tokenizer = train_bpe(_training_documents(corpus, shards), settings.vocab_size)
    else:
        tokenizer = load_tokenizer(settings.tokenizer)
    tokenizer.save(directory)
    return tokenizer


def _training_documents(corpus: Corpus, shards: list[Shard]) -> Iterator[str]:
    with _progress_bar("training the tokenizer", shards) as bar:
        for split, text in _documents(corpus, shards, bar):
            if split == "train":
                yield text


def _documents(corpus: Corpus, shards: list[Shard], bar: tqdm) -> Iterator[tuple[str, str]]:
    for shard in shards:
        before = bar.n
        for split, text, position in corpus.documents(shard):
            yield split, text
            bar.update(before + position - bar.n)


def _write_shard(
    corpus: Corpus, shard: Shard, tokenizer: Tokenizer, settings: RowSettings, paths: dict[str, epath.Path], bar: tqdm
) -> dict[str, SplitCounts]:
    writers = {split: _RowWriter(path, tokenizer, settings) for split, path in paths.items()}
    for split, text in _documents(corpus, [shard], bar):
        writers[split].add(text)
    return {split: writer.close() for split, writer in writers.items()}


class _RowWriter:
    """Writes one split of one shard into one file, which appears under its name when it is complete."""

    def __init__(self, path: epath.Path, tokenizer: Tokenizer, settings: RowSettings):
        self._path = path
        self._temporary = path.parent / f"{path.name}.tmp"
        self._writer = ArrayRecordWriter(str(self._temporary), "group_size:1")  # one row a read, as Grain wants it
        self._features = _features(settings.length, tokenizer.ids)
        self._tokenizer = tokenizer
        self._settings = settings
        self._texts: list[str] = []
        self._characters = 0
        self._rest = np.zeros(0, np.int32)
        self._counts = SplitCounts(0, 0, 0, 0)

    def add(self, text: str) -> None:
        self._texts.append(text)
        self._characters += len(text)
        if self._characters >= _BATCH_CHARACTERS:
            self._flush()

    def close(self) -> SplitCounts:
        self._flush()
        self._writer.close()
        self._temporary.replace(self._path)
        return dataclasses.replace(self._counts, dropped=len(self._rest))

    def _flush(self) -> None:
        ids, settings = self._tokenizer.ids, self._settings
        eos = [ids.eos] if settings.insert_eos else []
        tokens = [np.array(tokens + eos, np.int32) for tokens in self._tokenizer.encode_batch(self._texts)]
        new = SplitCounts(documents=len(tokens), tokens=sum(map(len, tokens)), rows=0, dropped=0)
        rows, self._rest = pack(np.concatenate([self._rest, *tokens]), settings.length, ids, settings.insert_special)
        for row in rows.astype(self._features["tokens"].np_dtype):
            self._writer.write(self._features.serialize_example({"tokens": row}))
        self._counts += dataclasses.replace(new, rows=len(rows))
        self._texts, self._characters = [], 0


def _features(length: int, ids: SpecialIds) -> tfds.features.FeaturesDict:
    dtype = np.uint16 if ids.vocab_size <= 2**16 else np.int32
    return tfds.features.FeaturesDict({"tokens": tfds.features.Tensor(shape=(length,), dtype=dtype, encoding="bytes")})


def _template(directory: epath.Path, corpus: str, split: str) -> tfds.core.ShardedFileTemplate:
    return tfds.core.ShardedFileTemplate(
        data_dir=directory, dataset_name=corpus, split=split, filetype_suffix="array_record"
    )


def _write_metadata(
    directory: epath.Path,
    corpus: Corpus,
    settings: RowSettings,
    tokenizer: Tokenizer,
    counts: dict[str, list[SplitCounts]],
) -> None:
    splits = []
    for split, parts in counts.items():
        template = _template(directory, corpus.name, split)
        size = sum(path.stat().length for path in template.sharded_filepaths(len(parts)))
        splits.append(
            tfds.core.SplitInfo(
                name=split, shard_lengths=[n.rows for n in parts], num_bytes=size, filename_template=template
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=_features(settings.length, tokenizer.ids),
        split_infos=splits,
        check_data=False,  # it would read through TensorFlow, which is not installed
        description=f"{corpus.name} as rows of {settings.length} tokens",
        license=corpus.licence,
    )


def _progress_bar(what: str, shards: list[Shard]) -> tqdm:
    """Counts bytes of the input; silent where the output is no terminal."""
    return tqdm(total=sum(s.size for s in shards), desc=what, unit="B", unit_scale=True, disable=None)


def _write_text(path: epath.Path, text: str) -> None:
    temporary = path.parent / f"{path.name}.tmp"
    temporary.write_text(text)
    temporary.replace(path)
