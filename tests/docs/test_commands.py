"""Commands in README and docs/: their settings exist, their flags are known, their files are there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from bd3_jax import cli, command_line

ROOT = Path(__file__).parents[2]


def commands():
    """The words of each command in a bash block, without comments; one may go over several lines."""
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for _, block in re.findall(r"^( *)```bash\n(.*?)^\1```", path.read_text(), re.MULTILINE | re.DOTALL):
            text = ""
            for line in re.sub(r"(^|\s)#.*", "", block).replace("\\\n", " ").splitlines(keepends=True):
                text += line
                if text.count("'") % 2 == 0 and (words := shlex.split(text)):
                    yield words
                    text = ""


BD3 = [words[1:] for words in commands() if words[0] == "bd3"]
LAUNCH = [words[1:] for words in commands() if words[0] == "python" and words[1].startswith("experiments/launch/")]


def test_they_are_found():
    assert len(BD3) > 20
    assert len(LAUNCH) > 2


@pytest.mark.parametrize("words", BD3, ids=" ".join)
def test_settings_exist(words, monkeypatch):
    """Those of a workdir that is not there are those of a run of the quickstart."""
    monkeypatch.chdir(ROOT)
    verb, *rest = words
    assert verb in cli.VERBS
    settings = [word for word in rest if re.match(r"--config[.=]", word)]
    if not any(word.startswith("--config=") for word in settings):
        settings.insert(0, "--config=configs/quickstart.py:bd3lm,block_size=8")
    command_line.parse(settings, flags.FlagValues(), usage="")
    usage = cli.entry.__doc__ if verb in cli.entry.MODES else cli.VERBS[verb].run.__doc__
    for word in rest:
        if word.startswith("--") and word not in settings:
            assert word.partition("=")[0] in usage


@pytest.mark.parametrize("words", LAUNCH, ids=" ".join)
def test_launch_scripts_take_them(words):
    command = [sys.executable, *words, "--dry-run"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout
