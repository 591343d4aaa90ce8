import dataclasses
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath

from bd3_jax.data import prepare as module
from bd3_jax.data.corpora import split_by_hash
from bd3_jax.data.manifest import SplitCounts, load_manifest
from bd3_jax.data.pipeline import open_dataset
from bd3_jax.data.prepare import prepare
from bd3_jax.errors import UserError


def rows_of(data, length, split):
    return open_dataset(data, length, split).read(range(len(open_dataset(data, length, split))))


def content_of(directory):
    return {p.relative_to(directory): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("insert_eos", [True, False])
@pytest.mark.parametrize("insert_special", [True, False])
@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
def test_rows_are_those_of_packing_by_hand(data, documents, tokenizer, insert_special, insert_eos):
    data = dataclasses.replace(data, tokenizer=tokenizer, insert_special=insert_special, insert_eos=insert_eos)
    length = 17
    manifest = prepare(data, length)
    for split in ("train", "validation"):
        dataset = open_dataset(data, length, split)
        ids = dataset.tokenizer.ids
        stream, count = [], 0
        for text in documents:
            if split_by_hash(text) == split:
                stream += dataset.tokenizer.encode(text) + [ids.eos] * insert_eos
                count += 1
        expected = []
        rest = list(stream)
        while len(rest) >= (length - 2 if insert_special else length):
            body = [rest.pop(0) for _ in range(length - 2 if insert_special else length)]
            expected.append([ids.bos, *body, ids.eos] if insert_special else body)
        assert rows_of(data, length, split).tolist() == expected
        assert manifest.splits[split] == SplitCounts(count, len(stream), len(expected), len(rest))


def test_text_comes_back(data, documents):
    prepare(data, 16)
    dataset = open_dataset(data, 16, "train")
    text = dataset.tokenizer.decode(dataset.read(range(len(dataset))).ravel())
    train = [t for t in documents if split_by_hash(t) == "train"]
    assert "".join(t + "<|endoftext|>" for t in train).startswith(text)
    assert len(text) > 0.99 * sum(map(len, train))


def test_text_that_looks_like_a_special_token_is_text(data, corpus):
    for path in corpus.iterdir():
        path.unlink()
    (corpus / "train").mkdir()
    (corpus / "train" / "a.txt").write_text("<|endoftext|>[MASK]" * 20)
    data = dataclasses.replace(data, tokenizer="bytes")
    prepare(data, 10)
    ids = open_dataset(data, 10, "train").tokenizer.ids
    assert not np.isin(rows_of(data, 10, "train"), [ids.eos, ids.mask]).any()


def test_two_runs_write_the_same_bytes(data, tmp_path):
    again = dataclasses.replace(data, directory=str(tmp_path / "again"))
    prepare(data, 16)
    prepare(again, 16)
    one, two = (content_of(tmp_path / name) for name in ("rows", "again"))
    assert one == two
    assert len([name for name in one if ".array_record-" in str(name)]) == 2


def test_no_document_is_in_both_splits(data, documents, corpus):
    (corpus / "c.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in documents))  # every one once more
    data = dataclasses.replace(data, tokenizer="bytes")
    counts = prepare(data, 8).splits
    texts = {}
    for split in ("train", "validation"):
        dataset = open_dataset(data, 8, split)
        stream = dataset.read(range(len(dataset))).ravel()
        cuts = np.split(stream, np.flatnonzero(stream == dataset.tokenizer.ids.eos) + 1)[:-1]
        texts[split] = [dataset.tokenizer.decode(cut[:-1]) for cut in cuts]
        assert counts[split].documents - len(texts[split]) in (0, 1)  # the last may lose its EOS
    assert not set(texts["train"]) & set(texts["validation"])
    assert set(documents) - set(texts["train"]) - set(texts["validation"]) <= {documents[-1]}
    assert len(texts["validation"]) >= 5


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
def test_tfds_opens_the_folder(data, tokenizer):
    manifest = prepare(dataclasses.replace(data, tokenizer=tokenizer), 16)
    builder = tfds.builder_from_directory(data.directory)
    assert builder.name == "files"
    assert {name: info.num_examples for name, info in builder.info.splits.items()} == {
        name: counts.rows for name, counts in manifest.splits.items()
    }
    for split, source in ((split, builder.as_data_source(split)) for split in manifest.splits):
        assert len(source) == manifest.splits[split].rows
        assert source[3]["tokens"].dtype == np.uint16
        assert source[3]["tokens"].shape == (16,)


def test_large_vocabularies_are_written_in_32_bits(data, tmp_path):
    vocabulary = {"[CLS]": 0, "[MASK]": 1, "[UNK]": 2} | {f"w{n}": n + 3 for n in range(70_000)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"model": model, "pre_tokenizer": {"type": "BertPreTokenizer"}})
    )
    folder = tmp_path / "corpus" / "train"
    folder.mkdir()
    for path in (tmp_path / "corpus").glob("*.*"):
        path.unlink()
    (folder / "a.txt").write_text("w69999 w5 unheard of w69998")
    data = dataclasses.replace(data, tokenizer=str(tmp_path / "tokenizer.json"))
    prepare(data, 6)
    assert rows_of(data, 6, "train").tolist() == [[70_002, 8, 2, 2, 70_001, 0]]


def test_the_manifest_says_what_was_made(data):
    manifest = prepare(data, 16)
    assert load_manifest(epath.Path(data.directory)) == manifest
    tokenizer = open_dataset(data, 16, "train").tokenizer
    assert manifest.fingerprint == tokenizer.fingerprint
    assert manifest.ids == tokenizer.ids
    assert manifest.settings.length == 16
    assert manifest.settings.vocab_size == 300 == tokenizer.ids.vocab_size - 1


def test_done_is_kept_and_reported(data, capsys, tmp_path):
    first = prepare(data, 16)
    before = content_of(tmp_path / "rows")
    assert "Prepared" in capsys.readouterr().out
    assert prepare(data, 16) == first
    out = capsys.readouterr().out
    assert "Already prepared" in out
    assert "train: " in out
    assert "that of the files" in out  # the licence
    assert content_of(tmp_path / "rows") == before
    assert prepare(dataclasses.replace(data, source=""), 16) == first  # the source need not be there any more


@pytest.mark.parametrize(
    ("change", "length", "message"),
    [
        ({}, 32, r"model\.length = 16, but it is 32"),
        ({"insert_eos": False}, 16, r"data\.insert_eos = True, but it is False"),
        ({"insert_special": True}, 16, r"data\.insert_special = False, but it is True"),
        ({"tokenizer": "bytes"}, 16, r"data\.tokenizer = 'bpe', but it is 'bytes'"),
        ({"vocab_size": 301}, 16, r"data\.vocab_size = 300, but it is 301"),
        ({"field": "id"}, 16, r"data\.field = 'text', but it is 'id'"),
        ({"source": "elsewhere"}, 16, r"data\.source = '.*corpus', but it is 'elsewhere'"),
        ({"corpus": "wikipedia_summaries"}, 16, r"data\.corpus = 'files', but it is 'wikipedia_summaries'"),
    ],
)
def test_rows_made_with_other_settings_are_never_overwritten(data, tmp_path, change, length, message):
    prepare(data, 16)
    before = content_of(tmp_path / "rows")
    with pytest.raises(UserError, match=message):
        prepare(dataclasses.replace(data, **change), length)
    assert content_of(tmp_path / "rows") == before


def test_the_text_may_be_in_another_field(data, corpus, documents):
    for path in corpus.iterdir():
        path.unlink()
    (corpus / "a.jsonl").write_text("\n".join(json.dumps({"text": "no", "body": text}) for text in documents))
    data = dataclasses.replace(data, tokenizer="bytes", field="body")
    prepare(data, 16)
    text = open_dataset(data, 16, "train").tokenizer.decode(rows_of(data, 16, "train")[0])
    assert documents[0].startswith(text[: len(documents[0])])
    with pytest.raises(UserError, match=r"data\.field = 'body', but it is 'text'"):
        open_dataset(dataclasses.replace(data, field=""), 16, "train")


def test_the_size_of_a_vocabulary_that_is_not_trained_does_not_matter(data):
    data = dataclasses.replace(data, tokenizer="bytes")
    assert prepare(data, 16) == prepare(dataclasses.replace(data, vocab_size=999), 16)


def test_other_things_in_the_way_stay(data, tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"data\.directory is '.*rows', which holds other things"):
        prepare(data, 16)
    assert (tmp_path / "rows" / "thesis.tex").read_text() == "precious"
    (tmp_path / "rows" / "thesis.tex").unlink()
    prepare(data, 16)  # an empty folder is fine


def test_a_bucket_is_written_by_copying(data):
    with pytest.raises(
        UserError, match=r"data\.directory is 'gs://bucket/rows'; allowed: a local folder, which can be"
    ):
        prepare(dataclasses.replace(data, directory="gs://bucket/rows"), 16)


def test_unwritable_folder(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.directory: cannot write .*Not a directory"):
        prepare(dataclasses.replace(data, directory=str(tmp_path / "file" / "rows")), 16)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "short"}\n', r"has [0-9]+ training tokens, too few for a row of model\.length = 64"),
        ("\n", r"has no documents \(0 malformed records\)"),
        ('{"tekst": "all wrong"}\n', r"has no documents \(1 malformed records\)"),
    ],
)
def test_a_corpus_that_cannot_be_prepared_leaves_nothing_behind(data, tmp_path, content, message):
    folder = tmp_path / "bad" / "train"
    folder.mkdir(parents=True)
    (folder / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        prepare(dataclasses.replace(data, source=str(tmp_path / "bad")), 64)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "corpus"]


def test_no_room_for_a_token(data):
    with pytest.raises(UserError, match=r"model\.length is 2; allowed with data\.insert_special: 3 or more"):
        prepare(dataclasses.replace(data, insert_special=True), 2)


@pytest.fixture
def three_files(data, tmp_path, documents, monkeypatch):
    """The corpus in three files, each a shard."""
    for path in (tmp_path / "corpus").iterdir():
        path.unlink()
    for n in range(3):
        (tmp_path / "corpus" / f"{n}.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in documents[n::3]))
    monkeypatch.setattr("bd3_jax.data.corpora.SHARD_BYTES", 1)
    return data


def test_any_number_of_workers_writes_the_same(three_files, tmp_path):
    several = dataclasses.replace(three_files, directory=str(tmp_path / "several"))
    assert prepare(three_files, 16) == prepare(several, 16, workers=2)
    assert _digest(content_of(tmp_path / "rows")) == _digest(content_of(tmp_path / "several"))
    with pytest.raises(UserError, match="--workers is 0; allowed: 1 or more"):
        prepare(three_files, 16, workers=0)


@pytest.mark.parametrize("workers", [1, 2])
def test_malformed_records_are_counted_or_fatal(three_files, tmp_path, capsys, workers):
    path = tmp_path / "corpus" / "1.jsonl"
    path.write_text(path.read_text() + '\n{"text": \n{"text": 3}\n')
    with pytest.raises(UserError, match=r"1\.jsonl, line 68: Expecting value"):
        prepare(three_files, 16, workers=workers, strict=True)
    for leftover in tmp_path.glob("rows.*"):
        epath.Path(leftover).rmtree()
    manifest = prepare(three_files, 16, workers=workers)
    assert manifest.malformed == 2
    assert sum(split.documents for split in manifest.splits.values()) == 200
    assert "2 malformed records left out, the first: " in capsys.readouterr().out
    assert manifest.first_malformed.startswith(f"{path}, line 68: Expecting value")


def test_a_full_disk_is_told_and_what_is_done_is_kept(three_files, tmp_path):
    """A limit on the size of files stands for the disk: the second shard is too large for it."""
    (tmp_path / "corpus" / "1.jsonl").write_text(json.dumps({"text": " ".join(map(str, range(200_000)))}))
    data = dataclasses.replace(three_files, tokenizer="bytes")
    program = f"""
import resource, signal
from bd3_jax.config import DataConfig
from bd3_jax.data import corpora
from bd3_jax.data.prepare import prepare
corpora.SHARD_BYTES = 1
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
prepare({data!r}, 64)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    message = result.stderr.splitlines()[-1]
    assert re.search(r"UserError: cannot write .*-00001-of-00003.*File too large.*finished shards stay", message)
    assert not (tmp_path / "rows").exists()
    assert [path.name for path in (tmp_path / "rows.unfinished").glob("shard-*")] == ["shard-00000.json"]
    assert prepare(data, 64).splits["train"].rows > 10_000


class Killed(BaseException):
    """Stands for the end of the process: no handler of ours catches it."""


@pytest.mark.parametrize("moment", range(1, 7))
def test_an_interrupted_preparation_goes_on_and_ends_with_the_same_bytes(
    data, tmp_path, documents, monkeypatch, moment
):
    for path in (tmp_path / "corpus").iterdir():
        path.unlink()
    for n in range(3):
        (tmp_path / "corpus" / f"{n}.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in documents[n::3]))
    monkeypatch.setattr("bd3_jax.data.corpora.SHARD_BYTES", 1)  # a shard for every file
    whole = dataclasses.replace(data, directory=str(tmp_path / "whole"))
    prepare(whole, 16)

    written = []
    close = module.RowWriter.close

    def close_or_die(writer):
        written.append(writer)
        if len(written) == moment:
            raise Killed
        return close(writer)

    monkeypatch.setattr(module.RowWriter, "close", close_or_die)
    with pytest.raises(Killed):
        prepare(data, 16)
    assert not (tmp_path / "rows").exists()
    with pytest.raises(UserError, match=r"rows\.unfinished was prepared with model\.length = 16, but it is 8"):
        prepare(data, 8)
    prepare(data, 16)
    assert len(written) == moment + 6 - 2 * ((moment - 1) // 2)  # finished shards are not written again
    assert _digest(content_of(tmp_path / "rows")) == _digest(content_of(tmp_path / "whole"))
    assert not (tmp_path / "rows.unfinished").exists()


def test_interrupted_while_moving_into_place(data, tmp_path, monkeypatch):
    prepare(dataclasses.replace(data, directory=str(tmp_path / "whole")), 16)
    monkeypatch.setattr(type(epath.Path(tmp_path)), "unlink", lambda path: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        prepare(data, 16)
    monkeypatch.undo()
    assert not (tmp_path / "rows").exists()
    with pytest.raises(UserError, match=r"rows\.unfinished was prepared with data\.insert_eos = True, but it is False"):
        prepare(dataclasses.replace(data, insert_eos=False), 16)
    prepare(data, 16)
    assert _digest(content_of(tmp_path / "rows")) == _digest(content_of(tmp_path / "whole"))


def test_an_interrupted_preparation_of_other_files_is_not_continued(data, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_write_shards", lambda *args: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        prepare(data, 16)
    (tmp_path / "corpus" / "new.txt").write_text("one more")
    with pytest.raises(UserError, match="was begun from other files than files now has"):
        prepare(data, 16)


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_bytes(data, tmp_path, documents):
    """SIGKILL for the whole group of processes, at moments spread over the run; then once more, undisturbed."""
    for path in (tmp_path / "corpus").iterdir():
        path.unlink()
    for n in range(12):
        lines = "\n".join(json.dumps({"text": text * 400}) for text in documents[n::12])
        (tmp_path / "corpus" / f"{n:02d}.jsonl").write_text(lines)
    program = """
import sys
from bd3_jax.config import DataConfig
from bd3_jax.data import corpora
from bd3_jax.data.prepare import prepare
if __name__ == "__main__":
    corpora.SHARD_BYTES = 1
    data = eval(sys.argv[1])
    print("begins", flush=True)
    prepare(data, 64, workers=2)
"""
    (tmp_path / "program.py").write_text(program)

    def start(data):
        command = [sys.executable, str(tmp_path / "program.py"), repr(data)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert process.stdout.readline() == "begins\n"
        return process

    whole = dataclasses.replace(data, directory=str(tmp_path / "whole"))
    began = time.monotonic()
    with start(whole) as process:
        assert process.wait() == 0
    duration = time.monotonic() - began

    killed = 0
    for part in range(1, 12):
        with start(data) as process:
            try:
                process.wait(timeout=duration * part / 12)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                killed += 1
    assert killed >= 3
    with start(data) as process:
        assert process.wait() == 0
    assert _digest(content_of(tmp_path / "rows")) == _digest(content_of(tmp_path / "whole"))
    assert not (tmp_path / "rows.unfinished").exists()


def _digest(content):
    return {str(name): hashlib.sha256(data).hexdigest() for name, data in content.items()}
