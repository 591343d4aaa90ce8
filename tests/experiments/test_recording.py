"""Recorded experiments: nothing is measured twice or lost, and what was measured says where and with what."""

import json
import os
import subprocess
import sys

import jax
import pytest


@pytest.fixture
def recording(script, tmp_path):
    """Opens the record anew, as a second run of an experiment does."""
    return lambda: script("recording").Recording(tmp_path / "some")


def test_a_cell_is_measured_once(recording, tmp_path):
    asked = []
    for _ in range(2):
        opened = recording()
        for size in (4, 8):
            measure = lambda size=size: asked.append(size) or {"value": size / 3}
            settings = {"size": size, "shape": (1, 2)}
            assert opened.cell(settings, {"depth": 1}, measure) == {"value": size / 3}
    assert asked == [4, 8]
    recording().cell({"size": 4, "shape": (1, 2)}, {"depth": 2}, lambda: asked.append("deeper") or {})
    assert asked == [4, 8, "deeper"]
    cells = json.loads((tmp_path / "some" / "results.json").read_text())
    assert [(cell["settings"]["size"], cell["config"]["depth"]) for cell in cells] == [(4, 1), (8, 1), (4, 2)]


def test_two_at_once_lose_nothing(recording):
    first, second = recording(), recording()
    first.cell({"size": 1}, {}, lambda: {"value": 1})
    second.cell({"size": 2}, {}, lambda: {"value": 2})
    assert [cell["settings"]["size"] for cell in recording().cells] == [1, 2]
    assert [cell["settings"]["size"] for cell in second.cells] == [1, 2]


def test_what_is_measured_is_kept_when_the_next_fails(recording):
    recording().cell({"size": 1}, {}, lambda: {"value": 1})
    with pytest.raises(ZeroDivisionError):
        recording().cell({"size": 2}, {}, lambda: {"value": 1 / 0})
    assert [cell["settings"] for cell in recording().cells] == [{"size": 1}]


def test_where_it_was_measured(recording, script):
    recording().cell({}, {}, dict)
    (cell,) = recording().cells
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=script("recording").HERE, capture_output=True, text=True, check=False
    ).stdout.strip()
    assert cell["commit"].split(" with changes")[0] == (head or "unknown")
    assert cell["machine"]["cores"] == os.cpu_count()
    assert cell["machine"]["devices"].endswith(jax.devices()[0].device_kind)
    assert cell["versions"]["jax"] == jax.__version__


def test_paths_of_the_machine_are_not_recorded(script, monkeypatch):
    argv = ["/home/someone/x.py", "--judge=/tmp/a/b.gguf", "--out=runs/x", "--configs=configs/owt.py:ar", "/data/c"]
    monkeypatch.setattr(sys, "argv", argv)
    command = script("recording").environment(on_devices=False)["command"]
    assert command == "python x.py --judge=b.gguf --out=runs/x --configs=configs/owt.py:ar c"
