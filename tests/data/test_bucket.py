"""Data in a bucket, as far as a stand-in on this machine goes."""

import dataclasses
import importlib.util
import itertools
import threading

import fsspec
import numpy as np
import pytest
from etils import epath
from etils.epath import backend

from bd3_jax.data.inspection import inspect
from bd3_jax.data.pipeline import eval_batches, open_dataset, train_batches
from bd3_jax.data.prepare import prepare
from bd3_jax.errors import UserError
from tests.data.bucket import Bucket, Handler, Server


@pytest.fixture(scope="module", autouse=True)
def server():
    """Once for the process, in which ArrayRecord keeps one client."""
    patch = pytest.MonkeyPatch()
    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    patch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()
    yield
    server.shutdown()
    server.server_close()
    backend.fsspec_backend._get_filesystem.cache_clear()
    patch.undo()


@pytest.fixture
def stored(data, tmp_path):
    """Settings of the same rows in a folder and in a bucket."""
    data = dataclasses.replace(data, tokenizer="bytes")
    prepare(data, 16)
    for path in (tmp_path / "rows").rglob("*"):
        if path.is_file():
            target = epath.Path("gs://bucket/rows") / str(path.relative_to(tmp_path / "rows"))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    yield data, dataclasses.replace(data, directory="gs://bucket/rows")
    Bucket.store.clear()


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


def test_a_corpus_is_read_from_the_bucket(data, corpus, tmp_path):
    data = dataclasses.replace(data, tokenizer="bytes")
    local = prepare(data, 16)
    for path in corpus.iterdir():
        (epath.Path("gs://bucket/corpus") / path.name).write_bytes(path.read_bytes())
    away = dataclasses.replace(data, source="gs://bucket/corpus", directory=str(tmp_path / "again"))
    assert prepare(away, 16).splits == local.splits
    ours, theirs = (open_dataset(settings, 16, "train") for settings in (data, away))
    np.testing.assert_array_equal(ours.read(range(len(ours))), theirs.read(range(len(ours))))
    Bucket.store.clear()


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
