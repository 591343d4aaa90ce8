"""Files -> documents, one reader a format, chosen by the file's ending.

A reader yields `(document, bytes of the file read so far)` for every record; the second drives progress bars. All text
is UTF-8. A record that holds no text is None, after `malformed` was told where it is and what is wrong; a file that
cannot be read at all is an error.
"""

import contextlib
import functools
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet
from etils import epath

from bd3_jax.errors import UserError
from bd3_jax.folders import in_bucket

Malformed = Callable[[str], None]
Documents = Iterator[tuple[str | None, int]]
Reader = Callable[[epath.Path, str, Malformed], Documents]

# text8 is one text; it is read in pieces of so many characters.
TEXT8_PIECE = 10**6


def read_documents(path: epath.Path, field: str, malformed: Malformed) -> Documents:
    """Documents of one file; `field` names the text in formats whose records have several fields.

    Raises:
      UserError: naming a file that cannot be read.
    """
    reader = next(reader for ending, reader in READERS.items() if path.name.endswith(ending))
    with _named(path):
        yield from reader(path, field, malformed)


def count_documents(path: epath.Path, field: str) -> int:
    """Number of records, the malformed ones included."""
    if path.suffix == ".parquet":
        with _named(path), path.open("rb") as file:
            return pyarrow.parquet.read_metadata(file).num_rows
    return sum(1 for _ in read_documents(path, field, lambda _: None))


@contextlib.contextmanager
def _named(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # RuntimeError is what zipfile has for an encrypted archive.
        known = (OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, pyarrow.ArrowInvalid)
        if not isinstance(error, known) and not in_bucket(path):  # whose library has errors of its own
            raise
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from None


def _read_txt(path: epath.Path, field: str, malformed: Malformed) -> Documents:
    """The whole file is one document."""
    del field
    content = path.read_bytes()
    yield _checked(lambda: _utf8(content), str(path), malformed), len(content)


def _read_jsonl(path: epath.Path, field: str, malformed: Malformed) -> Documents:
    """A document a line; blank lines are none."""
    with path.open("rb") as file:
        yield from _json_lines(file, file.tell, path, field, malformed)


def _read_jsonl_zst(path: epath.Path, field: str, malformed: Malformed) -> Documents:
    with path.open("rb") as file, pyarrow.input_stream(file, compression="zstd") as stream:
        yield from _json_lines(io.BufferedReader(stream), file.tell, path, field, malformed)


def _json_lines(
    lines: BinaryIO, position: Callable[[], int], path: epath.Path, field: str, malformed: Malformed
) -> Documents:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            read = functools.partial(_json_text, line, field)
            yield _checked(read, f"{path}, line {number}", malformed), position()


def _read_json(path: epath.Path, field: str, malformed: Malformed) -> Documents:
    """One object of objects: `{key: {field: document, ...}, ...}`."""
    content = path.read_bytes()
    try:
        records = json.loads(_utf8(content))
    except (ValueError, RecursionError) as error:  # the latter from JSON that is nested too deeply
        raise UserError(f"{path}: {error}") from None
    if not isinstance(records, dict):
        raise UserError(f"{path} holds a {type(records).__name__}; allowed: an object {{key: {{{field!r}: text}}}}")
    for number, (key, record) in enumerate(records.items(), start=1):
        read = functools.partial(_text, record, field)
        yield _checked(read, f"{path}, record {key!r}", malformed), len(content) * number // len(records)


def _read_parquet(path: epath.Path, field: str, malformed: Malformed) -> Documents:
    """A document a row, from the column `field`."""
    size = path.stat().length
    with path.open("rb") as file, pyarrow.parquet.ParquetFile(file) as table:
        if field not in table.schema_arrow.names:
            raise UserError(f"{path} has no column {field!r}; found: {', '.join(table.schema_arrow.names)}")
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=[field]):
            for value in batch.column(0).to_pylist():
                number += 1
                read = functools.partial(_text, {field: value}, field)
                yield _checked(read, f"{path}, row {number}", malformed), size * number // table.metadata.num_rows


def _read_text8(path: epath.Path, field: str, malformed: Malformed) -> Documents:
    """The member `text8` of the archive, in pieces that belong together without anything between."""
    del field, malformed
    size = path.stat().length
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        if "text8" not in archive.namelist():
            raise UserError(f"{path} has no member text8; found: {', '.join(archive.namelist()[:5])}")
        total = archive.getinfo("text8").file_size
        with archive.open("text8") as stream:
            done = 0
            while piece := stream.read(TEXT8_PIECE):
                if not piece.isascii():
                    raise UserError(f"{path}: the member text8 is not ASCII, so it is not the corpus text8")
                done += len(piece)
                yield piece.decode("ascii"), size * done // total


READERS: dict[str, Reader] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".jsonl.zst": _read_jsonl_zst,
    ".parquet": _read_parquet,
    ".json": _read_json,
    "text8.zip": _read_text8,
}


def _checked(read: Callable[[], str], where: str, malformed: Malformed) -> str | None:
    """What `read` returns, or None after reporting why it cannot."""
    try:
        return read()
    except (ValueError, RecursionError) as error:  # as in `_read_json`
        malformed(f"{where}: {error}")
        return None


def _json_text(line: bytes, field: str) -> str:
    return _text(json.loads(_utf8(line)), field)


def _text(record: Any, field: str) -> str:
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"no text in the field {field!r}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"half of a surrogate pair, which is no text, in the field {field!r}") from None
    return text


def _utf8(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8, {error.reason} at byte {error.start}") from None
