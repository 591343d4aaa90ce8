"""The files of a run whose workdir is in a bucket, as far as a stand-in on this machine goes."""

import pytest
from etils import epath

from bd3_jax.checkpoints import orbax
from bd3_jax.metrics import append_metrics, read_metrics
from bd3_jax.training.logging import MetricLog
from bd3_jax.training.loop import train
from tests.data.bucket import Bucket, bucket


@pytest.fixture(autouse=True)
def stand_in():
    with bucket():
        yield


def test_metrics_are_written_here_and_copied(tiny_config):
    """Never appended to there; a resumed run goes on from what is there."""
    workdir = epath.Path("gs://bucket/run")
    log = MetricLog(workdir, tiny_config("ar"), keep=-1)
    log.write(1, {"train/loss": 2.0})
    assert read_metrics(workdir) == []  # a minute later, or when a checkpoint is saved
    log.upload()
    assert read_metrics(workdir) == [{"step": 1, "train/loss": 2.0}]
    log.write(2, {"train/loss": 1.0})
    log.close()
    (events,) = (workdir / "tensorboard").iterdir()
    assert len(events.read_bytes()) > 100

    again = MetricLog(workdir, tiny_config("ar"), keep=1)
    again.write(2, {"train/loss": 1.5})
    again.close()
    assert [record["train/loss"] for record in read_metrics(workdir)] == [2.0, 1.5]
    append_metrics(workdir, {"step": 2, "eval/nll": 3.0})
    assert [record["step"] for record in read_metrics(workdir)] == [1, 2, 2]


def test_a_run_leaves_the_same_files_there(tiny_config, tmp_path, monkeypatch):
    """Checkpoints go through TensorStore, which has no stand-in: they stay here."""
    monkeypatch.setattr(orbax, "FOLDER", tmp_path / "checkpoints")
    config = tiny_config("ar", **{"training.num_steps": 4, "training.eval_every": 2})
    workdir = epath.Path("gs://bucket/run")
    train(config, workdir)
    found = {name.removeprefix("/bucket/run/") for name in Bucket.store}
    assert {"config.json", "manifest.json", "metrics.jsonl", "tokenizer/tokenizer.json"} <= found
    assert [record["step"] for record in read_metrics(workdir) if "eval/nll" in record] == [0, 2, 4]
