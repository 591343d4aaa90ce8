"""A small corpus in the native format of `files`, and the settings that prepare it."""

import json
from pathlib import Path

import pytest

from bd3_jax.config import DataConfig

SENTENCE = "the quick brown fox — 狐 🦊 — jumps over a lazy dog, isn't it? <|endoftext|> [MASK] \t\n\n"
WORDS = SENTENCE.split(" ")


def document(n: int) -> str:
    """Document n: a few to a few dozen words, different for every n."""
    return f"{n}: " + " ".join(WORDS[(n * n + 3 * i) % len(WORDS)] for i in range(3 + n % 23))


@pytest.fixture
def documents() -> list[str]:
    return [document(n) for n in range(200)]


@pytest.fixture
def corpus(tmp_path: Path, documents: list[str]) -> Path:
    """A folder whose sorted files hold `documents` in order."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_bytes(documents[0].encode())
    lines = [json.dumps({"text": text, "id": n}, ensure_ascii=n % 2 == 0) for n, text in enumerate(documents[1:])]
    (folder / "b.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    (folder / "notes.md").write_text("not part of the corpus")
    return folder


@pytest.fixture
def data(tmp_path: Path, corpus: Path) -> DataConfig:
    return DataConfig(
        mode="prepared",
        corpus="files",
        source=str(corpus),
        field="",
        directory=str(tmp_path / "rows"),
        tokenizer="bpe",
        vocab_size=300,
        insert_special=False,
        insert_eos=True,
    )


@pytest.fixture
def three_files(data, tmp_path, documents, monkeypatch):
    """The corpus in three files, each a shard."""
    for path in (tmp_path / "corpus").iterdir():
        path.unlink()
    for n in range(3):
        (tmp_path / "corpus" / f"{n}.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in documents[n::3]))
    monkeypatch.setattr("bd3_jax.data.corpora.SHARD_BYTES", 1)
    return data
