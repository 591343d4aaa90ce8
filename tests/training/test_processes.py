"""Training in several real processes on loopback, against one process; what happens when one of them dies or stops."""

import itertools
import signal
import sys
import time
from pathlib import Path

import pytest

from bd3_jax.checkpoints import run_folder
from bd3_jax.checkpoints.orbax import latest_step
from bd3_jax.training.loop import train
from tests.training.runs import records

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "launch"))
from local import start

pytestmark = pytest.mark.slow

# With everything that could differ between processes: microbatches, the search and samples.
SETTINGS = {
    "training.num_steps": 12, "training.eval_every": 6, "training.checkpoint_every": 2, "training.microbatches": 2,
    "training.batch_size": 16, "search.enabled": True, "search.batch_size": 8, "search.num_batches": 1,
    "search.widths": (0.9,), "eval.num_batches": 1, "training.sample_every": 6, "sampling.num_samples": 3,
    "sampling.batch_size": 4,
}  # fmt: skip

# A busy machine may stop a process for longer than a run on its own machines should wait.
PATIENT = ["--heartbeat_timeout=600"]


@pytest.fixture
def launch(tmp_path):
    """Starts processes that train a workdir, and kills what is left of them; output goes to files."""
    running, files, numbers = [], [], itertools.count()

    def begin(count, workdir, *flags):
        paths = [tmp_path / f"output-{next(numbers)}" for _ in range(count)]
        files.extend(path.open("w") for path in paths)
        processes = start(count, [f"--workdir={workdir}", *flags], files[-count:])
        running.extend(processes)
        return processes, paths

    yield begin
    for process in running:
        process.kill()
        process.wait()
    for file in files:
        file.close()


def wait_for_step(workdir, step, processes, paths):
    while (latest_step(workdir) or 0) < step:
        ended = [path.read_text() for process, path in zip(processes, paths, strict=True) if process.poll() is not None]
        assert not ended, ended
        time.sleep(0.05)


def test_killed_and_continued_in_another_number(tiny_config, tmp_path, launch):
    """Two processes are killed outright; four continue; one has trained the same without a break."""
    config = tiny_config("bd3lm,block_size=4", **SETTINGS)
    for name in ("one", "several"):
        (tmp_path / name).mkdir()
        run_folder.write_config(config, tmp_path / name)
    train(config, tmp_path / "one")

    two, paths = launch(2, tmp_path / "several", *PATIENT)
    wait_for_step(tmp_path / "several", 4, two, paths)
    for process in two:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert latest_step(tmp_path / "several") < 12
    four, paths = launch(4, tmp_path / "several", *PATIENT)
    assert [process.wait() for process in four] == [0] * 4, paths[0].read_text()

    ours, wanted = records(tmp_path / "several"), records(tmp_path / "one")
    assert ours.keys() == wanted.keys()
    assert {ours[step, "search/low"] for step in (0, 6, 12)} <= {0.001, 0.05, 0.1}
    for key, value in wanted.items():
        if isinstance(value, float):
            assert ours[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_a_signal_to_one_stops_all_at_the_same_step(tiny_config, tmp_path, launch):
    (tmp_path / "run").mkdir()
    config = tiny_config("ar", **{"training.num_steps": 10**6, "training.eval_every": 10**6, "eval.num_batches": 1})
    run_folder.write_config(config, tmp_path / "run")
    processes, paths = launch(2, tmp_path / "run", *PATIENT)
    wait_for_step(tmp_path / "run", 4, processes, paths)
    processes[1].send_signal(signal.SIGTERM)
    assert [process.wait() for process in processes] == [143, 143]
    step = latest_step(tmp_path / "run")
    assert f"stopped by SIGTERM after step {step} of 1000000, which is saved" in paths[0].read_text()


def test_one_that_dies_ends_the_others_soon(tiny_config, tmp_path, launch):
    (tmp_path / "run").mkdir()
    config = tiny_config("ar", **{"training.num_steps": 10**6, "training.eval_every": 10**6, "eval.num_batches": 1})
    run_folder.write_config(config, tmp_path / "run")
    processes, paths = launch(2, tmp_path / "run", "--heartbeat_timeout=60")
    wait_for_step(tmp_path / "run", 4, processes, paths)
    processes[1].send_signal(signal.SIGKILL)
    assert processes[0].wait(timeout=300) != 0
    output = paths[0].read_text()
    assert "another one died or cannot be reached" in output or "another task died" in output
