"""Folders that programs write into, on disks and in buckets: whether they can, alone, and one line where that fails.

An object in a bucket appears whole when all of it is there. It cannot be appended to or locked, and renaming copies it.
"""

import contextlib
import fcntl
import itertools
import os
import shutil
import uuid
from collections.abc import Iterator

import fsspec
from etils import epath

from bd3_jax.errors import UserError, require_text


def reachable(path: epath.PathLike, setting: str) -> epath.Path:
    """`path`, local or in a bucket.

    Raises:
      UserError: naming `setting`, for a name that is not UTF-8, a URL of a kind that is not known, or a bucket that
        cannot be reached, as without its library or permission.
    """
    require_text(str(path), setting)
    if in_bucket(path):
        # Else the library would list a folder once, and never see what other processes write there.
        fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
        try:
            epath.Path(path).exists()
        except Exception as error:  # each library has its own
            reason = "a URL of unknown kind" if isinstance(error, KeyError) else " ".join(str(error).split())[-300:]
            raise UserError(
                f"{setting} is {str(path)!r}, which cannot be reached: {reason}; allowed: a local path, or gs://"
            ) from None
    return epath.Path(path)


def in_bucket(path: epath.PathLike) -> bool:
    """Whether `path` is a URL, and not of this machine."""
    return "://" in str(path)


def real_path(path: epath.Path) -> epath.Path:
    """Where symbolic links lead, be it there or not; a URL stays as it is."""
    return path if in_bucket(path) else epath.Path(os.path.realpath(path))


def require_writable(folder: epath.Path, setting: str) -> None:
    """Raises UserError, naming `setting`, where a local `folder` is a file or cannot be written; makes nothing."""
    if in_bucket(folder):
        return
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{setting} is {str(folder)!r}, but {there} is a file; allowed: a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{setting} is {str(folder)!r}, but {there} cannot be written; allowed: a folder that can")


@contextlib.contextmanager
def alone(lock: epath.Path, refusal: str) -> Iterator[None]:
    """Holds the local file `lock`, so that a second process that asks for it is refused.

    File and folder are made, and go again at the end, the folder if nothing else is in it. An abrupt end frees the lock
    too. Where the path or its file system knows no locks, nobody is refused.

    Raises:
      UserError: `refusal`, where another process holds it; or it cannot be written.
    """
    if in_bucket(lock):
        yield
        return
    made = [folder for folder in lock.parents if not folder.exists()]
    with writing(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _take(held, lock, refusal)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            for folder in made:
                if folder.exists() and not any(folder.iterdir()):
                    folder.rmdir()
    finally:
        os.close(held)


def _take(held: int, lock: epath.Path, refusal: str) -> None:
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(refusal) from None
    except OSError:  # a file system without locks
        return
    # Whoever held it may have removed the file since it was opened.
    if not lock.exists() or not os.path.samestat(os.fstat(held), os.stat(lock)):
        raise UserError(refusal)


def free_path(path: epath.Path) -> epath.Path:
    """`path`, or where something has that name, the first free one of STEM-1.SUFFIX, STEM-2.SUFFIX and so on."""
    numbered = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(1))
    return next(free for free in itertools.chain([path], numbered) if not free.exists())


def write_text(path: epath.Path, content: str) -> None:
    """Writes a file, and its folder, such that it has its name only when it is complete. Raises UserError.

    Until then it is beside it as NAME.*.tmp, with a name of its own for every call, so that processes that write the
    same file do not meet. It goes if that fails; a process that is killed leaves it.
    """
    with writing(path):
        if in_bucket(path):
            path.write_text(content, encoding="utf-8")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f"{path.name}.{uuid.uuid4().hex}.tmp"
        try:
            temporary.write_text(content, encoding="utf-8")
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def append_text(path: epath.Path, content: str) -> None:
    """Appends to a file, or writes an object anew with `content` at its end. Raises UserError."""
    with writing(path):
        if in_bucket(path):
            path.write_text((path.read_text() if path.exists() else "") + content, encoding="utf-8")
            return
        with path.open("a") as file:
            file.write(content)


def move(file: epath.Path, target: epath.Path) -> None:
    """Gives a complete local file the name `target`: on the same disk, or in a bucket, into which it is copied."""
    if not in_bucket(target):
        file.replace(target)
        return
    with file.open("rb") as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, 2**20)
    file.unlink()


@contextlib.contextmanager
def writing(path: epath.Path) -> Iterator[None]:
    """What the system, or a bucket, refuses while `path` is written, as a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if in_bucket(path):  # whose library has errors of its own, some of which tell no more than an address
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        elif isinstance(error, OSError):
            reason = error.strerror or str(error)
        else:
            raise
        raise UserError(f"cannot write {path}: {reason}") from error
