"""`bd3_jax.load_pretrained` of a workdir of ours: texts, replays, other objectives and block sizes."""

import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from bd3_jax import pretrained
from bd3_jax.config import NoiseConfig
from bd3_jax.data.tokenizers import load_tokenizer
from bd3_jax.errors import UserError
from bd3_jax.evaluation import conditional, interval_search
from bd3_jax.evaluation.perplexity import likelihood_program
from bd3_jax.pretrained import load_pretrained
from tests.workdirs import write_workdir


@pytest.fixture(scope="module")
def run(tiny_config, tmp_path_factory) -> Path:
    """A workdir of ours with random weights, averaged ones apart from the raw ones."""
    workdir = epath.Path(tmp_path_factory.mktemp("run"))
    write_workdir(tiny_config("bd3lm,block_size=4"), workdir, 7, low=0.3, high=0.8)
    return Path(workdir)


def test_a_workdir(run):
    loaded = load_pretrained(str(run))
    assert (loaded.objective, loaded.block_size, loaded.step) == ("bd3lm", 4, 7)
    assert loaded.interval == (0.3, 0.8)
    assert loaded.tokenizer.fingerprint == load_tokenizer("bytes").fingerprint
    assert loaded.mask_id == 257
    raw = load_pretrained(str(run), weights="raw")
    for refused in (lambda: raw.sample(weights="ema"), lambda: raw.perplexity("a text", split="test")):
        with pytest.raises(UserError, match="is of no use here; allowed: "):
            refused()
    np.testing.assert_array_equal(raw.params["embedding"], 2 * np.asarray(loaded.params["embedding"]))
    assert [model.perplexity("red cat blue dog").weights for model in (loaded, raw)] == ["ema", "raw"]


def test_texts(run):
    loaded = load_pretrained(str(run))
    (drawn,) = loaded.sample("red", num_samples=1)
    assert drawn.text.startswith("red")
    result = loaded.perplexity(["red cat blue dog", "blue cat"])  # 16 + 1 + 8 + 1 = 26 tokens: a row of 16
    assert (result.sequences, result.tokens, result.insert_eos) == (1, 15, True)
    assert loaded.perplexity("red cat").tokens == 7  # a row of 8, two blocks
    with pytest.raises(UserError, match="the texts have 3 tokens with EOS; allowed: 4 or more"):
        loaded.perplexity("re")
    rows = np.array([[*b"red cat blue dog"]])
    assert loaded.perplexity(rows).nll == loaded.perplexity("red cat blue dog").nll


def test_a_replay_ends_with_the_samples(run):
    """As a page, and in a notebook: within a frame, whose text is the page's."""
    loaded = load_pretrained(str(run))
    replay = loaded.replay("red", num_samples=2, seed=3)
    texts = [sample.text for sample in loaded.sample("red", num_samples=2, seed=3)]
    assert ["".join(piece.text for piece in trace.pieces) for trace in replay.traces] == texts
    assert [piece.call for piece in replay.traces[0].pieces[:3]] == [0, 0, 0]
    page = re.fullmatch(r'<iframe srcdoc="([^"]*)" style="[^"]*"></iframe>', replay._repr_html_())[1]
    assert html.unescape(page) == replay.html
    assert replay.html.startswith("<!doctype html>")
    gaps = loaded.replay(infill="red [MASK*2]!", num_samples=1).traces[0].pieces
    assert [piece.text for piece in gaps if not piece.call] == [*"red!"]


def test_a_workdir_under_another_objective(run):
    loaded = load_pretrained(str(run), objective="mdlm")
    assert (loaded.objective, loaded.block_size, loaded.config.sampling.max_length) == ("mdlm", 16, 16)
    assert loaded.config.data == load_pretrained(str(run)).config.data


def test_a_workdir_whose_training_another_objective_could_not_do(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    content = json.loads((run / "config.json").read_text())
    content["training"]["noise_copies"], content["search"]["enabled"] = 2, True
    content["eval"]["batch_size"], content["sampling"]["nucleus"] = 5, 0.5
    (tmp_path / "run" / "config.json").write_text(json.dumps(content))
    for objective in ("mdlm", "sedd"):
        assert load_pretrained(str(tmp_path / "run"), objective=objective).objective == objective
    # Of the same objective, all else is as the run has it.
    config = load_pretrained(str(tmp_path / "run"), block_size=16).config
    assert (config.eval.batch_size, config.sampling.nucleus) == (5, 0.5)


def test_a_workdir_whose_interval_another_block_size_could_not_have(run, tmp_path):
    """A block of one token is masked whole or not at all: never between 0.3 and 0.8 of it."""
    shutil.copytree(run, tmp_path / "run")
    content = json.loads((run / "config.json").read_text())
    content["noise"] |= {"low": 0.3, "high": 0.8, "resample": True, "ignore_bos": False}
    (tmp_path / "run" / "config.json").write_text(json.dumps(content))
    loaded = load_pretrained(str(tmp_path / "run"), block_size=1)
    assert loaded.config.noise == NoiseConfig("loglinear", 0.3, 0.8, resample=False, ignore_bos=False)
    assert loaded.perplexity("red cat").estimator == "exact"
    assert load_pretrained(str(tmp_path / "run"), block_size=2).config.noise.resample  # half of it may be


def test_rows_in_which_nothing_counts(run):
    with pytest.raises(UserError, match="rows have 1 token, whose loss does not count; allowed: 2 or more"):
        load_pretrained(str(run), objective="mdlm").perplexity([[5]])


@pytest.mark.parametrize(
    "programs", [pretrained._apply, likelihood_program, conditional._program, interval_search._compiled]
)
def test_programs_of_models_that_are_gone_are_dropped(programs):
    assert programs.cache_parameters()["maxsize"] == 16


def test_a_damaged_workdir_is_named(run, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"config.json, the settings of the run, cannot be read"):
        load_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    with pytest.raises(UserError, match="has no checkpoint"):
        load_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text((run / "config.json").read_text().replace('"width"', '"widths"'))
    with pytest.raises(UserError, match=r"config.json: unknown setting config.model.widths; did you mean"):
        load_pretrained(str(tmp_path))
