"""Training that starts from other weights: the paper's recipe in miniature, and what does not fit."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from bd3_jax.checkpoints.orbax import restore_params
from bd3_jax.checkpoints.source import open_source
from bd3_jax.convert import convert
from bd3_jax.data.tokenizers import load_tokenizer
from bd3_jax.errors import UserError
from bd3_jax.training.initial import open_initial
from bd3_jax.training.loop import train
from tests.reference import config_json, random_tensors, write_checkpoint


def validation_losses(workdir: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["eval/nll"] for record in records if "eval/nll" in record}


@pytest.fixture(scope="module")
def pretrained_run(tiny_config, tmp_path_factory) -> Path:
    """MDLM, which is a BD3-LM at B = L."""
    workdir = tmp_path_factory.mktemp("runs") / "mdlm"
    steps = dict.fromkeys(("training.num_steps", "training.eval_every", "training.checkpoint_every"), 150)
    train(tiny_config("mdlm", **steps, **{"optimizer.learning_rate": 1e-2}), epath.Path(workdir))
    return workdir


@pytest.mark.slow
def test_the_recipe_of_the_paper(pretrained_run, tiny_config, tmp_path):
    """Pre-training at B = L, then B = 4: better than B = 4 from scratch after the same steps, at every validation."""
    settings = {"training.num_steps": 20, "training.eval_every": 10, "training.checkpoint_every": 20}
    settings["optimizer.learning_rate"] = 3e-3
    losses = {}
    for name, init_from in (("scratch", ""), ("tuned", str(pretrained_run))):
        train(tiny_config("bd3lm,block_size=4", init_from=init_from, **settings), epath.Path(tmp_path / name))
        losses[name] = validation_losses(tmp_path / name)
    assert losses["tuned"].keys() == losses["scratch"].keys() == {0, 10, 20}
    assert all(losses["tuned"][step] < losses["scratch"][step] - 0.05 for step in losses["tuned"])


@pytest.mark.parametrize("published", [pytest.param(False, marks=pytest.mark.slow), True])
def test_averaged_weights_become_the_weights_and_all_else_is_new(published, pretrained_run, tiny_config, tmp_path):
    """The state after one update of rate 0: the source's average in both places, counts and interval as if anew."""
    source = pretrained_run
    if published:
        source = convert(str(pretrained_run), str(tmp_path / "published"))
    settings = {"training.num_steps": 1, "training.checkpoint_every": 1, "noise.low": 0.3, "noise.high": 0.8}
    config = tiny_config("bd3lm,block_size=8", init_from=str(source), **settings)
    run = epath.Path(tmp_path / "run")
    train(config, run)
    wanted = open_source(str(pretrained_run)).load(None, None)
    for weights in ("ema", "raw"):
        jax.tree.map(np.testing.assert_array_equal, restore_params(config, run, weights)[0], wanted)
    began = open_source(str(run))
    assert (began.step, began.architecture.low, began.architecture.high) == (1, 0.3, 0.8)


def test_resuming_goes_before_init_from(pretrained_run, tiny_config, tmp_path, monkeypatch):
    settings = {"training.num_steps": 2, "training.checkpoint_every": 1, "init_from": str(pretrained_run)}
    train(tiny_config("bd3lm,block_size=4", **settings), epath.Path(tmp_path))
    monkeypatch.setattr("bd3_jax.training.loop.open_initial", lambda *args: pytest.fail("opened again"))
    train(tiny_config("bd3lm,block_size=4", **settings | {"training.num_steps": 3}), epath.Path(tmp_path))
    assert open_source(str(tmp_path)).step == 3


@pytest.mark.parametrize(
    ("string", "settings", "message"),
    [
        ("mdlm", {"model.width": 64}, "config.model.width is 64, but config.init_from = {source} has 32"),
        ("mdlm", {"model.num_layers": 3}, "config.model.num_layers is 3, but .* has 2"),
        ("mdlm", {"model.num_heads": 4}, "config.model.num_heads is 4, but .* has 2"),
        ("bd3lm,block_size=4", {"model.cond_dim": 16}, "config.model.cond_dim is 16, but .* has 8"),
        ("ar", {}, r"config.objective is ar, but .* is of objective mdlm and has the adaLN tensors sigma_map"),
    ],
)
def test_what_does_not_fit_is_named(string, settings, message, pretrained_run, tiny_config):
    config = tiny_config(string, init_from=str(pretrained_run), **settings)
    with pytest.raises(UserError, match=message.format(source=pretrained_run)):
        open_initial(config, load_tokenizer("bytes"))


def test_an_ar_model_lacks_adaln(tiny_config, tmp_path):
    described = config_json("ar", 1, 258, 16, 32, 2, 2, 8)
    write_checkpoint(tmp_path, described, random_tensors(described, np.random.default_rng(0)))
    config = tiny_config("mdlm", init_from=str(tmp_path))
    with pytest.raises(UserError, match=r"config.objective is mdlm, .* is of objective ar and lacks the adaLN tensors"):
        open_initial(config, load_tokenizer("bytes"))


def test_another_vocabulary_is_refused(pretrained_run, tiny_config):
    config = tiny_config("mdlm", init_from=str(pretrained_run))
    with pytest.raises(UserError, match=r"config.data.tokenizer gives V = 35 .* has 258"):
        open_initial(config, load_tokenizer("text8"))


def test_a_tokenizer_with_other_meanings_is_refused(pretrained_run, tiny_config):
    config = tiny_config("mdlm", init_from=str(pretrained_run))
    ours = load_tokenizer("bytes")

    class Other:
        ids, fingerprint = dataclasses.replace(ours.ids), "another"

    with pytest.raises(UserError, match=r"config.data.tokenizer is not the one of config.init_from"):
        open_initial(config, Other())


def test_damaged_weights_leave_nothing_behind(pretrained_run, tiny_config, tmp_path):
    described = config_json("mdlm", 16, 258, 16, 32, 2, 2, 8)
    tensors = random_tensors(described, np.random.default_rng(0))
    del tensors["backbone.blocks.1.norm1.weight"]
    write_checkpoint(tmp_path / "source", described, tensors)
    config = tiny_config("mdlm", init_from=str(tmp_path / "source"))
    with pytest.raises(UserError, match=r"missing blocks.1.norm1.weight"):
        train(config, epath.Path(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
