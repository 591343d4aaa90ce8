"""Text from a checkpoint: what is written, and what is refused before anything is."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from bd3_jax.checkpoints import orbax, run_folder
from bd3_jax.data.tokenizers import bytes_tokenizer
from bd3_jax.errors import UserError
from bd3_jax.language_model import LanguageModel
from bd3_jax.sampling import run as sampling
from bd3_jax.sampling.run import sample

PROMPT = "red"


@pytest.fixture(scope="module")
def run(tiny_config, make_run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    config = tiny_config("bd3lm,block_size=4", **{"sampling.prompt": PROMPT, "sampling.num_samples": 3})
    make_run(config, workdir)
    return config, workdir


def change(config, **sampling):
    return dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, **sampling))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_samples_are_printed_and_written(run, capsys):
    config, workdir = run
    samples = sample(config, workdir)
    assert lines(workdir / "samples.jsonl") == samples
    printed = capsys.readouterr().out
    for index, drawn in enumerate(samples):
        assert drawn["index"] == index
        assert drawn["seed"] == config.sampling.seed
        assert drawn["step"] == 5
        assert drawn["tokens"][: 1 + len(PROMPT)] == [256, *PROMPT.encode()]
        assert len(drawn["tokens"]) == config.sampling.max_length
        assert drawn["text"].startswith(PROMPT)
        assert drawn["text"] in printed
        assert drawn["drawn"] == drawn["nfe"] == 16 - 1 - len(PROMPT)
        assert drawn["cache_calls"] == 0  # the call that draws a block's first token stores the block before
        assert drawn["distinct_1"] == len(set(drawn["tokens"])) / 16
        assert (drawn["stopped"], drawn["rejected"]) == ("", 0)
        assert drawn["seconds"] > 0
    assert len({drawn["text"] for drawn in samples}) == 3


def test_the_speed_is_that_of_drawn_tokens(run, capsys):
    config, workdir = run
    samples = sample(config, workdir)
    told = float(re.search(r"([\d,.]+) tokens/s", capsys.readouterr().out)[1].replace(",", ""))
    assert told == pytest.approx(3 * (15 - len(PROMPT)) / sum(drawn["seconds"] for drawn in samples), rel=0.01, abs=0.1)


def test_earlier_samples_are_kept(run, capsys):
    config, workdir = run
    first = sample(config, workdir)
    kept = sorted(workdir.glob("samples-*.jsonl"))
    second = sample(change(config, seed=1, num_samples=1), workdir)
    (moved,) = set(workdir.glob("samples-*.jsonl")) - set(kept)
    assert lines(moved) == first
    assert lines(workdir / "samples.jsonl") == second
    assert str(moved) in capsys.readouterr().out


def test_samples_do_not_depend_on_the_batch_size(run):
    config, workdir = run
    two, three = ([drawn["tokens"] for drawn in sample(change(config, batch_size=size), workdir)] for size in (2, 8))
    assert two == three


@pytest.mark.slow
def test_samples_do_not_depend_on_the_mesh(run, tmp_path):
    config, workdir = run
    meshes = ("8x1x1", "1x4x2")
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy, ignore=shutil.ignore_patterns("samples*"))
    config = change(config, num_samples=9, batch_size=8)  # the second batch has one sample, and is filled up
    run_folder.write_config(config, copy)
    script = Path(__file__).parent / "eight_devices.py"
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"  # to compile sooner
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(script), str(copy), *meshes]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    expected = [drawn["tokens"] for drawn in sample(config, copy)]
    assert json.loads(ended.stdout.splitlines()[-1]) == dict.fromkeys(meshes, expected)


@pytest.mark.parametrize(
    ("asked", "samples", "parts", "together"), [(4, 10, 1, 4), (4, 3, 1, 3), (3, 3, 2, 4), (8, 3, 2, 4), (2, 9, 8, 8)]
)
def test_a_batch_is_one_that_the_devices_can_split(run, asked, samples, parts, together):
    c = change(run[0], batch_size=asked, num_samples=samples).sampling
    assert sampling.batch_size(c, parts) == together


def test_only_the_first_process_writes(run, tmp_path, monkeypatch, capsys):
    config, workdir = run
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy, ignore=shutil.ignore_patterns("samples*"))
    expected = [drawn["tokens"] for drawn in sample(config, workdir)]
    capsys.readouterr()
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert [drawn["tokens"] for drawn in sample(config, copy)] == expected
    assert not list(copy.glob("samples*"))
    assert capsys.readouterr().out == ""


def test_gaps_are_filled(run, capsys):
    config, workdir = run
    for drawn in sample(change(config, prompt="", infill="re[MASK*4]blue"), workdir):
        assert (len(drawn["tokens"]), drawn["drawn"]) == (1 + 10, 4)
        assert bytes(drawn["tokens"][1:3]) == b"re"
        assert bytes(drawn["tokens"][7:]) == b"blue"


def test_trace_and_watch_change_no_token(run, capsys):
    config, workdir = run
    plain = [drawn["tokens"] for drawn in sample(config, workdir)]
    capsys.readouterr()
    (workdir / "trace.html").write_text("of before")
    with (workdir / "trace.html").open() as before:
        seen = [drawn["tokens"] for drawn in sample(config, workdir, trace=True, watch=True)]
        assert before.read() == "of before"  # the file is another, complete when it has the name
    assert seen == plain
    printed = capsys.readouterr().out
    assert f"trace in {workdir / 'trace.html'}" in printed
    assert printed.count("--- sample 0") == 2  # as it fills up, and when it is done
    assert "<script" in (workdir / "trace.html").read_text()


def test_weights(run):
    config, workdir = run
    raw = sample(change(config, weights="raw"), workdir)
    ema = sample(config, workdir)
    assert [drawn["tokens"] for drawn in raw] != [drawn["tokens"] for drawn in ema]


def test_the_checkpoint_of_a_step(run, tmp_path, random_params):
    config, workdir = run
    shutil.copytree(workdir, tmp_path / "run", ignore=shutil.ignore_patterns("samples*"))
    checkpoints = orbax.Checkpoints(tmp_path / "run", keep=2)
    lm = LanguageModel.from_config(config, bytes_tokenizer().ids)
    checkpoints.save(2, {"ema": random_params(lm, seed=2), "low": np.float32(0.001), "high": np.float32(1)}, {})
    checkpoints.close()
    newest, early = sample(config, tmp_path / "run"), sample(config, tmp_path / "run", 2)
    assert [{drawn["step"] for drawn in samples} for samples in (newest, early)] == [{5}, {2}]
    assert newest[0]["tokens"] != early[0]["tokens"]
    with pytest.raises(UserError, match="run has no checkpoint of step 3; allowed: 2, 5"):
        sample(config, tmp_path / "run", 3)
    assert lines(tmp_path / "run" / "samples.jsonl") == early


@pytest.mark.parametrize(
    ("prompt", "max_length", "message"),
    [
        ("a" * 16, 16, "has 17 tokens with BOS; allowed: up to 16"),
        ("abc", 3, "has 4 tokens with BOS; allowed: up to 3"),
    ],
)
def test_a_prompt_too_long_leaves_the_samples_alone(run, prompt, max_length, message):
    config, workdir = run
    sample(config, workdir)
    before = {path.name: path.read_text() for path in workdir.glob("samples*")}
    with pytest.raises(UserError, match=message):
        sample(change(config, prompt=prompt, max_length=max_length), workdir)
    assert {path.name: path.read_text() for path in workdir.glob("samples*")} == before


def test_a_run_without_its_tokenizer(run, tmp_path):
    config, workdir = run
    shutil.copytree(workdir, tmp_path / "run", ignore=shutil.ignore_patterns("tokenizer.json", "samples*"))
    with pytest.raises(UserError, match=r"run has no tokenizer/tokenizer.json, so its samples would have no text"):
        sample(config, tmp_path / "run")


def test_no_checkpoint(run, tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        sample(run[0], tmp_path)
