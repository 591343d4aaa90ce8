"""`bd3 compile` from the command line: verdicts, figures, mistakes. `cpu:N` needs no compiler that is not there."""

import dataclasses
import json

import pytest

from bd3_jax import cli
from bd3_jax.compiling import run
from bd3_jax.compiling.advice import advice
from bd3_jax.compiling.report import Report
from bd3_jax.compiling.targets import CHIPS, GIB
from bd3_jax.config_dict import from_config_dict
from bd3_jax.configs import owt

TINY = """
from bd3_jax.configs import base

def get_config(string):
    config = base.get_config(string)
    config.model.update(length=16, width=16, num_layers=2, num_heads=2, cond_dim=8)
    config.data.tokenizer = "bytes"
    config.training.batch_size = config.eval.batch_size = config.sampling.batch_size = 4
    config.sampling.max_length = 16
    return config
"""


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(TINY)
    return f"--config={path}:bd3lm,block_size=4"


def test_training_on_two_devices(tiny, tmp_path, capsys):
    """Gradients of every parameter, in float32, are summed over the devices: that is all that is.

    Of AR's: the projections of adaLN have gradients of rank 1, which are summed before they are multiplied out.
    """
    file = tmp_path / "figures.json"
    assert cli.main(["compile", tiny.replace("bd3lm,block_size=4", "ar"), "--topology=cpu:2", f"--json={file}"]) == 0
    (record,) = json.loads(file.read_text())
    report = Report.from_record(record)
    assert report.fits
    held = report.memory["parameters"]
    assert report.memory["average (EMA)"] == held
    assert 2 * held <= report.memory["optimiser"] < 2 * held + 100
    reduced = sum(c.size for c in report.collectives if c.kind == "all-reduce")
    assert 0.98 * held < reduced < 1.02 * held
    assert all(c.group == 2 for c in report.collectives)
    assert "fits" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eval", "sample"])
def test_other_modes(tiny, mode, capsys):
    assert cli.main(["compile", tiny, "--topology=cpu:2", f"--mode={mode}"]) == 0
    assert f"{mode} on cpu:2: fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--topology is missing"),
        (["--topology=v9:2x2"], "CHIP:SHAPE"),
        (["--topology=cpu:3"], "a multiple of 3"),
        (["--topology=cpu:2", "--config.mesh.fsdp=4"], "number of devices"),
        (["--topology=cpu:1", "--config.mesh.tensor=2", "--search"], "number of devices"),
        (["--topology=cpu:1", "--mode=eval", "--config.eval.estimator=left_to_right"], "allowed here: monte_carlo"),
    ],
)
def test_mistakes_are_one_line(tiny, flags, said, capsys):
    assert cli.main(["compile", tiny, *flags]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert [line for line in error.splitlines() if not line.startswith("compiling ")] == [error.splitlines()[-1]]


def report(fits):
    return Report(
        topology="v5e:2x2", mode="train", chips=4, rows=16, fits=fits, memory={"parameters": GIB}, needed=20 * GIB,
        available=CHIPS["v5e"].memory, program_flops=1e12, compiler_flops=None, compiler_bytes=None,
        compiler_seconds=None, cycles=0, collectives=[], largest=[], advice=[] if fits else ["--config.x=1"],
        lower_seconds=1.0, compile_seconds=2.0,
    )  # fmt: skip


def test_what_does_not_fit_is_exit_status_1_and_advice(tiny, monkeypatch, capsys):
    monkeypatch.setattr(run, "compile_for", lambda *args: report(fits=False))
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["compile", tiny, "--topology=v5e:2x2"])
    assert exit_info.value.code == 1
    out = capsys.readouterr().out
    assert "DOES NOT FIT, 20.00 GiB of 15.75 GiB a chip" in out
    assert "would help: --config.x=1" in out


def test_advice_names_what_is_set():
    config = from_config_dict(owt.get_config("bd3lm,block_size=4"))
    dense = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="dense", dtype="float32"))
    held = {"parameters": 8 * GIB}
    found = advice(dense, "train", held, CHIPS["v5e"], chips=4)
    assert [line.split(" ")[0] for line in found] == [
        "--config.model.dtype=bfloat16", "--config.model.attention=auto", "--config.training.microbatches=2",
        "--config.model.remat=block", "--config.mesh.fsdp=4", "--config.training.batch_size=256",
    ]  # fmt: skip
    few = dataclasses.replace(config, eval=dataclasses.replace(config.eval, batch_size=4))
    (only,) = advice(few, "eval", {"parameters": GIB}, CHIPS["v5e"], chips=4)
    assert only.startswith("--config.mesh.tensor=2")


def test_advice_is_what_the_machine_takes():
    """512 rows in 2 parts over 256 chips, in two slices: no fewer rows, no further parts, nothing across slices."""
    config = from_config_dict(owt.get_config("bd3lm,block_size=4"))
    training = dataclasses.replace(config.training, batch_size=512, microbatches=2)
    whole = dataclasses.replace(config, training=training, mesh=dataclasses.replace(config.mesh, tensor=1))
    found = advice(whole, "train", {"parameters": 8 * GIB}, CHIPS["v5e"], chips=256, slices=2)
    assert [line.split(" ")[0] for line in found] == ["--config.model.remat=block"]
    split = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, tensor=4))
    found = advice(split, "train", {"parameters": 8 * GIB}, CHIPS["v5e"], chips=16)
    assert "--config.mesh.fsdp=4" in [line.split(" ")[0] for line in found]
    split = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, tensor=4, fsdp=4))
    assert "mesh.fsdp" not in str(advice(split, "train", {"parameters": 8 * GIB}, CHIPS["v5e"], chips=16))
    # 12 heads over 4 chips; 8 do not divide them.
    few = dataclasses.replace(split, eval=dataclasses.replace(split.eval, batch_size=4))
    assert advice(few, "eval", {"parameters": GIB}, CHIPS["v5e"], chips=16) == []


@pytest.mark.parametrize("begin", [4, 512])
def test_search_finds_the_largest_power_of_two_for_every_policy(begin):
    """Against a machine whose memory is known: 4, 8 and 16 rows a chip, or none."""
    room = {"none": 4, "block": 8, "full": 16}
    config = from_config_dict(owt.get_config("bd3lm,block_size=4"))
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, batch_size=begin))

    def compile_one(config, topology, mode, vocab_size):
        rows, left = divmod(config.training.batch_size, 4)
        assert left == 0
        return dataclasses.replace(report(fits=rows <= room[config.model.remat]), rows=4 * rows)

    found = {policy: (rows, best.rows) for policy, rows, best in run.search(config, "v5e:2x2", "train", 0, compile_one)}
    assert found == {policy: (rows, 4 * rows) for policy, rows in room.items()}
    parts = dataclasses.replace(config, training=dataclasses.replace(config.training, batch_size=12, microbatches=3))
    found = {policy: rows for policy, rows, _ in run.search(parts, "v5e:2x2", "train", 0, compile_one)}
    assert found == {"none": 3, "block": 6, "full": 12}
    room["none"] = 0
    policy, rows, tried = next(run.search(config, "v5e:2x2", "train", 0, compile_one))
    assert (policy, rows, tried.rows, tried.fits) == ("none", 0, 4, False)


def test_a_search_without_gradients_tries_one_policy():
    config = from_config_dict(owt.get_config("mdlm"))
    compile_one = lambda config, *_: report(fits=config.eval.batch_size <= 32)
    found = [(policy, rows) for policy, rows, _ in run.search(config, "v5e:2x2", "eval", 0, compile_one)]
    assert found == [(config.model.remat, 8)]


def test_a_search_ends_at_what_a_batch_may_hold():
    """2**28 tokens, though the memory of these four chips never ends."""
    config = from_config_dict(owt.get_config("mdlm"))
    (found,) = run.search(config, "v5e:2x2", "eval", 0, lambda config, *_: report(fits=True))
    assert found[1] * 4 * config.model.length == 2**28
