"""Apache Beam writes the same bytes as the embedded preparation. Runs where the extra `beam` is installed."""

import dataclasses
import importlib.util

import pytest
from etils import epath

from bd3_jax import cli
from bd3_jax.data.beam import run_on_beam
from bd3_jax.data.prepare import prepare
from bd3_jax.errors import UserError
from tests.data.bucket import bucket, objects_in

DIRECT = "--runner=DirectRunner"
SEVERAL = f"{DIRECT} --direct_num_workers=2 --direct_running_mode=multi_processing"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Beam's own
@pytest.mark.parametrize("options", [DIRECT, SEVERAL])
@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
def test_the_same_bytes(three_files, tmp_path, files_in, options, tokenizer):
    pytest.importorskip("apache_beam")
    here = dataclasses.replace(three_files, tokenizer=tokenizer)
    there = dataclasses.replace(here, directory=str(tmp_path / "beam"))
    execute = lambda tasks, report: run_on_beam(tasks, report, options)
    assert prepare(here, 16) == prepare(there, 16, execute=execute)
    assert files_in(tmp_path / "rows") == files_in(tmp_path / "beam")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_from_a_bucket_into_a_bucket(three_files, tmp_path, files_in):
    """As far as a stand-in in the memory of this process goes."""
    pytest.importorskip("apache_beam")
    here = dataclasses.replace(three_files, tokenizer="bytes")
    prepare(here, 16)
    with bucket():
        for path in (tmp_path / "corpus").iterdir():
            (epath.Path("gs://bucket/corpus") / path.name).write_bytes(path.read_bytes())
        there = dataclasses.replace(here, source="gs://bucket/corpus", directory="gs://bucket/rows")
        prepare(there, 16, execute=lambda tasks, report: run_on_beam(tasks, report, DIRECT))
        ours, theirs = files_in(tmp_path / "rows"), objects_in("gs://bucket/rows")
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} == {"manifest.json"}  # which names the source


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_failure_is_told_and_what_is_done_is_kept(three_files, tmp_path, files_in):
    pytest.importorskip("apache_beam")
    whole = dataclasses.replace(three_files, directory=str(tmp_path / "whole"), tokenizer="bytes")
    prepare(whole, 16)
    path = tmp_path / "corpus" / "2.jsonl"
    text = path.read_text()
    path.write_text(text[:-1] + "!")  # of the same size, and no JSON
    data = dataclasses.replace(three_files, tokenizer="bytes")
    execute = lambda tasks, report: run_on_beam(tasks, report, DIRECT)
    with pytest.raises(UserError, match=r"the Beam pipeline failed: .*2\.jsonl, line 66"):
        prepare(data, 16, strict=True, execute=execute)
    path.write_text(text)
    prepare(data, 16, strict=True, execute=execute)
    assert files_in(tmp_path / "rows") == files_in(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_workers_need_absolute_paths(three_files, monkeypatch, tmp_path):
    pytest.importorskip("apache_beam")
    monkeypatch.chdir(tmp_path)
    data = dataclasses.replace(three_files, tokenizer="bytes", directory="rows")
    with pytest.raises(UserError, match=r"means another file to every worker; allowed with --beam: absolute paths"):
        prepare(data, 16, execute=lambda tasks, report: run_on_beam(tasks, report, DIRECT))


@pytest.mark.skipif(importlib.util.find_spec("apache_beam") is not None, reason="Beam is installed")
def test_without_beam(three_files, capsys):
    settings = [f"--config.data.{name}={getattr(three_files, name)}" for name in ("corpus", "source", "directory")]
    config = "--config=configs/quickstart.py:bd3lm,block_size=8"
    assert cli.main(["prepare", config, *settings, "--config.data.tokenizer=bytes", f"--beam={DIRECT}"]) == 2
    assert capsys.readouterr().err == (
        "error: --beam needs Apache Beam; install the extra with `pip install 'bd3_jax[beam]'`\n"
    )
