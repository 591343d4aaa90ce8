"""Checkpoints that cannot be read: passed over where they are damaged, and not where reading may work another time."""

import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
from etils import epath

from bd3_jax.errors import UserError

T = TypeVar("T")

# What the system says of a file that is damaged or lost; whatever else it says may pass, as too many open files do.
_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)
# What TensorStore's errors begin with where a bucket does not answer or refuses; no system's number stands in them.
_PASSING = (
    "UNAVAILABLE", "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "PERMISSION_DENIED",
    "UNAUTHENTICATED",
)  # fmt: skip


def newest_readable(folder: epath.Path, newest_first: Sequence[int], read: Callable[[int], T]) -> tuple[int, T]:
    """The first step that `read` can read, and what it returns; a warning for those before.

    Where several hosts read, what is damaged must be so for all of them, as on a shared file system.

    Raises:
      UserError: none can be read, or `read` raised one, or the system would not read, which says nothing of what is in
        a checkpoint.
    """
    failures: list[str] = []
    for step in newest_first:
        try:
            found = step, read(step)
        except (UserError, MemoryError, jax.errors.JaxRuntimeError):  # the last from a device's lack of memory
            raise
        except Exception as error:  # Orbax and TensorStore raise nearly everything for a damaged file
            require_damage(error, folder, step)
            failures.append(f"{step} ({type(error).__name__}: {' '.join(str(error).split())[:120]})")
            continue
        for failure in failures:
            print(f"warning: {folder}: passed over the damaged checkpoint {failure}; used {step}", file=sys.stderr)
        return found
    raise UserError(f"{folder}: no checkpoint can be read, of {'; '.join(failures)}; put a good copy there")


def require_damage(error: Exception, folder: epath.Path, step: int) -> None:
    """Raises UserError where `error`, met in reading that checkpoint, may pass."""
    if reason := _passing(error):
        raise UserError(
            f"{folder}: checkpoint {step} cannot be read now: {reason}; nothing was changed; allowed: the same command "
            f"when that is mended, or without {step}/"
        ) from error


def _passing(error: BaseException | None) -> str | None:
    """What the system or a bucket said, where `error` comes of that and not of damage; else None."""
    while error is not None:
        number, text = system_number(error), " ".join(str(error).split())[:200]
        if number is not None:
            return None if number in _DAMAGE else os.strerror(number)
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            return text or type(error).__name__
        # Buckets are read through libraries that have errors of their own.
        library = type(error).__module__.partition(".")[0]
        if text.startswith(_PASSING) or library in ("gcsfs", "aiohttp", "google"):
            return f"{type(error).__name__}: {text}"
        error = error.__cause__ or error.__context__
    return None


def system_number(error: BaseException) -> int | None:
    """The system's number of an error; TensorStore's are ValueErrors that end in it."""
    if isinstance(error, OSError):
        return error.errno
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return int(number[1]) if number else None
