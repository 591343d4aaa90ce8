"""Folders that programs write into: whether they can, alone, and one line where the disk fails them."""

import contextlib
import fcntl
import os
from collections.abc import Iterator

from etils import epath

from bd3_jax.errors import UserError

_LOCK = ".lock"


def require_writable(folder: epath.Path, setting: str) -> None:
    """Raises UserError, naming `setting`, where a local `folder` is a file or cannot be written; makes nothing."""
    if "://" in str(folder):
        return
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{setting} is {str(folder)!r}, but {there} is a file; allowed: a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{setting} is {str(folder)!r}, but {there} cannot be written; allowed: a folder that can")


@contextlib.contextmanager
def alone(folder: epath.Path, setting: str) -> Iterator[None]:
    """Keeps other processes that ask for the same out of `folder`, which is made; it goes again if nothing is in it.

    Only of local folders: elsewhere there are no locks.

    Raises:
      UserError: naming `setting`, where it cannot be written or is taken.
    """
    require_writable(folder, setting)
    if "://" in str(folder):
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / _LOCK
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _take(lock, path, f"{setting} is {str(folder)!r}, where another process is at work; allowed: another, or later")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            for empty in made:
                if empty.exists() and not any(empty.iterdir()):
                    empty.rmdir()
    finally:
        os.close(lock)


def _take(lock: int, path: epath.Path, refusal: str) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(refusal) from None
    except OSError:  # a file system without locks
        return
    # Whoever held it may have removed the file since it was opened.
    if not path.exists() or not os.path.samestat(os.fstat(lock), os.stat(path)):
        raise UserError(refusal)


@contextlib.contextmanager
def writing(path: epath.Path) -> Iterator[None]:
    """What the system refuses while `path` is written, as a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
