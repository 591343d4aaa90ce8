"""Corpus files -> shuffled batches, tokenised and packed while training goes on; nothing is prepared or written.

Rows are packed as `bd3 prepare` packs them: the rows of an input shard are the same, in the same order. The order of
training is less random than that of prepared rows: every epoch takes the input shards in an order of its own, that
follows from the seed; host p of P takes every P-th of that endless sequence, and shuffles rows only within windows of
`WINDOW`, some of which span two epochs. So documents that lie side by side in a file are read at about the same time.

The position is that of Grain's iterators: how much of which shard this host had read when the current window began. It
means nothing to another number of hosts. Restoring reads the shard again up to there, without tokenising it, and fills
the window.
"""

import atexit
import dataclasses
import itertools
import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from etils import epath
from jaxtyping import Bool, Int32

from bd3_jax.config import DataConfig
from bd3_jax.data.corpora import Corpus, Shard, fingerprint, get_corpus
from bd3_jax.data.manifest import RowSettings
from bd3_jax.data.rows import BATCH_CHARACTERS, Packer
from bd3_jax.data.tasks import MalformedCount
from bd3_jax.data.tokenizers import TRAINED, Tokenizer, load_tokenizer
from bd3_jax.errors import UserError

# Rows among which a host shuffles: at L = 1024 some 18 MB of text, tokenised while the window before is consumed.
WINDOW = 4096


@dataclasses.dataclass(frozen=True)
class Stream:
    """One split of a corpus that is not prepared."""

    corpus: Corpus
    split: str
    settings: RowSettings
    tokenizer: Tokenizer
    shards: tuple[Shard, ...]  # those that the split has a part in

    @property
    def place(self) -> str:
        """Where the rows come from, for messages."""
        return f"the stream of {self.corpus.name}"


def open_stream(data: DataConfig, length: int, split: str) -> Stream:
    """Finds the files of a corpus, and fetches them where `data.source` is empty.

    Raises:
      UserError: unknown corpus or split, missing files, or a tokenizer that would have to be trained first.
    """
    settings = RowSettings.of(data, length)
    if settings.tokenizer == TRAINED:
        raise UserError(
            f"data.tokenizer is {TRAINED!r}, which bd3 prepare trains; allowed with data.mode = 'streaming': one that "
            "exists, as gpt2 or the path of a tokenizer.json, for instance of a prepared part of the corpus"
        )
    tokenizer = load_tokenizer(settings.tokenizer)
    corpus = dataclasses.replace(get_corpus(data.corpus), field=settings.field)
    scratch = tempfile.mkdtemp(prefix="bd3-")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)  # the stream may be read until then
    try:
        shards = corpus.shards(data.source, epath.Path(scratch))
    except OSError as error:
        raise UserError(f"data.source is {data.source!r}, which cannot be read: {error}") from None
    splits = list(dict.fromkeys(split for shard in shards for split in shard.splits))
    if split not in splits:
        raise UserError(f"corpus {corpus.name} has no split {split!r}; allowed: {', '.join(splits)}")
    return Stream(corpus, split, settings, tokenizer, tuple(s for s in shards if split in s.splits))


def stream_batches(
    stream: Stream, batch_size: int, seed: int, process_index: int, process_count: int
) -> grain.DatasetIterator:
    """This host's slices `[local_b, L]` (int32) of the global batches, without end.

    The iterator's state can be saved and restored with `grain.checkpoint`, for the same arguments.

    Args:
      stream: what to read.
      batch_size: rows of a global batch, over all hosts. Host p gives rows [p b // P, (p + 1) b // P) of it.
      seed: of the order.
      process_index: p, this host.
      process_count: P, at most `batch_size` and the number of input shards.

    Raises:
      UserError: too many hosts.
    """
    if process_count > batch_size:
        raise UserError(f"training.batch_size is {batch_size}; allowed: {process_count} or more, a row for every host")
    if process_count > len(stream.shards):
        raise UserError(
            f"{stream.place} has {len(stream.shards)} input shards (files, or small files up to 64 MiB together), too "
            f"few for {process_count} hosts; allowed: more files, or data.mode = 'prepared'"
        )
    low, high = (p * batch_size // process_count for p in (process_index, process_index + 1))
    order = grain.MapDataset.range(len(stream.shards)).seed(seed % 2**32).shuffle().repeat()
    rows = _Rows(stream, order[process_index::process_count])
    # The seed of a window is this one plus the number of the window, and has 32 bits.
    windows = grain.experimental.WindowShuffleIterDataset(rows, window_size=WINDOW, seed=seed % 2**31)
    batches = windows.batch(high - low)
    ahead = -(-WINDOW // (high - low))  # all of a window, so that nobody waits for the next
    return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=ahead))


def stream_eval_batches(
    stream: Stream, batch_size: int, num_batches: int
) -> Iterator[tuple[Int32[np.ndarray, "b L"], Bool[np.ndarray, " b"]]]:
    """The split in the order of its files, as `pipeline.eval_batches` gives the prepared one; the same on every host.

    Raises:
      UserError: the split has no rows.
    """
    rows = iter(_Rows(stream, range(len(stream.shards))))
    for count in itertools.count():
        if num_batches and count == num_batches:
            return
        batch = list(itertools.islice(rows, batch_size))
        if not batch and not count:
            raise UserError(f"split {stream.split!r} of {stream.place} has too few tokens for a row")
        if not batch:
            return
        is_real = np.arange(batch_size) < len(batch)
        yield np.stack([*batch, *[batch[-1]] * (batch_size - len(batch))]), is_real


class _Rows(grain.IterDataset):
    """The rows of the stream's shards, which come in the given order."""

    def __init__(self, stream: Stream, order: Sequence[int]):
        super().__init__()
        self._stream = stream
        self._order = order

    def __iter__(self) -> "_RowIterator":
        return _RowIterator(self._stream, self._order)


@dataclasses.dataclass(frozen=True)
class _Position:
    """Where a batch of documents begins, that is tokenised at once."""

    place: int = 0  # in the order of the shards
    documents: int = 0  # of the split, read of that shard before
    rest: Sequence[int] = ()  # tokens of them that filled no row


class _RowIterator(grain.DatasetIterator):
    """Its state: a position, how many rows were taken from there on, and what they were made of."""

    def __init__(self, stream: Stream, order: Sequence[int]):
        super().__init__()
        self._stream = stream
        self._order = order
        self._made_of = {"files": fingerprint(stream.shards), "tokenizer": stream.tokenizer.fingerprint}
        self._position = _Position()
        self._batches = self._read(self._position)
        self._rows: Int32[np.ndarray, "rows L"] = np.zeros((0, stream.settings.length), np.int32)
        self._taken = 0  # of these rows

    def __next__(self) -> Int32[np.ndarray, " L"]:
        while self._taken == len(self._rows):
            self._position, self._rows = next(self._batches)
            self._taken = 0
        self._taken += 1
        return self._rows[self._taken - 1]

    def get_state(self) -> dict[str, Any]:
        return {"made_of": self._made_of, "position": dataclasses.asdict(self._position), "taken": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        for name, found in self._made_of.items():
            if state["made_of"][name] != found:
                raise UserError(f"{self._stream.place}: its {name} changed since the checkpoint was saved")
        self._position = _Position(**state["position"])
        self._batches, self._rows, self._taken = self._read(self._position), self._rows[:0], 0
        for _ in range(state["taken"]):
            next(self)

    def _read(self, start: _Position) -> Iterator[tuple[_Position, Int32[np.ndarray, "rows L"]]]:
        """From `start` on: rows that were made at once, and where their documents begin."""
        barren = set()  # shards that gave no row since one did
        for place in range(start.place, len(self._order)):
            here = start if place == start.place else _Position(place)
            packer = Packer(self._stream.tokenizer, self._stream.settings, here.rest)
            number = self._order[place]
            if not here.documents:
                barren.add(number)
            for position, texts in self._texts(self._stream.shards[number], here):
                position = dataclasses.replace(position, rest=packer.rest.tolist())
                rows, _ = packer.pack(texts)
                if len(rows):
                    barren.clear()
                yield position, rows
            if len(barren) == len(self._stream.shards) < len(self._order):
                raise UserError(f"split {self._stream.split!r} of {self._stream.place} has too few tokens for a row")

    def _texts(self, shard: Shard, start: _Position) -> Iterator[tuple[_Position, list[str]]]:
        """Documents of the split to be tokenised at once, and where they begin (the rest is not filled in)."""
        malformed = MalformedCount(strict=False)
        documents = self._stream.corpus.documents(shard, malformed)
        mine = (text for split, text, _ in documents if split == self._stream.split)
        begin = end = start.documents
        texts, characters = [], 0
        for end, text in enumerate(itertools.islice(mine, begin, None), start=begin + 1):
            texts.append(text)
            characters += len(text)
            if characters >= BATCH_CHARACTERS:
                yield _Position(start.place, begin), texts
                begin, texts, characters = end, [], 0
        if texts:
            yield _Position(start.place, begin), texts
        if malformed.count:
            logging.getLogger(__name__).warning(
                "%d malformed records left out, the first: %s", malformed.count, malformed.first
            )
