"""Data in a bucket, as far as a stand-in on this machine goes."""

import dataclasses
import importlib.util
import itertools
import json
import threading

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from etils import epath
from etils.epath import backend

from bd3_jax.data import prepare as module
from bd3_jax.data.inspection import inspect
from bd3_jax.data.pipeline import eval_batches, open_dataset, train_batches
from bd3_jax.data.prepare import prepare
from bd3_jax.errors import UserError
from bd3_jax.folders import reachable
from tests.data.bucket import Bucket, Handler, Server, bucket, objects_in


@pytest.fixture(scope="module", autouse=True)
def server():
    """Once for the process, in which ArrayRecord keeps one client."""
    patch = pytest.MonkeyPatch()
    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    patch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    with bucket():
        yield
    # The server answers to the end of the process: read-ahead that finds nobody tries again for minutes.
    patch.undo()


@pytest.fixture(autouse=True)
def empty():
    yield
    Bucket.store.clear()


@pytest.fixture
def stored(data):
    """Settings of the same rows in a folder and in a bucket."""
    data = dataclasses.replace(data, tokenizer="bytes")
    away = dataclasses.replace(data, directory="gs://bucket/rows")
    assert prepare(data, 16) == prepare(away, 16)
    return data, away


def test_rows_are_read_from_the_bucket(stored):
    here, there = (open_dataset(data, 16, "train") for data in stored)
    assert here.manifest == there.manifest
    for one, two in zip(eval_batches(here, 8, 5), eval_batches(there, 8, 5), strict=True):
        np.testing.assert_array_equal(one[0], two[0])
    one, two = (itertools.islice(train_batches(dataset, 8, 1, 40, 1, 2), 5) for dataset in (here, there))
    np.testing.assert_array_equal(list(one), list(two))
    assert inspect("gs://bucket/rows") == inspect(stored[0].directory)


def test_rows_that_are_not_there(stored):
    _, there = stored
    del Bucket.store["/bucket/rows/files-train.array_record-00000-of-00001"]
    with pytest.raises(UserError, match=r"gs://bucket/rows is damaged .*prepare the corpus anew"):
        open_dataset(there, 16, "train")
    with pytest.raises(UserError, match=r"'gs://bucket/other', where nothing is prepared"):
        open_dataset(dataclasses.replace(there, directory="gs://bucket/other"), 16, "train")


def test_a_corpus_is_read_from_the_bucket(data, corpus, documents):
    pyarrow.parquet.write_table(pyarrow.table({"text": documents[:9]}), corpus / "c.parquet")
    with pyarrow.output_stream(str(corpus / "d.jsonl.zst"), compression="zstd") as stream:
        stream.write("\n".join(json.dumps({"text": text}) for text in documents[9:20]).encode())
    data = dataclasses.replace(data, tokenizer="bytes")
    local = prepare(data, 16)
    assert sum(counts.documents for counts in local.splits.values()) == 220
    for path in corpus.iterdir():
        (epath.Path("gs://bucket/corpus") / path.name).write_bytes(path.read_bytes())
    away = dataclasses.replace(data, source="gs://bucket/corpus", directory="gs://bucket/rows")
    assert prepare(away, 16).sha256 == local.sha256


def test_a_tokenizer_is_read_from_the_bucket(data, stored, tmp_path):
    own = dataclasses.replace(data, tokenizer="gs://bucket/rows/tokenizer", directory=str(tmp_path / "own"))
    assert prepare(own, 16).fingerprint == open_dataset(stored[0], 16, "train").tokenizer.fingerprint


class Killed(BaseException):
    """Stands for the end of the process: no handler of ours catches it."""


def test_interrupted_at_any_moment_it_ends_with_the_same_objects(three_files, tmp_path, files_in, monkeypatch):
    """The n-th change in the bucket does not happen any more, for every n; then once more, undisturbed."""
    here = dataclasses.replace(three_files, tokenizer="bytes")
    away = dataclasses.replace(here, directory="gs://bucket/rows")
    prepare(here, 16)
    changes = []
    open_file, rm = Bucket._open, Bucket.rm

    def prepare_until(last):
        """Raises Killed in place of that change; 0: never."""
        changes.clear()

        def change(path):
            changes.append(path)
            if len(changes) == last:
                raise Killed

        def opened(self, path, mode="rb", **options):
            if mode == "wb":
                change(path)
            return open_file(self, path, mode, **options)

        def removed(self, path, **options):
            change(path)
            return rm(self, path, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Bucket, "_open", opened)
            patch.setattr(Bucket, "rm", removed)
            prepare(away, 16)

    prepare_until(0)
    assert (
        len(changes) == 20
    )  # begun, tokenizer, two splits and a result a shard, four files about them, four leftovers
    for moment in range(1, len(changes) + 1):
        Bucket.store.clear()
        with pytest.raises(Killed):
            prepare_until(moment)
        prepare(away, 16)
        assert objects_in("gs://bucket/rows") == files_in(tmp_path / "rows")


@pytest.mark.parametrize("moment", ["training", "tokenising"])
def test_an_error_removes_nothing_of_another_process(data, monkeypatch, moment):
    """Which began the same preparation, so that this one goes on with what is there."""
    away = dataclasses.replace(data, directory="gs://bucket/rows")
    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_shards", lambda *args: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            prepare(away, 16)
    if moment == "training":
        del Bucket.store["/bucket/rows/tokenizer/tokenizer.json"]
    before = objects_in("gs://bucket/rows")
    assert "begun.json" in before

    def fail(*args):
        raise UserError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(module, "train_bpe" if moment == "training" else "_write_shards", fail)
        with pytest.raises(UserError, match="no memory left"):
            prepare(away, 16)
    assert objects_in("gs://bucket/rows") == before
    prepare(away, 16)


def test_an_error_removes_no_tokenizer_that_another_process_wrote_meanwhile(data, monkeypatch):
    away = dataclasses.replace(data, directory="gs://bucket/rows")
    written = epath.Path("gs://bucket/rows/tokenizer/tokenizer.json")

    def fail(*args):
        written.write_text("theirs")
        raise UserError("no memory left")

    monkeypatch.setattr(module, "train_bpe", fail)
    with pytest.raises(UserError, match="no memory left"):
        prepare(away, 16)
    assert written.read_text() == "theirs"


def test_what_is_in_the_bucket_is_not_overwritten(stored, data):
    _, away = stored
    before = objects_in("gs://bucket")
    with pytest.raises(UserError, match=r"gs://bucket/rows was prepared with model\.length = 16, but it is 8"):
        prepare(away, 8)
    with pytest.raises(UserError, match=r"'gs://bucket', which holds other things; allowed: a new or empty folder"):
        prepare(dataclasses.replace(data, directory="gs://bucket"), 16)
    assert objects_in("gs://bucket") == before


def test_a_bucket_that_cannot_be_written(data, monkeypatch):
    def refuse(self, path, mode, **options):
        raise RuntimeError("403: Forbidden")  # a library has errors of its own

    monkeypatch.setattr(Bucket, "_open", refuse)
    with pytest.raises(UserError, match=r"cannot write gs://bucket/rows/begun\.json: .*403: Forbidden"):
        prepare(dataclasses.replace(data, directory="gs://bucket/rows"), 16)


def test_what_others_write_is_seen():
    """The library for gs:// would else keep what it listed once."""
    reachable("gs://bucket/rows", "data.directory")
    assert not backend.fsspec_backend.fs("gs://bucket").dircache.use_listings_cache


def test_rows_that_may_not_be_read(stored, monkeypatch):
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.send_error(403))
    with pytest.raises(UserError, match=r"data\.directory is 'gs://bucket/rows', whose rows cannot be read .*allowed"):
        open_dataset(stored[1], 16, "train")


@pytest.mark.skipif(importlib.util.find_spec("s3fs") is not None, reason="the library for s3:// is installed")
def test_buckets_that_cannot_be_reached(data):
    with pytest.raises(UserError, match=r"data\.directory is 's3://b/rows', which cannot be reached: .*s3fs"):
        open_dataset(dataclasses.replace(data, directory="s3://b/rows"), 16, "train")
    with pytest.raises(UserError, match=r"data\.source is 's3://b/text', which cannot be reached: .*s3fs"):
        prepare(dataclasses.replace(data, source="s3://b/text"), 16)
