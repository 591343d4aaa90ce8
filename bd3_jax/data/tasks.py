"""The parts of a preparation that any process can do: one input shard -> rows of every split it feeds."""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from etils import epath

from bd3_jax.data.corpora import Corpus, Shard
from bd3_jax.data.manifest import RowSettings
from bd3_jax.data.readers import Malformed
from bd3_jax.data.rows import RowWriter
from bd3_jax.data.tokenizers import load_tokenizer
from bd3_jax.errors import UserError
from bd3_jax.folders import in_bucket, write_text

Report = Callable[[int, int], None]  # takes (bytes read, documents) since the last call


@dataclasses.dataclass(frozen=True)
class Task:
    """One shard, to be written by any process; `result` appears when it is done.

    Two processes that do the same task at a time do not meet: they write the same bytes, each under temporary names of
    its own that end in .tmp, and what has its final name is whole.
    """

    corpus: Corpus
    shard: Shard
    settings: RowSettings
    tokenizer: epath.Path
    outputs: dict[str, epath.Path]
    result: epath.Path
    strict: bool

    def run(self, report: Report) -> None:
        tokenizer = load_tokenizer(self.tokenizer)
        malformed = MalformedCount(self.strict)
        # Files get their names by a move on the same disk, or a copy from this machine into the bucket.
        beside = None if in_bucket(self.result) else self.result.parent
        with tempfile.TemporaryDirectory(dir=beside, suffix=".tmp") as folder:
            scratch = epath.Path(folder)
            writers = {
                split: RowWriter(path, tokenizer, self.settings, scratch) for split, path in self.outputs.items()
            }
            for split, text in documents_of(self.corpus, self.shard, report, malformed):
                writers[split].add(text)
            counts = {split: dataclasses.asdict(writer.close()) for split, writer in writers.items()}
        result = {
            "splits": counts,
            "bytes": self._bytes(),
            "sha256": {split: writer.sha256 for split, writer in writers.items()},
            "lengths": {split: writer.lengths for split, writer in writers.items()},
            "malformed": malformed.count,
            "first": malformed.first,
        }
        write_text(self.result, json.dumps(result))

    def is_done(self) -> bool:
        """Whether the result can be read, the files are as long as it says, and `strict` allows what they hold.

        Files may be cut short where the machine went down.
        """
        try:
            result = json.loads(self.result.read_text())
            return result["bytes"] == self._bytes() and not (self.strict and result["malformed"])
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _bytes(self) -> dict[str, int]:
        """Of every split's file."""
        return {split: path.stat().length for split, path in self.outputs.items()}


Execute = Callable[[list[Task], Report], None]  # runs all tasks


def run_here(tasks: list[Task], report: Report, workers: int) -> None:
    """Runs every task in one of `workers` processes; with 1, in this one.

    Raises:
      UserError: the first of a task, or that a process was killed. Tasks that are running then are finished.
    """
    if workers == 1:
        for task in tasks:
            task.run(report)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy threads' locks
    progress = context.Array("q", 2)
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(tasks)), context, _start_worker, (progress,)) as pool:
        pending = {pool.submit(_run_in_worker, task) for task in tasks}
        try:
            while pending:
                done, pending = concurrent.futures.wait(pending, timeout=0.5, return_when="FIRST_COMPLETED")
                with progress:
                    size, documents = progress[:]
                    progress[:] = [0, 0]
                report(size, documents)
                for future in done:
                    future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, perhaps for want of memory; run the command again with fewer --workers"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_progress: Any = None  # of a worker process: bytes and documents that it has yet to tell


def _start_worker(progress: Any) -> None:
    global _progress
    _progress = progress
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a core for every process


def _run_in_worker(task: Task) -> None:
    def report(size: int, documents: int) -> None:
        with _progress:
            _progress[0] += size
            _progress[1] += documents

    task.run(report)


def documents_of(corpus: Corpus, shard: Shard, report: Report, malformed: Malformed) -> Iterator[tuple[str, str]]:
    """(split, document) of a shard, with reports on the way that add up to its size."""
    told = unreported = 0
    for split, text, position in corpus.documents(shard, malformed):
        yield split, text
        unreported += 1
        if unreported == 100:
            report(position - told, unreported)
            told, unreported = position, 0
    report(shard.size - told, unreported)


class MalformedCount:
    """Counts records without text, or raises UserError for the first."""

    def __init__(self, strict: bool):
        self._strict = strict
        self.count = 0
        self.first = ""

    def __call__(self, message: str) -> None:
        if self._strict:
            raise UserError(message)
        self.first = self.first or message
        self.count += 1
