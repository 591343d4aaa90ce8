"""The entry points: what reaches train, evaluate and sample, and one line with status 2 for every mistake.

The programs behind them are replaced by recorders here; the end-to-end test runs them.
"""

import json
import os
import re
import subprocess
import sys
import types

import pytest

import bd3_jax.convert  # noqa: F401  its errors are real: imported before what it needs is replaced
from bd3_jax import cli, command_line
from bd3_jax import main as entry
from bd3_jax.config import Config
from bd3_jax.config_dict import from_config_dict
from bd3_jax.configs import quickstart
from bd3_jax.errors import UserError

CONFIG = "--config=configs/quickstart.py:bd3lm,block_size=8"
PROGRAMS = {
    "train": ("bd3_jax.training.loop", "train"),
    "eval": ("bd3_jax.evaluation.perplexity", "evaluate"),
    "sample": ("bd3_jax.sampling.run", "sample"),
    "prepare": ("bd3_jax.data.prepare", "prepare"),
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Runs in an empty folder, where the installed configs must be found."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def calls(monkeypatch):
    """Replaces the programs by recorders of (name, arguments)."""
    made = []
    for name, (module, function) in PROGRAMS.items():
        stand_in = types.ModuleType(module)
        setattr(stand_in, function, lambda *args, name=name, **named: made.append((name, *args, *named.items())))
        monkeypatch.setitem(sys.modules, module, stand_in)
    return made


@pytest.mark.parametrize("mode", entry.MODES)
def test_main_and_bd3_are_the_same_entry(mode, calls):
    flags = [CONFIG, "--workdir=run", "--config.model.width=64", "--config.sampling.prompt=a = b"]
    assert entry.main([*flags, f"--mode={mode}"]) == 0
    assert cli.main([mode, *flags]) == 0
    assert calls[0] == calls[1]
    name, config, workdir, *named = calls[0]
    assert (name, str(workdir)) == (mode, "run")
    assert named == {"train": [], "eval": [None], "sample": [None, ("trace", False), ("watch", False)]}[mode]
    assert isinstance(config, Config)
    assert (config.model.width, config.sampling.prompt, config.block_size) == (64, "a = b", 8)


def test_flags_of_sample_alone(calls, capsys):
    assert cli.main(["sample", CONFIG, "--workdir=run", "--trace", "--watch"]) == 0
    assert calls[0][3:] == (None, ("trace", True), ("watch", True))
    assert cli.main(["train", CONFIG, "--workdir=run", "--trace"]) == 2
    assert capsys.readouterr().err == "error: --trace is for sample, not for train\n"


@pytest.mark.parametrize("mode", ["eval", "sample"])
@pytest.mark.parametrize("step", [0, 12])
def test_the_step_of_a_checkpoint(mode, step, calls):
    assert cli.main([mode, CONFIG, "--workdir=run", f"--step={step}"]) == 0
    assert calls[0][3] == step


def test_prepare_needs_no_workdir(calls):
    assert cli.main(["prepare", CONFIG, "--config.data.directory=rows"]) == 0
    assert cli.main(["prepare", CONFIG, "--workers=3", "--strict"]) == 0
    name, data, *arguments = calls[0]
    assert (name, data.directory, *arguments) == ("prepare", "rows", 128, 1, False, None)
    assert calls[1][2:] == (128, 3, True, None)


@pytest.mark.parametrize("form", [["--config", "configs/quickstart.py"], ["-config=configs/quickstart.py"]])
@pytest.mark.parametrize("override", [["--config.model.dropout", "0.25"], ["-config.model.dropout=0.25"]])
def test_flags_take_every_form_that_absl_knows(form, override, calls):
    assert cli.main(["train", *override, *form, "--workdir", "run"]) == 0
    assert calls[0][1].model.dropout == 0.25


@pytest.mark.parametrize("flag", ["--noconfig.data.insert_eos", "--config.data.insert_eos=false"])
def test_booleans_can_be_switched_off(flag, calls):
    assert cli.main(["train", CONFIG, "--workdir=run", flag]) == 0
    assert calls[0][1].data.insert_eos is False


def test_a_file_of_the_current_directory_goes_before_the_installed_one(tmp_path, calls):
    (tmp_path / "configs").mkdir()
    source = "from bd3_jax.configs import base\n\ndef get_config(string='ar'):\n    return base.get_config(string)\n"
    (tmp_path / "configs" / "quickstart.py").write_text(source)
    assert cli.main(["train", "--config=configs/quickstart.py", "--workdir=run"]) == 0
    assert calls[0][1].objective == "ar"


def test_without_config_the_settings_of_the_run_are_used(tmp_path, calls):
    recorded = from_config_dict(quickstart.get_config("mdlm"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(recorded.to_dict()))
    assert cli.main(["sample", "--workdir=run"]) == 0
    assert cli.main(["sample", "--workdir=run", "--config.sampling.nucleus=0.5"]) == 0
    assert calls[0][1] == recorded
    assert calls[1][1].sampling.nucleus == 0.5
    assert calls[1][1].model == recorded.model


def test_settings_that_a_run_does_not_know_yet_have_their_defaults(tmp_path, calls):
    settings = from_config_dict(quickstart.get_config()).to_dict()
    settings["sampling"]["nucleus"] = 0.5
    for name in ("top_k", "infill"):
        del settings["sampling"][name]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    assert cli.main(["sample", "--workdir=run"]) == 0
    found = calls[0][1].sampling
    assert (found.nucleus, found.top_k, found.infill) == (0.5, 0, "")


def test_flags_can_come_from_a_file(tmp_path, calls):
    (tmp_path / "flags").write_text(f"{CONFIG}\n--workdir=run\n")
    assert cli.main(["train", "--flagfile=flags"]) == 0
    assert str(calls[0][2]) == "run"


MISTAKES = [
    # arguments of bd3, what the line must name
    (["trian"], "unknown verb 'trian'; did you mean train?"),
    (["zzz"], "unknown verb 'zzz'; allowed: prepare, inspect, train, eval, sample"),
    (["inspect"], "expected one folder, as in bd3 inspect data/quickstart; found none"),
    (["report", "a", "b"], "expected one folder, as in bd3 report runs/quickstart; found a b"),
    (["inspect", "nowhere"], "nothing is prepared in 'nowhere'"),
    (["train"], "--config is missing, as in --config=configs/quickstart.py:bd3lm,block_size=8 (no --workdir"),
    (["train", "--workdir=run"], "run/config.json does not exist"),
    (["prepare"], "--config is missing"),
    (["train", CONFIG], "--workdir is missing"),
    (["train", CONFIG, "--workdir="], "--workdir is missing"),
    (["train", CONFIG, "--workdir"], "Missing value for flag --workdir"),
    (["train", "--config"], "--config needs a value"),
    (["train", "--config=", "--workdir=run"], "--config needs a value"),
    (["train", CONFIG, "--wrkdir=run"], "Unknown command line flag 'wrkdir'. Did you mean: workdir"),
    (["train", CONFIG, "--workdir=run", "--mode=eval"], "Unknown command line flag 'mode'"),
    (["train", CONFIG, "--workdir=run", "extra"], "unexpected argument 'extra'"),
    (["train", CONFIG, "--flagfile=nowhere"], "nowhere"),
    (["train", "--config=nowhere.py", "--workdir=run"], "--config=nowhere.py: no such Python file; installed are conf"),
    (["train", "--config=configs/nowhere.py", "--workdir=run"], "configs/quickstart.py"),
    (["train", "--config=..", "--workdir=run"], "--config=..: no such Python file"),
    (["train", "--config=syntax.py", "--workdir=run"], "--config=syntax.py fails: SyntaxError"),
    (["train", "--config=module.py", "--workdir=run"], "--config=module.py fails in line 1: ModuleNotFoundError"),
    (["train", "--config=empty.py", "--workdir=run"], "has no attribute 'get_config'"),
    (["train", "--config=number.py", "--workdir=run"], "get_config must return an ml_collections.ConfigDict, found 3"),
    (["train", "--config=number.py:ar", "--workdir=run"], "--config=number.py:ar fails: TypeError"),
    (["train", "--config=configs/quickstart.py:gpt", "--workdir=run"], "config string 'gpt': found 'gpt', allowed: ar"),
    (
        ["train", "--config=configs/quickstart.py:bd3lm,block_size=7", "--workdir=run"],
        "config.block_size is 7; allowed",
    ),
    (["train", CONFIG, "--workdir=run", "--watch"], "--watch is for eval and sample, not for train"),
    (["sample", CONFIG, "--workdir=run", "--suite=zeroshot"], "--suite is for eval, not for sample"),
    (["eval", CONFIG, "--workdir=run", "--suite=zeroshot", "--watch"], "--watch and --suite are both given"),
    (["eval", CONFIG, "--workdir=run", "--step=0", "--watch"], "--watch and --step are both given; allowed: one of"),
    (["train", CONFIG, "--workdir=run", "--step=0"], "--step is for eval and sample, not for train"),
    (["eval", CONFIG, "--workdir=run", "--step=-1"], "flag --step=-1"),
    (
        ["train", CONFIG, "--workdir=run", "--num_processes=2"],
        "--coordinator is missing; allowed: --coordinator, --num",
    ),
    (["replay", CONFIG], "--workdir is missing; allowed: the folder of the run"),
    (["train", "--workdir=broken"], "broken/config.json, the settings of the run, cannot be read"),
    (["train", "--workdir=list"], "list/config.json does not hold the settings of a run; choose another --workdir"),
    (["eval", "--workdir=exported"], "exported/config.json does not hold the settings of a run"),
    *(
        (argv, "is 'foo://x', which cannot be reached: a URL of unknown kind; allowed: a local path, or gs://")
        for argv in (
            ["train", CONFIG, "--workdir=foo://x"],
            ["eval", "--workdir=foo://x"],
            ["inspect", "foo://x"],
            ["report", "foo://x"],
            ["judge", "foo://x"],
            ["convert", "foo://x", "out"],
            ["replay", CONFIG, "--workdir=foo://x"],
        )
    ),
    (["train", CONFIG, "--workdir=run", f"--config.model.width={10**30}"], f"config.model.width is {10**30}; allowed"),
    (["sample", CONFIG, "--workdir=run", "--config.sampling.prompt=\udcff"], "allowed: text in UTF-8"),
    (["train", CONFIG, "--workdir=run", "--config.model.widht=3"], "did you mean config.model.width?"),
    (["train", CONFIG, "--workdir=run", "--config.modle.width=3"], "did you mean config.model?"),
    (["train", CONFIG, "--workdir=run", "--config.model=3"], "config.model is a group; set one of its fields: att"),
    (["train", CONFIG, "--workdir=run", "--config.seed.x=3"], "config.seed is a value, not a group"),
    (["train", CONFIG, "--workdir=run", "--config.model.width=abc"], "flag --config.model.width=abc: invalid literal"),
    (["train", CONFIG, "--workdir=run", "--config.model.width=0.5"], "flag --config.model.width=0.5: invalid literal"),
    (["train", CONFIG, "--workdir=run", "--config.model.dropout=x"], "flag --config.model.dropout=x"),
    (["train", CONFIG, "--workdir=run", "--config.data.insert_eos=maybe"], "flag --config.data.insert_eos=maybe"),
    (["train", CONFIG, "--workdir=run", "--noconfig.model.width"], "noconfig.model.width"),
    (["train", CONFIG, "--workdir=run", "--config.model.width"], "Missing value for flag --config.model.width"),
    (
        ["sample", CONFIG, "--workdir=run", "--config.sampling.sampler=analytic"],
        "config.sampling.sampler is 'analytic'",
    ),
]


@pytest.mark.parametrize(("argv", "message"), MISTAKES, ids=[" ".join(case[0]) for case in MISTAKES])
def test_a_mistake_is_one_line_and_status_2(argv, message, calls, tmp_path, capsys):
    files = {
        "syntax.py": "def get_config(:\n",
        "module.py": "import no_such_module\n",
        "empty.py": "",
        "number.py": "def get_config():\n    return 3\n",
        "broken/config.json": "{",
        "list/config.json": "[]",
        "exported/config.json": '{"model_type": "bd3lm", "hidden_dim": 8}',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert out == ""
    assert calls == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("mode", "message"),
    [([], "--mode is missing; allowed: one of train, eval, sample"), (["--mode=fly"], "<train|eval|sample>")],
)
def test_main_needs_a_mode(mode, message, calls, capsys):
    assert entry.main([CONFIG, "--workdir=run", *mode]) == 2
    assert message in capsys.readouterr().err
    assert calls == []


def test_a_mistake_found_by_a_program_is_one_line_too(capsys):
    def fail():
        raise UserError("no rows in\n  data/x")

    assert command_line.exit_status(fail) == 2
    assert capsys.readouterr().err == "error: no rows in data/x\n"


@pytest.mark.parametrize(("name", "problem"), [("folder", "Is a directory"), ("nowhere", "No such file or directory")])
def test_what_the_system_refuses_is_one_line_too(tmp_path, capsys, name, problem):
    (tmp_path / "folder").mkdir()
    assert command_line.exit_status(lambda: (tmp_path / name).read_text()) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / name}: {problem}\n"


def test_ctrl_c_is_one_line_and_status_130(capsys):
    def stop():
        raise KeyboardInterrupt

    assert command_line.exit_status(stop) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("argv", [["train", "--help"], ["--help"]])
def test_a_reader_that_leaves_ends_it_silently(argv, monkeypatch, capsys):
    """As in `bd3 train --help | head -1`."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert cli.main(argv) == 141
        print("more", flush=True)  # is lost, as what the interpreter still writes at its end
    assert capsys.readouterr().err == ""


def test_a_broken_pipe_that_is_not_the_output(monkeypatch):
    def fail():
        raise BrokenPipeError

    read, write = os.pipe()
    with os.fdopen(read), os.fdopen(write, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(BrokenPipeError):
            command_line.exit_status(fail)


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        command_line.exit_status(lambda: 1 / 0)


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_bd3_lists_its_verbs(argv, capsys):
    assert cli.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, verb in cli.VERBS.items():
        assert any(line.split(None, 1) == [name, verb.summary] for line in lines)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([verb, "--help"])
    assert end.value.code == 0
    assert re.search(rf"^ *bd3 [a-z|]*\b{verb}\b", capsys.readouterr().out, re.MULTILINE)


def test_the_harness_is_an_extra(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "bd3_jax.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert cli.main(["lm_eval", "--model", "bd3"]) == 2
    assert capsys.readouterr().err == "error: bd3 lm_eval needs lm_eval: pip install 'bd3_jax[eval]'\n"


def test_the_installed_programs_report_mistakes_without_a_traceback():
    """The console script and the module, as processes of their own, away from the checkout."""
    script = os.path.join(os.path.dirname(sys.executable), "bd3")
    for command in ([script, "train"], [sys.executable, "-m", "bd3_jax.main", "--mode=train"]):
        found = subprocess.run([*command, CONFIG, "--workdir=run", "--config.model.widht=3"], capture_output=True)
        assert found.returncode == 2
        assert found.stderr == b"error: unknown setting config.model.widht; did you mean config.model.width?\n"
        assert found.stdout == b""


def test_reading_the_command_line_imports_no_jax():
    code = "import sys; from bd3_jax import cli; cli.main(['train', '--workdir=run']); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
