import json
import zipfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from etils import epath

from bd3_jax.data.readers import count_documents, read_documents
from bd3_jax.errors import UserError

TEXTS = ["one", "", "two\r\nlines\u2028and\x85more", "狐 🦊", "x" * 100_000]


def write(path, texts):
    """The same documents in any format."""
    lines = "\n".join(json.dumps({"text": text, "id": 1}) for text in texts).encode()
    if path.name.endswith(".jsonl"):
        path.write_bytes(lines)
    elif path.name.endswith(".jsonl.zst"):
        with pyarrow.output_stream(str(path), compression="zstd") as stream:
            stream.write(lines)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    else:
        path.write_text(json.dumps({str(n): {"text": text} for n, text in enumerate(texts)}))
    return epath.Path(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.parquet", "a.json"])
def test_every_format_gives_the_same_documents(tmp_path, name):
    path = write(tmp_path / name, TEXTS)
    documents = list(read_documents(path, "text", pytest.fail))
    assert [text for text, _ in documents] == TEXTS
    assert count_documents(path, "text") == len(TEXTS)
    positions = [position for _, position in documents]
    assert positions == sorted(positions)
    assert positions[-1] <= path.stat().length


def test_a_txt_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\r\n\n狐".encode())
    assert list(read_documents(epath.Path(tmp_path / "a.txt"), "text", pytest.fail)) == [("one\r\n\n狐", 9)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', "a.jsonl, line 3: Expecting ',' delimiter"),
        ("a.jsonl", b'{"text": "a"}\n{"content": "b"}\n', "a.jsonl, line 2: no text in the field 'text'"),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 100_000 + b"\n", "a.jsonl, line 2: maximum recursion depth exceeded"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 1}\n', "a.jsonl, line 2: no text in the field 'text'"),
        ("a.jsonl", b'{"text": "a"}\n["text"]\n', "a.jsonl, line 2: no text in the field 'text'"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud83e"}\n', "a.jsonl, line 2: half of a surrogate pair"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl, line 2: not UTF-8, invalid start byte at byte 10"),
        ("a.json", b'{"x": {"text": "a"}, "y": {"text": null}}', "a.json, record 'y': no text in the field 'text'"),
        ("a.txt", b"caf\xe9", "a.txt: not UTF-8, unexpected end of data at byte 3"),
    ],
)
def test_malformed_records_are_named_and_left_out(tmp_path, name, content, message):
    path = epath.Path(tmp_path / name)
    path.write_bytes(content)
    messages = []
    documents = [text for text, _ in read_documents(path, "text", messages.append)]
    assert [text for text in documents if text is not None] == ([] if name == "a.txt" else ["a"])
    assert documents.count(None) == 1
    assert [m.removeprefix(f"{tmp_path}/").startswith(message) for m in messages] == [True]


def test_malformed_rows_of_a_table(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), tmp_path / "a.parquet")
    messages = []
    path = epath.Path(tmp_path / "a.parquet")
    assert [text for text, _ in read_documents(path, "text", messages.append)] == ["a", None, "b"]
    assert messages == [f"{path}, row 2: no text in the field 'text'"]
    assert count_documents(path, "text") == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"PAR1 but not really", "cannot read .*a.parquet: "),
        ("a.jsonl.zst", b"not compressed", "cannot read .*a.jsonl.zst: .*decompress"),
        ("text8.zip", b"no archive", "cannot read .*text8.zip: File is not a zip file"),
        ("a.json", b"{", "a.json: Expecting"),
        ("a.json", b"[" * 100_000, "a.json: maximum recursion depth exceeded"),
        ("a.json", b"[]", "a.json holds a list; allowed: an object"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        list(read_documents(epath.Path(tmp_path / name), "text", pytest.fail))
    assert "\n" not in str(error.value)


def test_a_damaged_archive_is_named(tmp_path):
    path = epath.Path(tmp_path / "text8.zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("text8", np.random.default_rng(0).choice(list(b"abc "), 100_000).astype(np.uint8).tobytes())
    content = path.read_bytes()
    path.write_bytes(content[:1000] + b"\xff" * 100 + content[1100:])
    with pytest.raises(UserError, match=r"cannot read .*text8.zip: (Error -3 while decompressing|Bad CRC)") as error:
        list(read_documents(path, "", pytest.fail))
    assert "\n" not in str(error.value)


def test_text8_is_ascii(tmp_path):
    path = epath.Path(tmp_path / "text8.zip")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("text8", "caf\xe9")
    with pytest.raises(UserError, match=r"text8.zip: the member text8 is not ASCII"):
        list(read_documents(path, "", pytest.fail))


def test_a_truncated_file_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl.zst", [str(n) * 50 for n in range(10_000)])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cannot read .*zst"):
        list(read_documents(path, "text", lambda _: None))


def test_a_missing_column_names_those_there_are(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "label": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has no column 'text'; found: body, label"):
        list(read_documents(epath.Path(tmp_path / "a.parquet"), "text", pytest.fail))
