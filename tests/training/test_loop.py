"""Training runs: what they leave, and that an interrupted one continues as if nothing had happened."""

import json
import signal

import jax
import numpy as np
import pytest

from bd3_jax.checkpoints.orbax import latest_step, restore_params
from bd3_jax.data.pipeline import train_batches
from bd3_jax.errors import UserError
from bd3_jax.training import loop
from bd3_jax.training.loop import train
from tests.training.runs import records

# Records every second step and validates every fourth: interruptions fall on, before and after them.
EVERY = {"training.log_every": 2, "training.eval_every": 4, "training.checkpoint_every": 100}


@pytest.fixture(scope="module")
def uninterrupted(tiny_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    config = tiny_config("bd3lm,block_size=4", **EVERY)
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
    assert json.loads((workdir / "config.json").read_text()) == config.to_dict()
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


def test_data_prepared_anew_is_refused(uninterrupted, tmp_path):
    config, workdir = uninterrupted
    manifest = json.loads((workdir / "manifest.json").read_text())
    manifest["splits"]["train"]["rows"] += 1
    copy = tmp_path / "copy"
    (copy / "checkpoints" / "5").mkdir(parents=True)
    (copy / "config.json").write_bytes((workdir / "config.json").read_bytes())
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"the training split in .* is not the one that .* began with"):
        train(config, copy)


def test_mistakes_leave_nothing_behind(tiny_config, tmp_path):
    for overrides, message in (
        ({"mesh.tensor": 3}, "config.mesh.data, fsdp, tensor are -1, 1, 3"),
        ({"data.directory": str(tmp_path / "none")}, "nothing is prepared"),
        ({"eval.split": "test"}, "no split 'test'"),
    ):
        with pytest.raises(UserError, match=message):
            train(tiny_config("bd3lm,block_size=4", **overrides), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
