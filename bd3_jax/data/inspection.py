"""`bd3 inspect`: what is in a prepared corpus."""

import collections

from etils import epath

from bd3_jax.data.manifest import is_prepared, load_lengths, load_manifest
from bd3_jax.data.pipeline import open_rows
from bd3_jax.errors import UserError

_BAR = 40  # characters of the longest bar
_ROWS = 2  # shown of every split


def inspect(directory: epath.PathLike) -> str:
    """Manifest, lengths of the documents and first rows of the corpus in `directory`, as text.

    The median and maximum are those that generated documents are compared with.

    Raises:
      UserError: nothing is prepared there, or it is damaged.
    """
    directory = epath.Path(directory)
    if not is_prepared(directory):
        raise UserError(f"nothing is prepared in {str(directory)!r}; allowed: a folder that bd3 prepare wrote")
    manifest = load_manifest(directory)
    lengths = load_lengths(directory)
    lines = [manifest.describe(), f"  tokenizer fingerprint {manifest.fingerprint}", f"  special ids {manifest.ids}"]
    for split, counts in manifest.splits.items():
        lines += ["", *describe_lengths(split, lengths[split])]
        if counts.rows:
            dataset = open_rows(directory, manifest, split)
            for number, row in enumerate(dataset.read(range(min(_ROWS, len(dataset))))):
                lines.append(f"row {number} of {split}: {dataset.tokenizer.decode(row)!r}")
    return "\n".join(lines)


def describe_lengths(split: str, lengths: collections.Counter[int]) -> list[str]:
    """Median, mean, maximum and a histogram of powers of two: bin n holds lengths from 2^(n-1) to 2^n - 1."""
    total = lengths.total()
    if not total:
        return [f"{split}: no documents"]
    mean = sum(length * count for length, count in lengths.items()) / total
    lines = [
        f"{split}: tokens per document without EOS: median {median(lengths):,g}, mean {mean:,.1f}, "
        f"maximum {max(lengths):,}"
    ]
    bins: collections.Counter[int] = collections.Counter()
    for length, count in lengths.items():
        bins[length.bit_length()] += count
    for n in range(min(bins), max(bins) + 1):
        bounds = f"{2 ** (n - 1) if n else 0:,} to {2**n - 1:,}"
        bar = "#" * -(-bins[n] * _BAR // max(bins.values()))
        lines.append(f"  {bounds:>21}  {bins[n]:>10,}  {bar}".rstrip())
    return lines


def median(lengths: collections.Counter[int]) -> float:
    """Of all documents; between the two middle ones their mean."""
    total, seen = lengths.total(), 0
    middle = ((total - 1) // 2, total // 2)
    found: list[int] = []
    for length in sorted(lengths):
        seen += lengths[length]
        found += [length] * sum(place < seen for place in middle[len(found) :])
    return sum(found) / 2
