"""Where a run may begin: nothing that somebody else left, or that had a checkpoint, is written over."""

import json

import pytest
from etils import epath

from bd3_jax.checkpoints import run_folder
from bd3_jax.configs import base
from bd3_jax.errors import UserError


@pytest.fixture
def config(tiny_config):
    return tiny_config("bd3lm,block_size=4", **{"training.checkpoint_every": 4})


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path)


def write_metrics(workdir, *steps):
    (workdir / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in steps))


def test_a_new_folder(config, workdir):
    run_folder.check_begins(config, workdir / "new")
    (workdir / "notes.txt").write_text("mine")
    run_folder.check_begins(config, workdir)


@pytest.mark.parametrize("steps", [[], [0], [0, 3], [0, 4, 8]])
def test_the_same_run_before_its_first_checkpoint_was_complete(config, tiny_config, workdir, steps):
    run_folder.write_config(config, workdir)
    write_metrics(workdir, *steps)
    run_folder.check_begins(config, workdir)
    later = {"training.checkpoint_every": 1, "training.num_steps": 99}  # what may change
    run_folder.check_begins(tiny_config("bd3lm,block_size=4", **later), workdir)


def test_a_run_that_lost_its_checkpoints(config, workdir):
    run_folder.write_config(config, workdir)
    write_metrics(workdir, 0, 8, 9)
    with pytest.raises(UserError, match=r"has metrics up to step 9 but no checkpoint to continue from; allowed: put"):
        run_folder.check_begins(config, workdir)


def test_another_run(config, tiny_config, workdir):
    run_folder.write_config(config, workdir)
    with pytest.raises(UserError, match=r"config.seed is 1, but .*config.json has 0; .* choose another --workdir"):
        run_folder.check_begins(tiny_config("bd3lm,block_size=4", seed=1), workdir)


def test_settings_that_did_not_exist_yet_have_their_defaults(config, tiny_config, workdir):
    run_folder.write_config(config, workdir)
    settings = json.loads((workdir / "config.json").read_text())
    del settings["noise"]["ignore_bos"], settings["training"]["checkpoint_every"], settings["search"]
    (workdir / "config.json").write_text(json.dumps(settings))
    write_metrics(workdir, 0, 8, 9)
    run_folder.check_begins(config, workdir)
    with pytest.raises(UserError, match=r"config.noise.ignore_bos is False, but .*config.json has True"):
        run_folder.check_continues(tiny_config("bd3lm,block_size=4", **{"noise.ignore_bos": False}), workdir)
    read = run_folder.read_config(workdir)
    assert read.search.widths == base.get_config().search.widths
    assert read.optimizer == config.optimizer


@pytest.mark.parametrize("name", ["metrics.jsonl", "manifest.json", "tokenizer"])
def test_files_of_something_else(config, workdir, name):
    (workdir / name).write_text("")
    with pytest.raises(UserError, match=rf"{workdir} has {name} but no config.json, so it is not the folder of a run"):
        run_folder.check_begins(config, workdir)


def test_settings_or_metrics_that_cannot_be_read(config, workdir):
    run_folder.write_config(config, workdir)
    (workdir / "metrics.jsonl").write_text('{"loss": 1.0}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl: the record .* has no step"):
        run_folder.check_begins(config, workdir)
    (workdir / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json, the settings of the run, cannot be read"):
        run_folder.check_begins(config, workdir)


@pytest.mark.parametrize("content", ["{}", "[1]", '{"hidden_dim": 8}', "{", '"text"', "[" * 10_000])
def test_a_config_json_that_is_no_runs(config, workdir, tmp_path, content, files_in):
    (workdir / "config.json").write_text(content)
    before = files_in(tmp_path)
    with pytest.raises(UserError, match=r"config.json(, the settings of the run, cannot be read|.*choose another)"):
        run_folder.check_begins(config, workdir)
    assert files_in(tmp_path) == before
