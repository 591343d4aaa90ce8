"""Records of a run while it trains: what a resumed run keeps, and what TensorBoard gets."""

import importlib.machinery
import resource
import struct
import sys
import types

import pytest
from tensorboardX.proto.event_pb2 import Event

from bd3_jax.errors import UserError
from bd3_jax.metrics import append_metrics, read_metrics
from bd3_jax.training.logging import MetricLog


def test_a_resumed_run_repeats_no_step(tiny_config, tmp_path):
    for step in range(5):
        append_metrics(tmp_path, {"step": step, "train/loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/lo')  # killed while it wrote
    log = MetricLog(tmp_path, tiny_config("ar"), keep=2)
    log.write(3, {"train/loss": 2.0})
    log.close()
    assert [(r["step"], r["train/loss"]) for r in read_metrics(tmp_path)] == [(0, 1), (1, 1), (2, 1), (3, 2)]


def test_a_fresh_run_keeps_nothing(tiny_config, tmp_path):
    append_metrics(tmp_path, {"step": 0})
    MetricLog(tmp_path, tiny_config("ar"), keep=-1).close()
    assert read_metrics(tmp_path) == []


def test_tensorboard_has_the_numbers(tiny_config, tmp_path):
    log = MetricLog(tmp_path, tiny_config("ar"), keep=6)
    log.write(7, {"train/loss": 2.5, "eval/split": "validation", "eval/insert_eos": True, "eval/tokens": 12})
    log.write(8, {"samples/text": ["one", "two"], "eval/nll_by_position": [1.0, 2.0]})
    log.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    content, events = path.read_bytes(), []
    while content:  # each is: length (8 bytes), checksum (4), event, checksum (4)
        size = struct.unpack("<Q", content[:8])[0]
        events.append(Event.FromString(content[12 : 12 + size]))
        content = content[16 + size :]
    values = [(event.step, value) for event in events for value in event.summary.value]
    texts = [(step, value.tag.split("/text_summary")[0]) for step, value in values if value.HasField("tensor")]
    assert texts == [(8, "samples/text")]
    scalars = {(step, value.tag): value.simple_value for step, value in values if value.HasField("simple_value")}
    assert scalars == {(7, "train/loss"): 2.5, (7, "eval/tokens"): 12}


def test_weights_and_biases_gets_the_numbers(tiny_config, tmp_path, monkeypatch):
    """Where it is wanted: by default it is not, and not installed it is refused."""
    config = tiny_config("ar", **{"training.wandb_project": "p"})
    with pytest.raises(UserError, match=r"wandb_project is 'p', but the package wandb is not installed; allowed: ''"):
        MetricLog(tmp_path, config, keep=-1)

    calls = []
    stand_in = types.ModuleType("wandb")
    stand_in.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    stand_in.init = lambda **settings: calls.append(settings) or stand_in
    stand_in.log = lambda numbers, step: calls.append((step, numbers))
    stand_in.finish = lambda: calls.append("finished")
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    MetricLog(tmp_path, tiny_config("ar"), keep=-1).close()
    assert calls == []
    for _ in range(2):
        log = MetricLog(tmp_path, config, keep=-1)
        log.write(3, {"train/loss": 2.0, "eval/split": "test", "samples/text": ["a"]})
        log.close()
    first, second = calls[0], calls[3]
    assert (first["project"], first["name"], first["config"]["objective"]) == ("p", tmp_path.name, "ar")
    assert first["id"] == second["id"]
    assert calls[1:3] == [(3, {"train/loss": 2.0}), "finished"]


def test_a_full_disk_is_one_line_and_the_end(tiny_config, tmp_path):
    """TensorBoard's file cannot grow, the records can."""
    (tmp_path / "metrics.jsonl").symlink_to("/dev/null")
    log = MetricLog(tmp_path, tiny_config("ar"), keep=-1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limit[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*tensorboard: File too large"):
            [log.write(step, {"train/loss": 1.0}) for step in range(200)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        log.close()
