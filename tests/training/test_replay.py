"""A run whose numbers are not finite stops with status 3, and `bd3 replay` repeats the step."""

import dataclasses
import json

import pytest
from etils import epath

from bd3_jax import cli
from bd3_jax.checkpoints.orbax import Checkpoints, latest_step
from bd3_jax.errors import UserError
from bd3_jax.metrics import read_metrics
from bd3_jax.training.loop import train
from bd3_jax.training.replay import replay

# The first update moves every parameter by 1e30.
DIVERGES = {
    "optimizer.learning_rate": 1e30,
    "optimizer.warmup_steps": 0,
    "training.max_skipped": 3,
    "training.checkpoint_every": 3,
}


@pytest.mark.slow
def test_a_run_that_has_failed_is_not_saved(tiny_config, tmp_path):
    """Though the host, which is ahead, comes to the checkpoint before it knows."""
    config, workdir = tiny_config("ar", **DIVERGES | {"training.checkpoint_every": 4}), epath.Path(tmp_path / "run")
    with pytest.raises(SystemExit):
        train(config, workdir)
    assert (latest_step(workdir), latest_step(workdir / "failed_step")) == (None, 4)
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, width=2 * config.model.width))
    with pytest.raises(UserError, match=r"config\.model\.width is .*, but"):
        replay(wider, workdir)


def test_a_lower_limit_does_not_stop_what_was_not_stuck(tiny_config, tmp_path, monkeypatch):
    """Four steps in a row were skipped before the checkpoint; from now on two are the limit."""
    config, workdir = tiny_config("ar", **{"training.num_steps": 2}), epath.Path(tmp_path / "run")
    train(config, workdir)
    restore = Checkpoints.restore

    def after_skips(self, *args):
        step, state, position = restore(self, *args)
        return step, dataclasses.replace(state, skipped=state.skipped + 4), position

    monkeypatch.setattr(Checkpoints, "restore", after_skips)
    train(
        dataclasses.replace(config, training=dataclasses.replace(config.training, num_steps=4, max_skipped=2)), workdir
    )
    assert latest_step(workdir) == 4


@pytest.mark.slow
def test_a_run_that_diverges_stops_and_is_replayed(tiny_config, tmp_path, capsys):
    config, workdir = tiny_config("bd3lm,block_size=4", **DIVERGES), epath.Path(tmp_path / "run")
    for _ in range(2):  # the same command comes to the same step
        with pytest.raises(SystemExit) as ended:
            train(config, workdir)
        assert ended.value.code == 3
        assert "stopped at step 4, the last of 3 in a row" in capsys.readouterr().out
    assert [record["train/skipped"] for record in read_metrics(workdir) if "train/loss" in record][:3] == [0, 1, 1]

    assert replay(config, workdir)
    out = capsys.readouterr().out
    assert f"step 4 of {workdir}, key" in out
    assert out.count("the same") == 2
    assert "gradient of blocks.qkv" in out
    assert cli.main(["replay", f"--workdir={workdir}"]) == 0

    # What is compared is what was saved.
    position = workdir / "failed_step" / "checkpoints" / "4" / "position" / "metadata"
    saved = json.loads(position.read_text())
    position.write_text(json.dumps(saved | {"train/loss": 1.0}))
    assert not replay(config, workdir)
    position.write_text(json.dumps(saved | {"key": [0, 0]}))
    with pytest.raises(UserError, match=r"config\.seed is 0, which gives another key than \[0, 0\]"):
        replay(config, workdir)


def test_a_run_without_such_a_step(tmp_path, tiny_config):
    with pytest.raises(UserError, match=r"has no failed_step: no training that stopped there by itself, with status 3"):
        replay(tiny_config("ar"), epath.Path(tmp_path))
