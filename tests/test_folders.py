"""Folders that are written: what is refused before anything happens, and that two processes keep apart."""

import os
import subprocess
import sys

import pytest
from etils import epath

from bd3_jax.errors import UserError
from bd3_jax.folders import alone, append_text, free_path, reachable, require_writable, write_text, writing
from tests.data.bucket import bucket


@pytest.fixture
def root(tmp_path):
    return epath.Path(tmp_path)


def test_a_folder_that_can_be_made_is_not_made(root):
    for folder in (root, root / "a" / "b", epath.Path("relative"), epath.Path("gs://bucket/run")):
        require_writable(folder, "--workdir")
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("name", ["file", "file/run", "file/a/b"])
def test_a_file_in_the_way(root, name):
    (root / "file").write_text("mine")
    with pytest.raises(UserError, match=rf"--workdir is '.*{name}', but .*/file is a file; allowed: a folder"):
        require_writable(root / name, "--workdir")


@pytest.mark.parametrize("name", ["", "run"])
def test_a_folder_that_cannot_be_written(root, name, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the user of a test may be root, who can everything
    with pytest.raises(UserError, match=rf"--workdir is '{root / name}', but {root} cannot be written"):
        require_writable(root / name, "--workdir")


def test_the_second_is_refused_and_the_next_is_not(root):
    lock = root / "a" / "b" / ".lock"
    with alone(lock, "taken"):
        with pytest.raises(UserError, match="taken"), alone(lock, "taken"):
            pass
        assert lock.exists()
    with alone(lock, "taken"):
        pass
    assert list(root.iterdir()) == []


def test_what_was_written_stays(root):
    with alone(root / "a" / "b" / ".lock", "taken"):
        (root / "a" / "file").write_text("mine")
    assert [path.name for path in (root / "a").iterdir()] == ["file"]


def test_text_is_appended_to_files_and_objects(root):
    with bucket():
        for path in (root / "a.txt", epath.Path("gs://bucket/a.txt")):
            append_text(path, "one\n")
            append_text(path, "two\n")
            assert path.read_text() == "one\ntwo\n"


def test_two_that_write_the_same_file_do_not_meet(root, monkeypatch):
    """The second writes all of it just before the first gives its own the name."""
    write = type(root).write_text

    def write_while_another_does(path, content, **options):
        monkeypatch.undo()
        write(path, content, **options)
        write_text(root / "file", "theirs")
        assert (root / "file").read_text() == "theirs"

    monkeypatch.setattr(type(root), "write_text", write_while_another_does)
    write_text(root / "file", "mine")
    assert (root / "file").read_text() == "mine"
    assert [path.name for path in root.iterdir()] == ["file"]


def test_what_cannot_be_written_leaves_nothing(root):
    (root / "name").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*/name: .*directory"):
        write_text(root / "name", "content")
    assert [path.name for path in root.iterdir()] == ["name"]


def test_a_killed_process_holds_nothing(root):
    code = (
        "import os, sys; from etils import epath; from bd3_jax.folders import alone\n"
        "with alone(epath.Path(sys.argv[1]), 'taken'): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(root / ".lock")]).returncode == -9
    assert (root / ".lock").exists()
    with alone(root / ".lock", "taken"):
        pass


def test_a_lock_that_cannot_be_made(root):
    (root / "file").write_text("mine")
    with pytest.raises(UserError, match=r"cannot write .*file/.lock: File exists"), alone(root / "file/.lock", ""):
        pass


def test_what_the_system_refuses_is_one_line(root):
    with pytest.raises(UserError, match=r"cannot write .*nowhere: No space left on device"), writing(root / "nowhere"):
        raise OSError(28, os.strerror(28))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "foo://bucket/rows",
            "--workdir is 'foo://bucket/rows', which cannot be reached: a URL of unknown kind; allowed:",
        ),
        ("caf\udce9", r"--workdir is 'caf\\udce9'; allowed: text in UTF-8"),
    ],
)
def test_paths_that_cannot_be_reached(path, message):
    with pytest.raises(UserError, match=message):
        reachable(path, "--workdir")


def test_free_names_are_numbered_before_the_suffix(tmp_path):
    path = epath.Path(tmp_path) / "samples.jsonl"
    for name in ("samples.jsonl", "samples-1.jsonl", "samples-2.jsonl"):
        assert free_path(path) == epath.Path(tmp_path) / name
        (tmp_path / name).write_text("")
