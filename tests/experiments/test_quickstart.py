"""The script behind `make quickstart`: what signals do to it, and its summary."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest
from etils import epath

SCRIPT = Path(__file__).parents[2] / "experiments" / "quickstart.py"
SLOW_TO_STOP = """
import signal, sys, time
def save(*_):
    time.sleep(1)
    open(sys.argv[1], "w").write("saved")
    sys.exit(130)
signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(30)
"""


@pytest.fixture
def quickstart() -> ModuleType:
    spec = util.spec_from_file_location("quickstart", SCRIPT)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "send",
    [
        pytest.param(lambda process: os.killpg(process.pid, signal.SIGINT), id="Ctrl-C, to all"),
        pytest.param(lambda process: process.terminate(), id="SIGTERM, to the script alone"),
    ],
)
def test_a_signal_waits_until_the_command_has_saved(tmp_path: Path, send: Callable[[subprocess.Popen], None]) -> None:
    saved = tmp_path / "saved"
    command = (
        f"import quickstart, sys; sys.exit(quickstart.run([sys.executable, '-c', {SLOW_TO_STOP!r}, {str(saved)!r}]))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", command], stdout=subprocess.PIPE, cwd=SCRIPT.parent, start_new_session=True
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.2)  # until the parent waits
        send(process)
        assert process.wait(timeout=20) == 130
    assert saved.read_text() == "saved"


def test_a_failing_command_ends_it(quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(
        quickstart, "run", lambda command: calls.append(command[3]) or (2 if command[3] == "train" else 0)
    )
    assert quickstart.main([]) == 2
    assert calls == ["prepare", "train"]


def test_summary_compares_the_same_rows(
    quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "WORKDIR", epath.Path(tmp_path))
    same = {"eval/split": "validation", "eval/sequences": 636, "eval/estimator": "low_variance"}
    records = [
        {"step": 0, "eval/perplexity": 2000.0, **same},
        {"step": 50, "train/loss": 6.5},
        {"step": 90, "eval/perplexity": 120.25, **same},
        {"step": 90, "eval/perplexity": 50.0, **same, "eval/split": "train"},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    texts = ["not shown", "the one", "the two", "the\nthree"]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    summary = quickstart.summary(90)
    assert "Done in 1.5 minutes" in summary
    assert "2,000 at step 0, 120.2 at step 90" in summary
    assert "not shown" not in summary
    assert "  * the three" in summary
    assert "num_steps=180" in summary
