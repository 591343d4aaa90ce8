"""Documents -> tokens -> rows of L tokens in ArrayRecord files that TFDS opens, with a manifest.

    DIRECTORY/
      manifest.json                                      settings, tokenizer fingerprint, special ids, counts
      lengths.json                                       how many documents of each split have how many tokens
      tokenizer/tokenizer.json
      dataset_info.json, features.json                   for `tfds.builder_from_directory(DIRECTORY)`
      CORPUS-SPLIT.array_record-00000-of-00001, ...      {"tokens": uint16 [L]} (int32 where V > 65,536), in order

The tokens of a split's documents, EOS after each if `insert_eos`, are one stream. It is cut into rows of L tokens, or
with `insert_special` into L - 2 tokens between BOS and EOS. What fills no row is dropped, once per input shard; a small
corpus is one shard. A shard's rows depend on its files and the settings alone, so any number of workers writes the
same.

Everything is written into `DIRECTORY.unfinished`, where a file has its name only when it is complete, and moved into
place at the end. A preparation that was interrupted goes on with the first shard that is missing and ends with the same
bytes. So does one that ended with an error: the tokenizer and finished shards are kept. What is removed is the folder
of a preparation that fails before it has a tokenizer, and of one whose corpus proves to have too little text.

In a bucket, where renaming copies, everything is written into DIRECTORY itself, the manifest last: it alone makes a
folder a prepared one. A bucket knows no lock either. Two preparations of one folder at a time, with the same settings,
write the same objects; the worst that happens is that one of them ends with an error and is to be started again.
"""

import dataclasses
import json
import os
import tempfile
from functools import partial, reduce
from typing import Any

from etils import epath
from tqdm import tqdm

from bd3_jax.config import DataConfig
from bd3_jax.data.corpora import Corpus, Shard, fingerprint, get_corpus
from bd3_jax.data.manifest import (
    FORMAT,
    Manifest,
    RowSettings,
    SplitCounts,
    is_prepared,
    join_digests,
    load_manifest,
    save_lengths,
)
from bd3_jax.data.rows import shard_path, write_metadata
from bd3_jax.data.tasks import Execute, MalformedCount, Report, Task, documents_of, run_here
from bd3_jax.data.tokenizers import FILE_NAME as TOKENIZER_FILE
from bd3_jax.data.tokenizers import TRAINED, Tokenizer, load_tokenizer, train_bpe
from bd3_jax.errors import UserError
from bd3_jax.folders import alone, in_bucket, reachable, real_path, require_writable, write_text

BEGUN = "begun.json"  # in the folder of a preparation: from which settings and files


def prepare(
    data: DataConfig, length: int, workers: int = 1, strict: bool = False, execute: Execute | None = None
) -> Manifest:
    """Prepares the corpus that `data` names as rows of `length` tokens, unless that is done already.

    Prints the licence and the counts of every split. After an error the tokenizer and finished shards, where there are
    any, are kept, and the same call goes on with them; a corpus with too little text leaves nothing.

    Args:
      data: which corpus, and how.
      length: L.
      workers: processes; with 1, this process tokenises in all cores.
      strict: a record that holds no text is an error, also where it was left out before; else it is left out and
        counted.
      execute: runs the tasks elsewhere, in place of `workers` processes.

    Raises:
      UserError: unknown corpus, missing or malformed source, too little text for a row, a full disk, or a folder in the
        way that holds other things or rows made with other settings, is a mount point, or that another process is
        preparing.
    """
    if workers < 1:
        raise UserError(f"--workers is {workers}; allowed: 1 or more")
    settings = RowSettings.of(data, length)
    directory = reachable(data.directory, "data.directory")
    if in_bucket(directory) and not str(directory).startswith("gs://"):
        raise UserError(
            f"data.directory is {data.directory!r}, where rows could not be read; allowed: a folder, or gs://"
        )
    if os.path.islink(directory):
        directory = real_path(directory)  # nothing need be there yet
    if is_prepared(directory):
        return _already(directory, settings, strict)
    if os.path.ismount(directory):
        raise UserError(
            f"data.directory is {data.directory!r}, a mount point, which rows cannot be moved onto; allowed: "
            "a folder inside it"
        )
    begun = in_bucket(directory) and (directory / BEGUN).exists()
    if not begun and directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(
            f"data.directory is {data.directory!r}, which holds other things; allowed: a new or empty folder"
        )
    require_writable(directory, "data.directory")
    busy = f"data.directory is {data.directory!r}, which another process is preparing; allowed: another, or later"
    with alone(directory.parent / f".{directory.name}.lock", busy):
        if is_prepared(directory):  # by another process, since that was looked up
            return _already(directory, settings, strict)
        manifest = _prepare_alone(directory, data, settings, execute or partial(run_here, workers=workers), strict)
    print(f"Prepared: {directory}\n{manifest.describe()}")
    return manifest


def _already(directory: epath.Path, settings: RowSettings, strict: bool) -> Manifest:
    """What is prepared in `directory`, if it is what is wanted."""
    manifest = _load_wanted(directory, settings, strict, "choose another data.directory, or delete this one")
    if in_bucket(directory):
        _remove_leftovers(directory)  # if it was interrupted just then
    print(f"Already prepared: {directory}\n{manifest.describe()}")
    return manifest


def _load_wanted(directory: epath.Path, settings: RowSettings, strict: bool, advice: str) -> Manifest:
    """Raises UserError where `directory` was prepared with other settings, or without records that `strict` wants."""
    manifest = load_manifest(directory)
    manifest.settings.require(settings, directory, advice)
    if strict and manifest.malformed:
        raise UserError(
            f"{directory} was prepared without {manifest.malformed:,} malformed records, the first: "
            f"{manifest.first_malformed}; allowed with --strict: none; {advice}"
        )
    return manifest


def _prepare_alone(
    directory: epath.Path, data: DataConfig, settings: RowSettings, execute: Execute, strict: bool
) -> Manifest:
    """Goes on with what is unfinished, or begins; makes `directory` of it."""
    unfinished = directory if in_bucket(directory) else directory.parent / f"{directory.name}.unfinished"
    if is_prepared(unfinished):  # and all but moved into place
        manifest = _load_wanted(unfinished, settings, strict, "delete that folder to start over")
    else:
        try:
            manifest = _prepare(unfinished, data, settings, execute, strict)
        except OSError as error:
            raise UserError(f"data.directory is {data.directory!r}, where preparing failed: {error}") from None
    _remove_leftovers(unfinished)
    if unfinished != directory:
        if directory.exists():  # and is empty
            directory.rmdir()
        unfinished.rename(directory)
    return manifest


def _remove_leftovers(directory: epath.Path) -> None:
    """Removes what only serves to go on with a preparation, the marker last."""
    _remove_temporary(directory)
    for pattern in ("shard-*.json", BEGUN):
        for path in directory.glob(pattern):
            path.unlink(missing_ok=True)  # perhaps another process did


def _remove_temporary(directory: epath.Path) -> None:
    """Removes what processes that were killed had begun to write; a bucket has nothing of the kind."""
    if in_bucket(directory):
        return
    for pattern in ("*.tmp", "tokenizer/*.tmp"):
        for path in directory.glob(pattern):
            if path.is_dir():  # of a task
                path.rmtree()
            else:
                path.unlink(missing_ok=True)


def _prepare(
    unfinished: epath.Path, data: DataConfig, settings: RowSettings, execute: Execute, strict: bool
) -> Manifest:
    corpus = dataclasses.replace(get_corpus(data.corpus), field=settings.field)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            shards = corpus.shards(data.source, epath.Path(scratch))
        except OSError as error:
            raise UserError(f"data.source is {data.source!r}, which cannot be read: {error}") from None
        began = _begin(unfinished, settings, shards)
        try:
            tokenizer = _tokenizer(unfinished / "tokenizer", corpus, shards, settings, strict)
        except UserError:
            if began and in_bucket(unfinished):
                (unfinished / BEGUN).unlink(missing_ok=True)  # all else may be another process'
            elif began:
                unfinished.rmtree()
            raise
        results = _write_shards(unfinished, corpus, shards, settings, execute, strict)
    return _finish(unfinished, corpus, settings, tokenizer, results)


def _begin(unfinished: epath.Path, settings: RowSettings, shards: list[Shard]) -> bool:
    """Makes the folder, or makes sure that what lies there was begun from the same settings and files.

    Returns:
      Whether it was made.
    """
    begun = {"format": FORMAT, "settings": dataclasses.asdict(settings), "inputs": fingerprint(shards)}
    marker = unfinished / BEGUN
    advice = "delete that folder to start over"
    if marker.exists():
        try:
            found = json.loads(marker.read_text())
        except ValueError:
            raise UserError(f"{marker} is damaged; delete its folder to start over") from None
        if found.get("format") != FORMAT:
            raise UserError(f"{unfinished} was begun by an earlier version of bd3_jax; {advice}")
        RowSettings(**found["settings"]).require(settings, unfinished, advice)
        if found["inputs"] != begun["inputs"]:
            raise UserError(f"{unfinished} was begun from other files than {settings.corpus} now has; {advice}")
        _remove_temporary(unfinished)
        print(f"Continuing {unfinished}")
        return False
    if unfinished.exists() and any(path.suffix != ".tmp" for path in unfinished.iterdir()):
        raise UserError(f"{unfinished} is in the way; {advice}")
    write_text(marker, json.dumps(begun))
    return True


def _tokenizer(
    directory: epath.Path, corpus: Corpus, shards: list[Shard], settings: RowSettings, strict: bool
) -> Tokenizer:
    """Loads the tokenizer of the settings, or trains it; a copy stays with the rows."""
    if (directory / TOKENIZER_FILE).exists():
        return load_tokenizer(directory)
    if settings.tokenizer == TRAINED:
        with _progress_bar("training the tokenizer", shards) as bar:
            report = _report_to(bar)
            documents = (
                text
                for shard in shards
                for split, text in documents_of(corpus, shard, report, MalformedCount(strict))
                if split == "train"
            )
            tokenizer = train_bpe(documents, settings.vocab_size)
    else:
        tokenizer = load_tokenizer(settings.tokenizer)
    tokenizer.save(directory)
    return tokenizer


def _write_shards(
    unfinished: epath.Path, corpus: Corpus, shards: list[Shard], settings: RowSettings, execute: Execute, strict: bool
) -> list[dict[str, Any]]:
    """Writes the shards that are missing or damaged; returns the result of every shard, in order."""
    totals = {split: sum(split in shard.splits for shard in shards) for shard in shards for split in shard.splits}
    seen = dict.fromkeys(totals, 0)
    tasks = []
    for number, shard in enumerate(shards):
        outputs = {s: shard_path(unfinished, corpus.name, s, seen[s], totals[s]) for s in shard.splits}
        seen |= {split: seen[split] + 1 for split in shard.splits}
        result = unfinished / f"shard-{number:05d}.json"
        tasks.append(Task(corpus, shard, settings, unfinished / "tokenizer", outputs, result, strict))
    there = {path.name for path in unfinished.iterdir()}
    missing = [task for task in tasks if task.result.name not in there or not task.is_done()]
    with _progress_bar("tokenising", shards) as bar:
        bar.update(sum(task.shard.size for task in tasks) - sum(task.shard.size for task in missing))
        if missing:
            execute(missing, _report_to(bar))
    return [json.loads(task.result.read_text()) for task in tasks]


def _finish(
    unfinished: epath.Path, corpus: Corpus, settings: RowSettings, tokenizer: Tokenizer, results: list[dict[str, Any]]
) -> Manifest:
    """Writes metadata and manifest, once all shards are there."""
    counts: dict[str, list[SplitCounts]] = {}
    digests: dict[str, list[str]] = {}
    for result in results:
        for split, numbers in result["splits"].items():
            counts.setdefault(split, []).append(SplitCounts(**numbers))
            digests.setdefault(split, []).append(result["sha256"][split])
    manifest = Manifest(
        settings=settings,
        licence=corpus.licence,
        fingerprint=tokenizer.fingerprint,
        ids=tokenizer.ids,
        splits={split: reduce(SplitCounts.__add__, parts) for split, parts in counts.items()},
        sha256={split: join_digests(parts) for split, parts in digests.items()},
        malformed=sum(result["malformed"] for result in results),
        first_malformed=next((result["first"] for result in results if result["first"]), ""),
    )
    _require_rows(unfinished, manifest)
    save_lengths(unfinished, [result["lengths"] for result in results])
    write_metadata(unfinished, manifest, {split: [n.rows for n in parts] for split, parts in counts.items()})
    manifest.save(unfinished)
    return manifest


def _require_rows(unfinished: epath.Path, manifest: Manifest) -> None:
    """Raises UserError, and cleans up, where the corpus is too small to be of use."""
    settings, splits = manifest.settings, manifest.splits
    if all(split.documents == 0 for split in splits.values()):
        problem = f"no documents ({manifest.malformed} malformed records)"
    elif "train" in splits and splits["train"].rows == 0:
        problem = f"{splits['train'].tokens} training tokens, too few for a row of model.length = {settings.length}"
    else:
        return
    unfinished.rmtree()
    raise UserError(f"corpus {settings.corpus} (data.source = {settings.source!r}) has {problem}")


def _progress_bar(what: str, shards: list[Shard]) -> tqdm:
    """Counts bytes of the input; silent where the output is no terminal."""
    return tqdm(total=sum(s.size for s in shards), desc=what, unit="B", unit_scale=True, disable=None)


def _report_to(bar: tqdm) -> Report:
    """Advances `bar` and shows documents per second beside it."""
    documents = 0

    def report(size: int, new: int) -> None:
        nonlocal documents
        documents += new
        elapsed = bar.format_dict["elapsed"] or 1e-9
        bar.set_postfix_str(f"{documents / elapsed:,.0f} documents/s", refresh=False)
        bar.update(size)

    return report
