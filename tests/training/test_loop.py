"""Training runs: what they leave, and that an interrupted one continues as if nothing had happened."""

import dataclasses
import json
import math
import shutil
import signal

import jax
import numpy as np
import pytest
from etils import epath

from bd3_jax.checkpoints import orbax, run_folder
from bd3_jax.checkpoints.orbax import latest_step, restore_params
from bd3_jax.data.pipeline import eval_batches, train_batches
from bd3_jax.errors import UserError
from bd3_jax.evaluation import perplexity as evaluation
from bd3_jax.evaluation.perplexity import evaluate
from bd3_jax.folders import alone
from bd3_jax.metrics import read_metrics
from bd3_jax.sampling import drawing
from bd3_jax.sampling.run import sample
from bd3_jax.training import loop, validation
from bd3_jax.training.loop import train
from tests.training.runs import records

# Records every second step and validates every fourth: interruptions fall on, before and after them.
EVERY = {"training.log_every": 2, "training.eval_every": 4, "training.checkpoint_every": 100}


@pytest.fixture(scope="module")
def uninterrupted(tiny_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    config = tiny_config("bd3lm,block_size=4", **EVERY, **{"eval.weights": "raw"})
    train(config, workdir)
    return config, workdir


def interrupted_reader(step, number):
    """`train_batches` that sends this process a signal while it reads the batch of `step`."""

    def read(*args):
        for count, batch in enumerate(train_batches(*args), start=1):
            if count == step:
                signal.raise_signal(number)
            yield batch

    return read


def test_what_a_run_leaves(uninterrupted):
    config, workdir = uninterrupted
    found = records(workdir)
    assert [step for step, name in found if name == "train/loss"] == [2, 4, 6]
    assert [step for step, name in found if name == "eval/perplexity"] == [0, 4, 6]
    assert all(np.isfinite(found[step, "train/grad_norm"]) for step in (2, 4, 6))
    # Warm-up: update n of 4 has (n - 1)/4 of the rate.
    assert [found[step, "train/learning_rate"] for step in (2, 4, 6)] == pytest.approx([0.25e-3, 0.75e-3, 1e-3])
    assert found[0, "eval/nll"] > found[6, "eval/nll"]
    assert {found[step, "eval/weights"] for step in (0, 4, 6)} == {"ema"}  # raw is what bd3 eval is to take
    assert (found[6, "eval/seed"], found[6, "eval/batch_size"]) == (config.eval.seed, config.eval.batch_size)
    assert json.loads((workdir / "config.json").read_text()) == json.loads(json.dumps(config.to_dict()))
    assert (workdir / "tokenizer" / "tokenizer.json").exists()
    assert (workdir / "manifest.json").exists()
    assert list((workdir / "tensorboard").iterdir())
    assert latest_step(workdir) == 6


def test_a_finished_run_is_left_alone(uninterrupted, capsys):
    config, workdir = uninterrupted
    before = (workdir / "metrics.jsonl").read_bytes()
    train(config, workdir)
    assert "finished, 6 steps are done" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("step", "number", "status"), [(3, signal.SIGTERM, 143), (4, signal.SIGINT, 130), (5, signal.SIGTERM, 143)]
)
def test_an_interrupted_run_continues_exactly(uninterrupted, tmp_path, capsys, monkeypatch, step, number, status):
    config, reference = uninterrupted
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_batches", interrupted_reader(step, number))
        with pytest.raises(SystemExit) as ended:
            train(config, tmp_path)
    assert ended.value.code == status
    assert signal.getsignal(number) is before
    assert latest_step(tmp_path) == step
    assert f"stopped by {signal.Signals(number).name} after step {step} of 6" in capsys.readouterr().out

    train(config, tmp_path)
    assert f"continues after step {step} of 6" in capsys.readouterr().out
    assert records(tmp_path) == records(reference)
    for weights in ("ema", "raw"):
        (ours, _), (theirs, _) = (restore_params(config, workdir, weights) for workdir in (tmp_path, reference))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_validation_that_is_made_up_for_can_be_the_best(tiny_config, tmp_path, monkeypatch):
    """Stopped at step 2, before its validation, and at step 3: what is found at step 2 counts in all later sessions."""
    often = {"training.eval_every": 2, "training.checkpoint_every": 2}
    config = tiny_config("ar", **often, **{"training.keep_checkpoints": 1, "training.keep_best": 1})
    nlls = iter([9.0, 1.0, 3.0, 2.0])  # at steps 0, 2, 4, 6

    def evaluate_params(*args, **named):
        return dataclasses.replace(evaluation.evaluate_params(*args, **named), nll=next(nlls))

    monkeypatch.setattr(validation, "evaluate_params", evaluate_params)
    for batches in (2, 1):
        with monkeypatch.context() as patch:
            patch.setattr(loop, "train_batches", interrupted_reader(batches, signal.SIGTERM))
            with pytest.raises(SystemExit):
                train(config, tmp_path)
    train(config, tmp_path)
    assert [record["eval/nll"] for record in read_metrics(tmp_path) if "eval/nll" in record] == [9.0, 1.0, 3.0, 2.0]
    assert orbax.steps(tmp_path) == [2, 6]


@pytest.mark.parametrize(
    ("string", "noise"),
    [
        ("ar", {}),
        ("sedd", {}),
        ("bd3lm,block_size=4", {"noise.low": 0.3, "noise.high": 0.8, "noise.resample": True}),
    ],
)
def test_every_objective_continues_exactly(tiny_config, tmp_path, monkeypatch, string, noise):
    """The last is the setting of the quickstart: a clipped interval, drawn until the masked fraction lies in it."""
    config = tiny_config(string, **EVERY, **noise, **{"training.num_steps": 4})
    train(config, epath.Path(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_batches", interrupted_reader(3, signal.SIGTERM))
        with pytest.raises(SystemExit):
            train(config, epath.Path(tmp_path / "stopped"))
    train(config, epath.Path(tmp_path / "stopped"))
    assert records(tmp_path / "stopped") == records(tmp_path / "whole")
    ours, theirs = (restore_params(config, epath.Path(tmp_path / run), "raw")[0] for run in ("stopped", "whole"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


SEARCH = {
    "search.enabled": True, "search.num_batches": 1, "search.batch_size": 8, "search.widths": (0.9,),
    "noise.resample": True, "training.microbatches": 2, "training.sample_every": 2, "eval.without_special": "training",
}  # fmt: skip


def stopped_validation(at):
    """`eval_batches` of the search that sends SIGTERM the `at`-th time."""
    calls = iter(range(1, 100))

    def read(*args):
        if next(calls) == at:
            signal.raise_signal(signal.SIGTERM)
        return eval_batches(*args)

    return read


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_search_that_is_interrupted_is_done_again(tiny_config, tmp_path, monkeypatch, files_in, at):
    """At step 0, 2 or the last, 4, twice; the run continues exactly, with accumulation, the search and samples."""
    config = tiny_config("bd3lm,block_size=4", **SEARCH, **{"training.num_steps": 4, "training.eval_every": 2})
    for call in (at, 1):
        with monkeypatch.context() as patch:
            patch.setattr(validation, "eval_batches", stopped_validation(call))
            with pytest.raises(SystemExit) as ended:
                train(config, epath.Path(tmp_path / "stopped"))
        assert ended.value.code == 143
        assert latest_step(epath.Path(tmp_path / "stopped")) == 2 * (at - 1)
    for name in ("stopped", "whole"):
        train(config, epath.Path(tmp_path / name))
    found, wanted = (records(tmp_path / name) for name in ("stopped", "whole"))
    assert found == wanted
    assert [step for step, name in found if name == "samples/text"] == [2, 4]
    assert not found[4, "eval/insert_eos"]
    for step in (0, 2):  # the chosen interval is used from the next step on
        chosen = (found[step, "search/low"], found[step, "search/high"])
        used = (found[step + 1, "train/interval_low"], found[step + 1, "train/interval_high"])
        assert used == pytest.approx(chosen)
        table = found[step, "search/candidates"]
        assert min(table, key=lambda row: row[2])[:2] == list(chosen)
    assert orbax.summarize(epath.Path(tmp_path / "whole")).low == pytest.approx(found[4, "search/low"])
    left = files_in(tmp_path / "stopped")
    train(config, epath.Path(tmp_path / "stopped"))
    assert files_in(tmp_path / "stopped") == left


def test_samples_that_are_interrupted_are_drawn_again(tiny_config, tmp_path, monkeypatch):
    """Those after the last step, whose validation is done; from the weights that are asked for."""
    samples = {"training.sample_every": 4, "training.num_steps": 4, "sampling.weights": "raw"}
    config, seen = tiny_config("ar", **samples), []

    def draw(sampler, params, *args, **named):
        seen.append(params)
        if len(seen) == 1:
            signal.raise_signal(signal.SIGTERM)
        return drawing.draw(sampler, params, *args, **named)

    monkeypatch.setattr(validation, "draw", draw)
    with pytest.raises(SystemExit):
        train(config, tmp_path)
    for _ in range(2):  # once they are there, nothing is done
        train(config, tmp_path)
        assert [record["step"] for record in read_metrics(tmp_path) if "samples/text" in record] == [4]
        assert len(seen) == 2
    jax.tree.map(np.testing.assert_array_equal, seen[1], restore_params(config, tmp_path, "raw")[0])


def test_the_status_after_sigterm_is_a_setting(tiny_config, tmp_path, monkeypatch):
    config = tiny_config("ar", **EVERY, **{"training.sigterm_status": 75})
    monkeypatch.setattr(loop, "train_batches", interrupted_reader(1, signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        train(config, tmp_path)
    assert ended.value.code == 75


def test_some_steps_are_traced(tiny_config, tmp_path):
    """From the 11th of the session on."""
    few = {"training.num_steps": 12, "training.eval_every": 100, "training.log_every": 100, "eval.num_batches": 1}
    train(tiny_config("ar", **few, profile_steps=1), tmp_path)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optimizer.learning_rate": 0.5}, "config.optimizer.learning_rate is 0.5, but .*config.json has 0.001"),
        ({"training.batch_size": 16}, "config.training.batch_size is 16, but .* has 8"),
        ({"model.num_layers": 3}, "config.model.num_layers is 3, but .* has 2"),
        ({"seed": 1}, "config.seed is 1, but .* has 0"),
    ],
)
def test_a_run_cannot_change_its_model_or_data(uninterrupted, tiny_config, overrides, message):
    _, workdir = uninterrupted
    before = (workdir / "config.json").read_bytes()
    with pytest.raises(UserError, match=message):
        train(tiny_config("bd3lm,block_size=4", **EVERY, **overrides), workdir)
    assert (workdir / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda manifest: manifest["splits"]["train"].update(rows=99), "training split"),
        (lambda manifest: manifest["sha256"].update(train="other"), "text of the training split"),
        (lambda manifest: manifest.update(fingerprint="other"), "tokenizer"),
    ],
)
def test_data_prepared_anew_is_refused(uninterrupted, tmp_path, change, name):
    config, workdir = uninterrupted
    manifest = json.loads((workdir / "manifest.json").read_text())
    change(manifest)
    copy = tmp_path / "copy"
    (copy / "checkpoints" / "5").mkdir(parents=True)
    (copy / "config.json").write_bytes((workdir / "config.json").read_bytes())
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=rf"the {name} in .* is not the one that .* began with"):
        train(config, copy)


@pytest.fixture
def lost(uninterrupted, tmp_path):
    """The run with all but its checkpoints, and its file names and contents."""
    config, workdir = uninterrupted
    copy = tmp_path / "lost"
    shutil.copytree(workdir, copy, ignore=shutil.ignore_patterns("checkpoints"))
    return config, copy


def test_a_run_that_lost_its_checkpoints_is_left_alone(lost, files_in):
    config, workdir = lost
    often = dataclasses.replace(config, training=dataclasses.replace(config.training, checkpoint_every=2))
    run_folder.write_config(often, workdir)  # so that step 6 was long after a checkpoint
    before = files_in(workdir)
    with pytest.raises(UserError, match=r"has metrics up to step 6 but no checkpoint to continue from"):
        train(config, workdir)
    assert files_in(workdir) == before


def test_a_run_stopped_before_its_first_checkpoint_begins_again(lost, uninterrupted):
    config, workdir = lost
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:9])
    train(config, workdir)
    assert records(workdir) == records(uninterrupted[1])


def test_two_trainings_do_not_share_a_folder(tiny_config, tmp_path):
    config = tiny_config("bd3lm,block_size=4", **EVERY)
    with (
        alone(epath.Path(tmp_path / "run" / ".lock"), ""),
        pytest.raises(UserError, match=r"--workdir is '.*run', where another process is training"),
    ):
        train(config, epath.Path(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_found_before_anything_is_compiled(tiny_config, tmp_path, capsys):
    (tmp_path / "run").write_text("mine")
    for program in (train, evaluate, sample):
        with pytest.raises(UserError, match=r"--workdir is '.*run', but .*run is a file"):
            program(tiny_config("bd3lm,block_size=4"), epath.Path(tmp_path / "run"))
    assert capsys.readouterr().out == ""


def test_more_steps_under_a_cosine_change_the_rate(tiny_config, tmp_path, capsys):
    """Warm-up of 4; update 6 is the 2nd of 8 - 4 that fall, where it was the 2nd of 6 - 4."""
    cosine = {"optimizer.decay": "cosine"}
    run_folder.write_config(tiny_config("ar", **cosine), tmp_path)
    loop._tell_rate(tiny_config("ar", **cosine), tmp_path, 5)
    assert capsys.readouterr().out == ""
    loop._tell_rate(tiny_config("ar", **cosine, **{"training.num_steps": 8}), tmp_path, 5)
    rates = [1e-3 * (1 + math.cos(math.pi * done)) / 2 for done in (1 / 4, 1 / 2)]
    assert f"goes on at {rates[0]:.3g} instead of {rates[1]:.3g}" in capsys.readouterr().out
    run_folder.write_config(tiny_config("ar"), tmp_path)
    loop._tell_rate(tiny_config("ar", **{"training.num_steps": 8}), tmp_path, 5)
    assert capsys.readouterr().out == ""


def test_the_host_stays_ahead_of_the_device(uninterrupted, tmp_path, monkeypatch):
    """It waits for a step when two more are on their way, records or not; in the end, and before it saves, for all."""
    config, _ = uninterrupted
    seldom = dataclasses.replace(config.training, eval_every=6, checkpoint_every=4, sample_every=0)
    config, read, waits = dataclasses.replace(config, training=seldom), [], []

    def count(*args):
        for batch in train_batches(*args):
            read.append(batch)
            yield batch

    monkeypatch.setattr(loop, "train_batches", count)
    monkeypatch.setattr(
        jax, "block_until_ready", lambda metrics: waits.append((len(read), float(metrics["train/loss"])))
    )
    train(config, tmp_path)
    assert [steps for steps, _ in waits] == [3, 4, 4, 4, 6, 6]
    losses = records(tmp_path)
    assert [np.mean([loss for _, loss in waits[i : i + 2]]) for i in (0, 2)] == pytest.approx(
        [losses[step, "train/loss"] for step in (2, 4)]
    )


def test_mistakes_leave_nothing_behind(tiny_config, tmp_path):
    for overrides, message in (
        ({"mesh.tensor": 3}, "config.mesh.data, fsdp, tensor are -1, 1, 3"),
        ({"data.directory": str(tmp_path / "none")}, "nothing is prepared"),
        ({"eval.split": "test"}, "no split 'test'"),
    ):
        with pytest.raises(UserError, match=message):
            train(tiny_config("bd3lm,block_size=4", **overrides), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
