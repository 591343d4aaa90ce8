"""Files -> documents, one reader a format, chosen by the file's ending.

A reader yields `(document, bytes of the file read so far)`; the second drives progress bars. All text is UTF-8.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from bd3_jax.errors import UserError

Reader = Callable[[epath.Path, str], Iterator[tuple[str, int]]]


def read_documents(path: epath.Path, field: str) -> Iterator[tuple[str, int]]:
    """Documents of one file; `field` names the text in formats whose records have several fields.

    Raises:
      UserError: naming the file, and the line or record, that holds no text.
    """
    return READERS[path.suffix](path, field)


def _read_txt(path: epath.Path, field: str) -> Iterator[tuple[str, int]]:
    """The whole file is one document."""
    del field
    content = path.read_bytes()
    yield _utf8(content, str(path)), len(content)


def _read_jsonl(path: epath.Path, field: str) -> Iterator[tuple[str, int]]:
    """A document a line; blank lines are none."""
    position = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            position += len(line)
            if line.strip():
                where = f"{path}, line {number}"
                yield _text(_json(line, where), field, where), position


def _read_json(path: epath.Path, field: str) -> Iterator[tuple[str, int]]:
    """One object of objects: `{key: {field: document, ...}, ...}`."""
    content = path.read_bytes()
    records = _json(content, str(path))
    if not isinstance(records, dict):
        raise UserError(f"{path} holds a {type(records).__name__}; allowed: an object {{key: {{{field!r}: text}}}}")
    for number, (key, record) in enumerate(records.items(), start=1):
        yield _text(record, field, f"{path}, record {key!r}"), len(content) * number // len(records)


READERS: dict[str, Reader] = {".txt": _read_txt, ".jsonl": _read_jsonl, ".json": _read_json}


def _json(content: bytes, where: str) -> Any:
    try:
        return json.loads(_utf8(content, where))
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from None


def _text(record: Any, field: str, where: str) -> str:
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        raise UserError(f"{where} has no text in the field {field!r}")
    text = record[field]
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} has half of a surrogate pair in the field {field!r}, which is no text") from None
    return text


def _utf8(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8: {error.reason} at byte {error.start}") from None
