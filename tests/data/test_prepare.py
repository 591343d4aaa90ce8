import contextlib
import dataclasses
import hashlib
import json
import os

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
from bd3_jax.folders import alone


def rows_of(data, length, split):
    return open_dataset(data, length, split).read(range(len(open_dataset(data, length, split))))


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


def test_two_runs_write_the_same_bytes(data, tmp_path, files_in):
    again = dataclasses.replace(data, directory=str(tmp_path / "again"))
    prepare(data, 16)
    prepare(again, 16)
    one, two = (files_in(tmp_path / name) for name in ("rows", "again"))
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


def test_the_checksums_are_those_of_the_rows(data, documents, corpus):
    """Of one shard: sha256 over its hex digest, which is that of the tokens as int32. Order and text matter."""
    data = dataclasses.replace(data, tokenizer="bytes")
    manifest = prepare(data, 16)
    for split, found in manifest.sha256.items():
        shard = hashlib.sha256(rows_of(data, 16, split).astype("<i4").tobytes()).hexdigest()
        assert found == hashlib.sha256(shard.encode()).hexdigest()


def test_two_preparations_of_one_folder_do_not_meet(data, tmp_path):
    with (
        alone(epath.Path(tmp_path / ".rows.lock"), ""),
        pytest.raises(UserError, match=r"data\.directory is '.*rows', which another process is preparing"),
    ):
        prepare(data, 16)
    prepare(data, 16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "rows"]


def test_another_process_may_finish_just_before_the_lock_is_taken(data, tmp_path, monkeypatch, files_in, capsys):
    @contextlib.contextmanager
    def late(*args):
        monkeypatch.undo()
        prepare(data, 16)
        before.update(files_in(tmp_path / "rows"))
        with alone(*args):
            yield

    before = {}
    monkeypatch.setattr(module, "alone", late)
    assert prepare(data, 16) == load_manifest(epath.Path(data.directory))
    assert "Already prepared" in capsys.readouterr().out
    assert files_in(tmp_path / "rows") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "rows"]


def test_a_mount_point_is_refused(data, monkeypatch):
    """Rows are prepared beside their folder, which would be another disk, and take its place."""
    with pytest.raises(UserError, match=r"data\.directory is '/', a mount point, .*; allowed: a folder inside it"):
        prepare(dataclasses.replace(data, directory="/"), 16)
    prepare(data, 16)
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    prepare(data, 16)  # what is prepared may be mounted


def test_done_is_kept_and_reported(data, capsys, tmp_path, files_in):
    first = prepare(data, 16)
    before = files_in(tmp_path / "rows")
    assert "Prepared" in capsys.readouterr().out
    assert prepare(data, 16) == first
    out = capsys.readouterr().out
    assert "Already prepared" in out
    assert "train: " in out
    assert "that of the files" in out  # the licence
    assert files_in(tmp_path / "rows") == before
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
def test_rows_made_with_other_settings_are_never_overwritten(data, tmp_path, change, length, message, files_in):
    prepare(data, 16)
    before = files_in(tmp_path / "rows")
    with pytest.raises(UserError, match=message):
        prepare(dataclasses.replace(data, **change), length)
    assert files_in(tmp_path / "rows") == before


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


@pytest.mark.parametrize("there", [True, False])
def test_a_symbolic_link_leads_to_the_folder(data, tmp_path, there, files_in):
    (tmp_path / "disk").mkdir()
    if there:
        (tmp_path / "disk" / "rows").mkdir()
    (tmp_path / "rows").symlink_to(tmp_path / "disk" / "rows")
    prepare(data, 16)
    assert (tmp_path / "rows").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["rows"]
    before = files_in(tmp_path / "disk")
    assert prepare(data, 16) == load_manifest(epath.Path(tmp_path / "disk" / "rows"))
    assert files_in(tmp_path / "disk") == before


def test_the_folder_of_a_run_is_not_prepared(data, tmp_path, files_in):
    """Though it has a copy of the manifest."""
    manifest = prepare(data, 16)
    (tmp_path / "run").mkdir()
    manifest.save(epath.Path(tmp_path / "run"))
    before = files_in(tmp_path / "run")
    with pytest.raises(UserError, match=r"data\.directory is '.*run', which holds other things"):
        prepare(dataclasses.replace(data, directory=str(tmp_path / "run")), 16)
    assert files_in(tmp_path / "run") == before


def test_unwritable_folder(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.directory is .*rows', but .*/file is a file; allowed: a folder"):
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


def test_an_unreadable_source(data, corpus):
    (corpus / "c.jsonl").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"data\.source is '.*corpus', which cannot be read: .*c\.jsonl"):
        prepare(data, 16)


def test_no_room_for_a_token(data):
    with pytest.raises(UserError, match=r"model\.length is 2; allowed with data\.insert_special: 3 or more"):
        prepare(dataclasses.replace(data, insert_special=True), 2)
