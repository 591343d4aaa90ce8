"""Workers, malformed records, full disks, and interruptions of a preparation."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from etils import epath

from bd3_jax.data import prepare as module
from bd3_jax.data.prepare import prepare
from bd3_jax.data.rows import RowWriter
from bd3_jax.data.tasks import run_here
from bd3_jax.errors import UserError


def test_any_number_of_workers_writes_the_same(three_files, tmp_path, files_in):
    several = dataclasses.replace(three_files, directory=str(tmp_path / "several"))
    assert prepare(three_files, 16) == prepare(several, 16, workers=2)
    assert files_in(tmp_path / "rows") == files_in(tmp_path / "several")
    with pytest.raises(UserError, match="--workers is 0; allowed: 1 or more"):
        prepare(three_files, 16, workers=0)


def test_a_killed_worker_is_told(three_files, tmp_path):
    """The kernel kills a process that takes too much memory; here the process does it itself."""
    program = f"""
import os, signal
from bd3_jax.config import DataConfig
from bd3_jax.data import corpora, rows
from bd3_jax.data.prepare import prepare
from bd3_jax.data.rows import RowWriter
corpora.SHARD_BYTES = 1
if __name__ == "__main__":
    prepare({three_files!r}, 16, workers=2)
else:
    rows.RowWriter.close = lambda writer: os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "program.py").write_text(program)
    result = subprocess.run([sys.executable, str(tmp_path / "program.py")], capture_output=True, text=True, check=False)
    assert "UserError: a worker process was killed, perhaps for want of memory" in result.stderr.splitlines()[-1]
    assert prepare(three_files, 16).splits["train"].rows > 0


@pytest.mark.parametrize("workers", [1, 2])
def test_malformed_records_are_counted_or_fatal(three_files, tmp_path, capsys, workers):
    path = tmp_path / "corpus" / "1.jsonl"
    path.write_text(path.read_text() + '\n{"text": \n{"text": 3}\n')
    with pytest.raises(UserError, match=r"1\.jsonl, line 68: Expecting value"):
        prepare(three_files, 16, workers=workers, strict=True)
    for leftover in tmp_path.glob("rows.*"):
        epath.Path(leftover).rmtree()
    manifest = prepare(three_files, 16, workers=workers)
    assert manifest.malformed == 2
    assert sum(split.documents for split in manifest.splits.values()) == 200
    assert "2 malformed records left out, the first: " in capsys.readouterr().out
    assert manifest.first_malformed.startswith(f"{path}, line 68: Expecting value")


def test_strict_does_not_pass_where_records_were_left_out_before(three_files, tmp_path, monkeypatch):
    """In a shard that is finished, in all of them before they were moved into place, and in what is prepared."""
    path = tmp_path / "corpus" / "0.jsonl"
    path.write_text(path.read_text() + '\n{"text": 3}\n')
    data = dataclasses.replace(three_files, tokenizer="bytes")
    message = r"0\.jsonl, line 68: no text in the field 'text'"
    for function in ("_finish", "_remove_leftovers"):
        with monkeypatch.context() as patch:
            patch.setattr(module, function, lambda *args: (_ for _ in ()).throw(Killed))
            with pytest.raises(Killed):
                prepare(data, 16)
        with pytest.raises(UserError, match=message):
            prepare(data, 16, strict=True)
    assert prepare(data, 16).malformed == 1
    with pytest.raises(UserError, match=rf"rows was prepared without 1 malformed records, the first: .*{message}"):
        prepare(data, 16, strict=True)


def test_a_full_disk_is_told_and_what_is_done_is_kept(three_files, tmp_path):
    """A limit on the size of files stands for the disk: the second shard is too large for it."""
    (tmp_path / "corpus" / "1.jsonl").write_text(json.dumps({"text": " ".join(map(str, range(200_000)))}))
    data = dataclasses.replace(three_files, tokenizer="bytes")
    program = f"""
import resource, signal
from bd3_jax.config import DataConfig
from bd3_jax.data import corpora
from bd3_jax.data.prepare import prepare
from bd3_jax.data.rows import RowWriter
corpora.SHARD_BYTES = 1
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
prepare({data!r}, 64)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    message = result.stderr.splitlines()[-1]
    assert re.search(r"UserError: cannot write .*-00001-of-00003.*File too large.*finished shards stay", message)
    assert not (tmp_path / "rows").exists()
    assert [path.name for path in (tmp_path / "rows.unfinished").glob("shard-*")] == ["shard-00000.json"]
    assert prepare(data, 64).splits["train"].rows > 10_000


def full(path, text):
    raise UserError(f"cannot write {path}: No space left on device")


def test_an_error_in_the_first_shard_keeps_the_trained_tokenizer(three_files, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(RowWriter, "add", lambda writer, text: full(writer, text))
        with pytest.raises(UserError, match="No space left"):
            prepare(three_files, 16)
    (tokenizer,) = (tmp_path / "rows.unfinished").glob("tokenizer/*")
    content = tokenizer.read_bytes()
    monkeypatch.setattr(module, "train_bpe", lambda *args: pytest.fail("it is trained already"))
    prepare(three_files, 16)
    assert (tmp_path / "rows" / "tokenizer" / "tokenizer.json").read_bytes() == content


def test_an_error_before_there_is_a_tokenizer_leaves_nothing_behind(three_files, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"data\.tokenizer is 'gtp2'"):
        prepare(dataclasses.replace(three_files, tokenizer="gtp2"), 16)
    monkeypatch.setattr("bd3_jax.data.tokenizers.write_text", full)
    with pytest.raises(UserError, match="No space left"):
        prepare(three_files, 16)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


class Killed(BaseException):
    """Stands for the end of the process: no handler of ours catches it."""


@pytest.mark.parametrize("moment", range(1, 7))
def test_an_interrupted_preparation_goes_on_and_ends_with_the_same_bytes(
    data, tmp_path, documents, monkeypatch, moment, files_in
):
    for path in (tmp_path / "corpus").iterdir():
        path.unlink()
    for n in range(3):
        (tmp_path / "corpus" / f"{n}.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in documents[n::3]))
    monkeypatch.setattr("bd3_jax.data.corpora.SHARD_BYTES", 1)  # a shard for every file
    whole = dataclasses.replace(data, directory=str(tmp_path / "whole"))
    prepare(whole, 16)

    written = []
    close = RowWriter.close

    def close_or_die(writer):
        written.append(writer)
        if len(written) == moment:
            raise Killed
        return close(writer)

    monkeypatch.setattr(RowWriter, "close", close_or_die)
    with pytest.raises(Killed):
        prepare(data, 16)
    assert not (tmp_path / "rows").exists()
    with pytest.raises(UserError, match=r"rows\.unfinished was prepared with model\.length = 16, but it is 8"):
        prepare(data, 8)
    prepare(data, 16)
    assert len(written) == moment + 6 - 2 * ((moment - 1) // 2)  # finished shards are not written again
    assert files_in(tmp_path / "rows") == files_in(tmp_path / "whole")
    assert not (tmp_path / "rows.unfinished").exists()


@pytest.fixture
def interrupted(three_files, monkeypatch):
    """Settings of a preparation that was killed when it had finished two shards of three."""
    written = []
    close = RowWriter.close

    def close_or_die(writer):
        written.append(writer)
        if len(written) == 5:
            raise Killed
        return close(writer)

    with monkeypatch.context() as patch:
        patch.setattr(RowWriter, "close", close_or_die)
        with pytest.raises(Killed):
            prepare(three_files, 16)
    return three_files


@pytest.mark.parametrize("size", [0, 100])
@pytest.mark.parametrize("name", ["shard-00001.json", "files-train.array_record-00001-of-00003"])
def test_a_finished_shard_that_is_cut_short_is_written_again(interrupted, tmp_path, files_in, name, size):
    """As when the machine went down before all was on the disk."""
    os.truncate(tmp_path / "rows.unfinished" / name, size)
    prepare(interrupted, 16)
    prepare(dataclasses.replace(interrupted, directory=str(tmp_path / "whole")), 16)
    assert files_in(tmp_path / "rows") == files_in(tmp_path / "whole")


def test_what_killed_processes_had_begun_to_write_is_removed(interrupted, tmp_path, files_in):
    """Those of before, and a worker of this preparation."""
    folder = tmp_path / "rows.unfinished"

    def leave(name):
        for path in (
            folder / f"{name}.tmp",
            folder / "tokenizer" / f"{name}.tmp",
            folder / f"{name}-of-task.tmp" / "x",
        ):
            path.parent.mkdir(exist_ok=True)
            path.write_text("half")

    def execute(tasks, report):
        assert not list(folder.rglob("*.tmp"))
        run_here(tasks, report, workers=1)
        leave("worker")

    leave("before")
    prepare(interrupted, 16, execute=execute)
    prepare(dataclasses.replace(interrupted, directory=str(tmp_path / "whole")), 16)
    assert not list((tmp_path / "rows").rglob("*.tmp"))
    assert files_in(tmp_path / "rows") == files_in(tmp_path / "whole")


@pytest.mark.parametrize("size", [0, 20])
def test_a_damaged_marker_is_told(interrupted, tmp_path, size):
    os.truncate(tmp_path / "rows.unfinished" / "begun.json", size)
    with pytest.raises(UserError, match=r"rows\.unfinished/begun\.json is damaged; delete its folder to start over$"):
        prepare(interrupted, 16)


def test_interrupted_while_moving_into_place(data, tmp_path, monkeypatch, files_in):
    prepare(dataclasses.replace(data, directory=str(tmp_path / "whole")), 16)
    monkeypatch.setattr(type(epath.Path(tmp_path)), "unlink", lambda *_, **options: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        prepare(data, 16)
    monkeypatch.undo()
    assert not (tmp_path / "rows").exists()
    with pytest.raises(UserError, match=r"rows\.unfinished was prepared with data\.insert_eos = True, but it is False"):
        prepare(dataclasses.replace(data, insert_eos=False), 16)
    prepare(data, 16)
    assert files_in(tmp_path / "rows") == files_in(tmp_path / "whole")


def test_an_interrupted_preparation_of_other_files_is_not_continued(data, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_write_shards", lambda *args: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        prepare(data, 16)
    (tmp_path / "corpus" / "new.txt").write_text("one more")
    with pytest.raises(UserError, match="was begun from other files than files now has"):
        prepare(data, 16)
    begun = tmp_path / "rows.unfinished" / "begun.json"
    begun.write_text(json.dumps(json.loads(begun.read_text()) | {"format": 1}))
    with pytest.raises(UserError, match="was begun by an earlier version of bd3_jax; delete that folder"):
        prepare(data, 16)


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_bytes(data, tmp_path, documents, files_in):
    """SIGKILL for the whole group of processes, at moments spread over the run; then once more, undisturbed."""
    for path in (tmp_path / "corpus").iterdir():
        path.unlink()
    for n in range(12):
        lines = "\n".join(json.dumps({"text": text * 400}) for text in documents[n::12])
        (tmp_path / "corpus" / f"{n:02d}.jsonl").write_text(lines)
    program = """
import sys
from bd3_jax.config import DataConfig
from bd3_jax.data import corpora
from bd3_jax.data.prepare import prepare
from bd3_jax.data.rows import RowWriter
if __name__ == "__main__":
    corpora.SHARD_BYTES = 1
    data = eval(sys.argv[1])
    print("begins", flush=True)
    prepare(data, 64, workers=2)
"""
    (tmp_path / "program.py").write_text(program)

    def start(data):
        command = [sys.executable, str(tmp_path / "program.py"), repr(data)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert process.stdout.readline() == "begins\n"
        return process

    whole = dataclasses.replace(data, directory=str(tmp_path / "whole"))
    began = time.monotonic()
    with start(whole) as process:
        assert process.wait() == 0
    duration = time.monotonic() - began

    killed = 0
    for part in range(1, 12):
        with start(data) as process:
            try:
                process.wait(timeout=duration * part / 12)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                killed += 1
    assert killed >= 3
    with start(data) as process:
        assert process.wait() == 0
    assert files_in(tmp_path / "rows") == files_in(tmp_path / "whole")
    assert not (tmp_path / "rows.unfinished").exists()
