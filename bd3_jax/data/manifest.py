"""What lies beside token rows: `manifest.json` and `lengths.json`.

The manifest says how the rows were made and what is in them; it is checked whenever rows are read.
"""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from bd3_jax.config import DataConfig
from bd3_jax.data.corpora import get_corpus
from bd3_jax.data.tokenizers import TRAINED
from bd3_jax.errors import UserError
from bd3_jax.folders import write_text
from bd3_jax.special_ids import SpecialIds

FILE_NAME = "manifest.json"
LENGTHS = "lengths.json"
FORMAT = 2  # 1 had no checksums

# Settings that decide what the rows are, under the names by which a user knows them.
_NAMES = {
    "corpus": "data.corpus",
    "source": "data.source",
    "field": "data.field",
    "tokenizer": "data.tokenizer",
    "vocab_size": "data.vocab_size",
    "length": "model.length",
    "insert_special": "data.insert_special",
    "insert_eos": "data.insert_eos",
}


@dataclasses.dataclass(frozen=True)
class RowSettings:
    """The settings that rows depend on."""

    corpus: str
    source: str  # only compared when preparing: rows may be read where their source is not
    field: str
    tokenizer: str
    vocab_size: int  # asked of a tokenizer that is trained on the corpus; 0 for any other
    length: int  # L
    insert_special: bool
    insert_eos: bool

    @classmethod
    def of(cls, data: DataConfig, length: int) -> "RowSettings":
        """Raises UserError for an unknown corpus or rows without room for a token."""
        corpus = get_corpus(data.corpus)
        tokenizer = data.tokenizer or corpus.tokenizer
        if data.insert_special and length < 3:
            raise UserError(
                f"model.length is {length}; allowed with data.insert_special: 3 or more (BOS, a token, EOS)"
            )
        return cls(
            corpus=corpus.name,
            source=data.source,
            field=data.field or corpus.field,
            tokenizer=tokenizer,
            vocab_size=data.vocab_size if tokenizer == TRAINED else 0,
            length=length,
            insert_special=data.insert_special,
            insert_eos=data.insert_eos,
        )

    def require(self, wanted: "RowSettings", directory: epath.Path, advice: str) -> None:
        """Raises UserError that names the first setting in which `wanted` differs from what `directory` was made with.

        An empty source stands for the corpus' usual place and differs from no other.
        """
        for field, name in _NAMES.items():
            found, asked = getattr(self, field), getattr(wanted, field)
            if found != asked and not (field == "source" and "" in (found, asked)):
                raise UserError(f"{directory} was prepared with {name} = {found!r}, but it is {asked!r}; {advice}")


@dataclasses.dataclass(frozen=True)
class SplitCounts:
    """`tokens` counts EOS after documents, not BOS and EOS of rows; `dropped` of them fill no row."""

    documents: int
    tokens: int
    rows: int
    dropped: int

    def __add__(self, other: "SplitCounts") -> "SplitCounts":
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return SplitCounts(*(a + b for a, b in zip(mine, theirs, strict=True)))


@dataclasses.dataclass(frozen=True)
class Manifest:
    settings: RowSettings
    licence: str  # of the corpus' text
    fingerprint: str  # of the tokenizer
    ids: SpecialIds
    splits: dict[str, SplitCounts]
    sha256: dict[str, str]  # of the rows of every split, see `join_digests`
    malformed: int  # records without text, which were left out
    first_malformed: str  # where the first of them is and what is wrong with it

    def save(self, directory: epath.Path) -> None:
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        write_text(directory / FILE_NAME, json.dumps(content, indent=2) + "\n")

    def describe(self) -> str:
        """A few lines for the terminal."""
        s = self.settings
        lines = [
            f"{s.corpus} (licence: {self.licence}), tokenizer {s.tokenizer}, V = {self.ids.vocab_size:,} with the mask",
            f"  rows of {s.length} tokens, {'BOS and EOS in every row' if s.insert_special else 'no BOS or EOS added'}"
            f", {'EOS after every document' if s.insert_eos else 'nothing between documents'}",
        ]
        lines += [
            f"  {name}: {n.documents:,} documents, {n.tokens:,} tokens, {n.rows:,} rows; {n.dropped:,} tokens dropped"
            for name, n in self.splits.items()
        ]
        lines += [
            f"  warning: split {name!r} has no rows, so training, which validates on eval.split, needs another, or more"
            " documents, or files in subfolders train and validation"
            for name, n in self.splits.items()
            if n.rows == 0
        ]
        if self.malformed:
            lines.append(f"  {self.malformed:,} malformed records left out, the first: {self.first_malformed}")
        return "\n".join(lines)


def is_prepared(directory: epath.Path) -> bool:
    """Whether rows lie there. The folder of a run has a copy of their manifest, without `lengths.json`."""
    return (directory / FILE_NAME).exists() and (directory / LENGTHS).exists()


def load_manifest(directory: epath.Path) -> Manifest:
    """Raises UserError where the file is damaged or of another format."""
    path = directory / FILE_NAME
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("format")
        if version != FORMAT:
            advice = "an earlier version of bd3_jax wrote it; delete the folder and prepare the corpus anew"
            raise UserError(f"{path} has format {version}; allowed: {FORMAT} ({advice})")
        return Manifest(
            settings=RowSettings(**content.pop("settings")),
            ids=SpecialIds(**content.pop("ids")),
            splits={name: SplitCounts(**counts) for name, counts in content.pop("splits").items()},
            **content,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); prepare the corpus anew") from None


def join_digests(digests: Iterable[str]) -> str:
    """Sha256 (hex) of a split from those of its shards, in order; theirs is of all tokens as little-endian int32."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def save_lengths(directory: epath.Path, shards: Sequence[Mapping[str, Mapping[str, int]]]) -> None:
    """Adds up the shards' `{split: {tokens of a document: documents}}`."""
    sums: dict[str, collections.Counter[int]] = {}
    for shard in shards:
        for split, lengths in shard.items():
            sums.setdefault(split, collections.Counter()).update({int(n): count for n, count in lengths.items()})
    content = {split: dict(sorted(lengths.items())) for split, lengths in sums.items()}
    write_text(directory / LENGTHS, json.dumps(content))


def load_lengths(directory: epath.Path) -> dict[str, collections.Counter[int]]:
    """For every split: tokens of a document (without EOS) -> documents. Raises UserError where the file is damaged."""
    path = directory / LENGTHS
    try:
        content = json.loads(path.read_text())
        return {
            split: collections.Counter({int(n): count for n, count in lengths.items()})
            for split, lengths in content.items()
        }
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); prepare the corpus anew") from None
