"""A run that is killed without warning, in a process of its own."""

import os
import signal
import subprocess
import sys
import time

import pytest

from bd3_jax.checkpoints import run_folder
from bd3_jax.checkpoints.orbax import latest_step
from tests.training.runs import records

OVERRIDES = {
    "training.num_steps": 150,
    "training.log_every": 1,
    "training.eval_every": 50,
    "training.checkpoint_every": 3,
}


def start(workdir):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "bd3_jax.cli", "train", f"--workdir={workdir}"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_a_killed_run_continues_exactly(tiny_config, tmp_path):
    config = tiny_config("bd3lm,block_size=4", **OVERRIDES)
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
        run_folder.write_config(config, tmp_path / name)

    for _ in range(2):
        before = latest_step(tmp_path / "killed") or 0
        process = start(tmp_path / "killed")
        while (latest_step(tmp_path / "killed") or 0) < before + 6:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert latest_step(tmp_path / "killed") < 150
    for name in ("killed", "whole"):
        process = start(tmp_path / name)
        output, _ = process.communicate()
        assert process.returncode == 0, output
    assert records(tmp_path / "killed") == records(tmp_path / "whole")
