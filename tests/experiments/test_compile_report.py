"""The report on absent chips, on models that take seconds and a machine that needs no compiler of its own."""

import json

import pytest

from bd3_jax.configs import lm1b, owt, text8
from bd3_jax.errors import UserError

TINY = {
    "model.length": 16, "model.width": 16, "model.num_layers": 2, "model.num_heads": 2, "model.cond_dim": 8,
    "training.batch_size": 4,
}  # fmt: skip


@pytest.fixture
def asked(script, tmp_path, monkeypatch):
    """Runs the report without compiling; the cells that it would compile, with their settings."""
    report = script("compile_report")

    def run(*argv):
        found = []
        monkeypatch.setattr(report, "describe", lambda config, cell: found.append((config, cell)) or FITS)
        report.main([*argv, f"--out={tmp_path}"])
        return found

    return run


FITS = {"failure": "not tried"}


def test_every_recipe_is_compiled_for_the_machine_that_it_names(script, asked, monkeypatch):
    monkeypatch.setattr(script("compile_report"), "fits", lambda figures: True)
    found = asked()
    assert len(found) == 21
    for module, corpus in ((owt, "openwebtext"), (lm1b, "lm1b"), (text8, "text8")):
        own = [(config, cell) for config, cell in found if config.data.corpus == corpus]
        assert {(cell.topology, cell.mode) for _, cell in own} == {(module.TOPOLOGY, "train")}
        models = [(config.objective, config.block_size if config.objective == "bd3lm" else 0) for config, _ in own]
        rows = ("bd3lm", own[0][0].model.length)  # as the pre-training of a BD3-LM
        assert models == [("ar", 0), ("mdlm", 0), ("sedd", 0), ("bd3lm", 4), ("bd3lm", 8), ("bd3lm", 16), rows]
        assert {config.training.batch_size for config, _ in own} == {512}


def test_a_recipe_that_fails_is_exit_status_1(asked):
    with pytest.raises(SystemExit) as ended:
        asked("--configs=configs/text8.py:ar")
    assert ended.value.code == 1


def test_the_grid_has_4_rows_a_chip(asked):
    found = asked("--chips=v5e", "--config.model.remat=block")
    assert len(found) == 2 * 2 * 6
    batches = {cell.topology: config.training.batch_size for config, cell in found}
    assert batches == {"v5e:2x2": 16, "v5e:16x16": 1024}
    assert {config.model.width for config, _ in found} == {768, 1024}
    assert {config.model.remat for config, _ in found} == {"block"}


def test_the_grid_of_another_program(asked):
    found = asked("--chips=v5e", "--mode=sample")
    assert {(cell.mode, config.sampling.batch_size) for config, cell in found} == {("sample", 16), ("sample", 1024)}


def test_the_yardstick_is_a_setting_that_is_allowed(script, asked, monkeypatch):
    monkeypatch.setattr(script("compile_report"), "fits", lambda figures: True)
    ((config, _),) = asked("--baseline", "--configs=configs/owt.py:ar,size=tiny", "--topology=cpu:2")
    assert config.model.attention == "dense"
    assert config.model.max_logits > 4 * 1024 * 50258


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--chips=v9"], "--chips has v9; allowed: v5e"),
        (["--chips=v5e", "--topology=cpu:2"], "without --configs and --topology"),
        (["--configs=configs/quickstart.py:ar"], "configs/quickstart.py, which names no machine"),
        (["--config.model.depth=3"], "unknown setting config.model.depth"),
    ],
)
def test_mistakes(asked, argv, said):
    with pytest.raises(UserError, match=said):
        asked(*argv)


@pytest.mark.slow
def test_it_goes_on_where_it_was(script, tmp_path, monkeypatch):
    flags = [f"--config.{name}={value}" for name, value in TINY.items()]
    argv = ["--configs=configs/owt.py:ar", "--topology=cpu:2", f"--out={tmp_path}", *flags]
    report = script("compile_report")
    report.main(argv)
    (cell,) = json.loads((tmp_path / "results.json").read_text())
    assert cell["figures"]["report"]["fits"]
    assert cell["figures"]["report"]["rows"] == 4
    assert "| configs/owt.py:ar | train | cpu:2 | 2 |" in (tmp_path / "table.md").read_text()
    monkeypatch.setattr(report, "compile_for", None)  # what is in the file is not compiled again
    report.main(argv)
