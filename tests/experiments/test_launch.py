"""The launch scripts: what each would run, and that a mistake is told before anything runs."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bd3_jax.compiling import targets
from bd3_jax.configs import lm1b
from tests.compiling.test_run import TINY

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "launch"))
from command import TOPOLOGIES

LAUNCH = Path(__file__).parents[2] / "experiments" / "launch"
TRAIN = ["--config=configs/lm1b.py:mdlm", "--workdir=gs://b/run"]
# Script -> flags with which it runs.
SCRIPTS = {
    "tpu_pod": ["--tpu=pod", "--zone=z"],
    "gke": ["--cluster=c", "--zone=z", "--project=p", "--image=i", "--tpu-type=v5litepod-16"],
    "slurm": ["--nodes=2", "--gpus=8"],
    "multi_gpu": ["--gpus=4"],
    "local": ["--processes=2"],
}
TOOLS = ("gcloud", "git", "xpk", "sbatch", "nvidia-smi")


@pytest.fixture
def launch(tmp_path):
    """Runs a script where every tool is a stand-in that notes how it was called, and its input."""
    (tmp_path / "bin").mkdir()
    for name in TOOLS:
        tool = tmp_path / "bin" / name
        tool.write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@" >> {tmp_path}/calls\n')
        tool.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    environment.pop("CUDA_VISIBLE_DEVICES", None)

    def run(name, *flags, **variables):
        path = str(LAUNCH / f"{name}.py")
        ended = subprocess.run(
            [sys.executable, path, *flags], env=environment | variables, capture_output=True, text=True, check=False
        )
        calls = tmp_path / "calls"
        return ended, calls.read_text().splitlines() if calls.exists() else []

    return run


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_dry_run_prints_the_training_and_runs_nothing(launch, name):
    ended, calls = launch(name, "--dry-run", *SCRIPTS[name], *TRAIN, "--config.seed=3")
    assert ended.returncode == 0, ended.stderr
    assert calls == []
    words = shlex.split(ended.stdout, comments=True)
    trained = next(word for word in words if " train " in word) if name in ("tpu_pod", "gke") else " ".join(words)
    assert "train --config=configs/lm1b.py:mdlm --workdir=gs://b/run --config.seed=3" in trained


MACHINES = {
    "tpu_pod": (["--create=v5litepod-16"], "v5e:4x4"),
    "gke": ([], "v5e:4x4"),
    "slurm": ([], "h100:16"),
    "multi_gpu": ([], "h100:4"),
    "local": ([], "cpu:2"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_check_comes_first_and_is_of_that_machine(launch, name):
    flags, topology = MACHINES[name]
    ended, calls = launch(name, "--dry-run", "--check", *SCRIPTS[name], *flags, *TRAIN, "--config.seed=3")
    assert (ended.returncode, calls) == (0, [])
    first = shlex.split(ended.stdout.splitlines()[0])
    assert first[1:6] == ["-m", "bd3_jax.cli", "compile", TRAIN[0], "--config.seed=3"]
    assert first[-1] == f"--topology={topology}"
    assert not any(flag.startswith("--workdir") for flag in first)


@pytest.mark.parametrize("name", ["tpu_pod", "gke"])
def test_a_pod_is_the_machine_that_the_config_is_made_for(name):
    assert f"here {lm1b.TOPOLOGY}" in (LAUNCH / f"{name}.py").read_text()
    for kind, topology in TOPOLOGIES.items():
        chip, count = kind.split("-")
        assert targets.parse(topology).size == int(count) // (2 if chip == "v5p" else 1)  # which counts cores


@pytest.mark.slow
def test_a_config_that_does_not_fit_is_not_started(launch, tmp_path):
    """2^24 rows, compiled for two devices; a training would ask for prepared rows, with status 2."""
    config = f"--config={tmp_path / 'tiny.py'}:ar"
    (tmp_path / "tiny.py").write_text(TINY)
    flags = [config, f"--workdir={tmp_path / 'run'}"]
    ended, _ = launch("local", "--check", *SCRIPTS["local"], *flags, "--config.training.batch_size=16777216")
    assert ended.returncode == 1
    assert "DOES NOT FIT" in ended.stdout
    assert "ended with status 1" in ended.stderr
    ended, _ = launch("local", "--check", *SCRIPTS["local"], *flags)
    assert "train on cpu:2: fits" in ended.stdout
    assert "where nothing is prepared" in ended.stderr
    assert ended.returncode == 2


def test_local_processes_may_do_something_else_with_a_workdir(launch):
    ended, _ = launch("local", "--dry-run", "--processes=2", "--mode=sample", "--workdir=runs/a", "--trace")
    assert [line.split("bd3_jax.cli ")[1] for line in ended.stdout.splitlines()] == [
        "sample --workdir=runs/a --trace"
    ] * 2


def test_what_a_pod_is_told(launch):
    ended, calls = launch("tpu_pod", *SCRIPTS["tpu_pod"], "--create=v5litepod-16", "--spot", "--install", *TRAIN)
    assert ended.returncode == 0, ended.stderr
    verbs = [calls[n + 4] for n, call in enumerate(calls) if call == "gcloud"]
    assert verbs == ["describe", "create", "scp", "ssh", "ssh"]
    assert {"--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", "--spot", "--worker=all"} <= set(calls)
    assert calls[-1].startswith("--command=cd bd3_jax && .venv/bin/bd3 train --config=")


def test_a_preempted_slice_is_made_again(launch, tmp_path):
    gcloud = tmp_path / "bin" / "gcloud"
    flags = [*SCRIPTS["tpu_pod"], "--create=v5litepod-16", "--spot", *TRAIN]
    for state, verbs in (
        ("READY", ["describe", "create", "ssh"]),
        ("PREEMPTED", ["describe", "delete", "create", "ssh"]),
    ):
        (tmp_path / "calls").write_text("")
        gcloud.write_text(f'#!/bin/sh\necho "$4 $5 $6" >> {tmp_path}/calls\n[ $4 != describe ] || echo {state}\n')
        ended, calls = launch("tpu_pod", *flags)
        assert ended.returncode == 0, ended.stderr
        assert calls == [f"{verb} pod --zone=z" for verb in verbs]
    _, calls = launch("tpu_pod", *SCRIPTS["tpu_pod"], *TRAIN)
    assert calls[len(verbs) :] == ["ssh pod --zone=z"]  # the slice is somebody's own
    ended, _ = launch("tpu_pod", "--dry-run", *flags)
    assert "describe pod --zone=z '--format=value(state)'" in shlex.split(ended.stdout.splitlines()[0])[2]


def test_a_pod_is_installed_with_a_python_that_will_do(launch):
    ended, _ = launch("tpu_pod", "--dry-run", *SCRIPTS["tpu_pod"], "--install", *TRAIN)
    install = next(word for word in shlex.split(ended.stdout) if word.startswith("--command=tar"))
    wanted = re.search(r'python_requires=">=([\d.]+)"', (LAUNCH.parents[1] / "setup.py").read_text())[1]
    assert f"python3 -m uv venv -q --clear --python {wanted} .venv && " in install
    assert subprocess.run(["bash", "-nc", install.removeprefix("--command=")], check=False).returncode == 0


@pytest.mark.parametrize(("name", "tool"), [("tpu_pod", "gcloud"), ("gke", "xpk"), ("slurm", "sbatch")])
def test_a_tool_that_is_not_installed_is_one_line(launch, name, tool):
    ended, calls = launch(name, *SCRIPTS[name], *TRAIN, PATH="")
    assert (ended.returncode, calls) == (2, [])
    assert ended.stderr == f"error: {tool} is not found on this machine; allowed: installed, and on PATH\n"


@pytest.mark.parametrize(
    ("chosen", "count"), [("0,1,2,3", 4), ("GPU-8932f937,GPU-7a", 2), ("3", 1), ("", 0), ("-1", 0), (None, 8)]
)
def test_gpus_are_those_that_are_chosen(launch, tmp_path, chosen, count):
    """nvidia-smi lists all."""
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.write_text("#!/bin/sh\nfor n in 0 1 2 3 4 5 6 7; do echo GPU $n: NVIDIA H100; done\n")
    variables = {} if chosen is None else {"CUDA_VISIBLE_DEVICES": chosen}
    ended, _ = launch("multi_gpu", "--gpus=64", *TRAIN, **variables)
    assert ended.returncode == 2
    assert f"--gpus is 64, but there are {count}, by CUDA_VISIBLE_DEVICES, else nvidia-smi -L" in ended.stderr


def test_what_slurm_is_told(launch):
    ended, calls = launch("slurm", *SCRIPTS["slurm"], "--partition=gpu", *TRAIN)
    assert (ended.returncode, calls) == (0, ["sbatch", ""]) or (ended.returncode, calls) == (0, ["sbatch"])
    wanted = ("--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--signal=TERM@120", "--partition=gpu")
    assert all(f"#SBATCH {flag}\n" in ended.stdout for flag in wanted)
    assert "#SBATCH --cpus-per-task=8\n" in ended.stdout
    assert "\nsrun --cpus-per-task=8 --kill-on-bad-exit=0 " in ended.stdout
    assert subprocess.run(["bash", "-n"], input=ended.stdout, text=True, check=False).returncode == 0


MISTAKES = [
    *((name, SCRIPTS[name], "--config=... is missing") for name in SCRIPTS),
    *((name, [*SCRIPTS[name], TRAIN[0]], "--workdir=... is missing") for name in SCRIPTS),
    *((name, [*SCRIPTS[name], *TRAIN, "extra"], "unexpected argument 'extra'") for name in SCRIPTS),
    ("tpu_pod", [*SCRIPTS["tpu_pod"], TRAIN[0], "--workdir=runs/a"], "--workdir is 'runs/a'; allowed: gs://"),
    ("tpu_pod", [*SCRIPTS["tpu_pod"], *TRAIN, "--create=v9-4"], "--create is 'v9-4'; allowed: v4-CHIPS"),
    ("tpu_pod", [*SCRIPTS["tpu_pod"], *TRAIN, "--spot"], "--spot is for --create"),
    ("tpu_pod", [*SCRIPTS["tpu_pod"], *TRAIN, "--check"], "--check knows no such machine; allowed: v5litepod-4"),
    ("tpu_pod", [*SCRIPTS["tpu_pod"], *TRAIN, "--create=v4-8", "--check"], "--check knows no such machine"),
    ("gke", [*SCRIPTS["gke"][:-1], "--tpu-type=h100", *TRAIN], "--tpu-type is 'h100'"),
    ("gke", [*SCRIPTS["gke"], *TRAIN, "--name=Big"], "--name is 'Big'"),
    ("gke", [*SCRIPTS["gke"], *TRAIN, "--config.training.sigterm_status=0"], "would tell Kubernetes"),
    ("slurm", ["--nodes=0", "--gpus=8", *TRAIN], "--nodes is 0; allowed: 1 or more"),
    ("slurm", [*SCRIPTS["slurm"], *TRAIN, "--time=soon"], "--time is 'soon'"),
    ("multi_gpu", ["--gpus=4", "--fsdp=3", *TRAIN], "--gpus is 4, --fsdp 3"),
    ("multi_gpu", ["--gpus=4", *TRAIN], "but there are 0, by CUDA_VISIBLE_DEVICES, else nvidia-smi"),
    ("multi_gpu", ["--gpus=4", *TRAIN, "--config.mesh.data=2"], "follow from --gpus"),
    ("local", ["--processes=0", *TRAIN], "--processes is 0; allowed: 1 to 64"),
    ("local", ["--mode=sample", "--check", *TRAIN], "--check is for --mode=train"),
]


@pytest.mark.parametrize(("name", "flags", "message"), MISTAKES, ids=[f"{n}: {m}" for n, _, m in MISTAKES])
def test_a_mistake_is_told_and_nothing_runs(launch, name, flags, message):
    ended, calls = launch(name, *flags)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert [call for call in calls if call in ("gcloud", "xpk", "sbatch")] == []
