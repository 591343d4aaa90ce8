"""Numbers that the authors' implementation stored, computed again: `bd3 parity FOLDER...` (tests/golden/README.md).

A folder holds a checkpoint and `io.npz`. Sizes, vocabulary and block size come from the checkpoint; which arrays must
be there follows from the objective.
"""

import dataclasses
import re
import zipfile
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from bd3_jax.diffusion.schedules import SCHEDULES, get_schedule
from bd3_jax.errors import UserError
from bd3_jax.evaluation import recompute
from bd3_jax.folders import reachable
from bd3_jax.pretrained import load_pretrained
from bd3_jax.training.state import update_ema

ATOL, RTOL = 2e-5, 1e-5
IMPOSSIBLE = -1e5
"""Values below stand for -inf."""

ARRAYS, SCHEDULES_FILE, EMA_FILE = "io.npz", "schedules.npz", "ema.npz"
_STORED_SCHEDULES = ("loglinear", "square", "square_root", "log", "cosine")
_SCHEDULE_TOLERANCE = 5e-4  # of (1 + |stored|): their float32 values carry cancellation


@dataclasses.dataclass(frozen=True)
class Check:
    """One array.

    Attributes:
      file: the folder or file it is stored in.
      array: its name.
      shape: as stored.
      absolute: the largest |ours - stored|, entries that stand for -inf left out; nan: not compared.
      relative: the largest |ours - stored| / |stored| where stored is not 0.
      problem: why it fails; empty: it passes.
    """

    file: str
    array: str
    shape: tuple[int, ...]
    absolute: float
    relative: float
    problem: str


def parity(paths: Iterable[str], atol: float = ATOL, rtol: float = RTOL) -> list[Check]:
    """Compares everything in the folders, and in schedules.npz and ema.npz beside them.

    Args:
      paths: folders with a checkpoint and io.npz, folders of such folders, or those two files.
      atol: |ours - stored| <= atol + rtol |stored| passes.
      rtol: see `atol`.

    Raises:
      UserError: a path is none of these. What is wrong within a folder is a failed check.
    """
    folders, files = _find([reachable(path, "the folder") for path in paths])
    checks: list[Check] = []
    with jax.default_matmul_precision("highest"):
        for folder in folders:
            checks += check_folder(folder, atol, rtol)
        for file in files:
            checks += check_schedules(file) if file.name == SCHEDULES_FILE else check_ema(file, atol, rtol)
    return checks


def _find(paths: Sequence[epath.Path]) -> tuple[list[epath.Path], list[epath.Path]]:
    folders: list[epath.Path] = []
    files: list[epath.Path] = []
    for path in paths:
        if path.name in (SCHEDULES_FILE, EMA_FILE) and path.is_file():
            files.append(path)
        elif not path.is_dir():
            raise UserError(
                f"{path} is no folder with a checkpoint and {ARRAYS}, and no {SCHEDULES_FILE} or {EMA_FILE}"
            )
        elif any((path / name).exists() for name in (ARRAYS, "config.json")):
            folders.append(path)
        else:
            inner = sorted(child for child in path.iterdir() if (child / ARRAYS).exists())
            if not inner:
                raise UserError(f"{path} holds no {ARRAYS}, and no folder in it does")
            folders += inner
    parents = [folder.resolve().parent for folder in folders]
    beside = [parent / name for parent in parents for name in (SCHEDULES_FILE, EMA_FILE)]
    files += [file for file in beside if file.exists()]
    return folders, list({str(file.resolve()): file for file in files}.values())


def check_folder(folder: epath.Path, atol: float, rtol: float) -> list[Check]:
    """Every array of one folder. Where its name ends in _loss_scale, the loss is that of scaled_loglinear."""
    name = folder.resolve().name
    try:
        stored = _load(folder / ARRAYS)
        loaded = load_pretrained(str(folder))
    except UserError as error:
        return [Check(name, "checkpoint", (), np.nan, np.nan, str(error))]
    lm = loaded.model
    model = dataclasses.replace(lm.network.model, dtype="float32")
    lm = dataclasses.replace(lm, network=dataclasses.replace(lm.network, model=model))
    if name.endswith("_loss_scale"):
        noise = dataclasses.replace(lm.noise, schedule="scaled_loglinear", ignore_bos=False)
        lm = dataclasses.replace(lm, noise=noise)

    checks = []
    for names, compute in recompute.groups(lm, loaded.params, stored):
        problem, ours = "", {}
        try:
            ours = dict(compute())
        except recompute.Unusable as error:
            problem = str(error)
        for array in names:
            if array not in stored or problem:
                found = stored[array].shape if array in stored else ()
                checks.append(Check(name, array, found, np.nan, np.nan, problem or f"{array} is missing"))
            else:
                checks.append(compare(name, array, ours[array], stored[array], atol, rtol))
    return checks


def check_schedules(file: epath.Path) -> list[Check]:
    """p(t) and s(t) of the five schedules of the paper, and of any other that is stored."""
    try:
        stored = _load(file)
    except UserError as error:
        return [Check(file.name, "t", (), np.nan, np.nan, str(error))]
    required = [f"{name}_{part}" for name in _STORED_SCHEDULES for part in ("move_chance", "loss_scale")]
    checks = []
    for array in dict.fromkeys([*required, *(name for name in stored if name != "t")]):
        match = re.fullmatch(r"(.+)_(move_chance|loss_scale)", array)
        if "t" not in stored or array not in stored:
            problem = f"{array if 't' in stored else 't'} is missing"
        elif not match or match[1] not in SCHEDULES:
            problem = f"{array} is no schedule of this package"
        else:
            ours = getattr(get_schedule(match[1]), match[2])(jnp.asarray(stored["t"], jnp.float32))
            checks.append(compare(file.name, array, ours, stored[array], _SCHEDULE_TOLERANCE, _SCHEDULE_TOLERANCE))
            continue
        checks.append(Check(file.name, array, (), np.nan, np.nan, problem))
    return checks


def check_ema(file: epath.Path, atol: float, rtol: float) -> list[Check]:
    """The average of a scalar after each of its updates, from 0."""
    try:
        stored = _load(file)
    except UserError as error:
        return [Check(file.name, "shadow", (), np.nan, np.nan, str(error))]
    if missing := [name for name in ("params", "shadow", "decay") if name not in stored]:
        return [Check(file.name, "shadow", (), np.nan, np.nan, f"{missing[0]} is missing")]
    values = stored["params"]
    if values.ndim != 1 or stored["decay"].size != 1:
        return [Check(file.name, "shadow", (), np.nan, np.nan, "params is no list of values, or decay no scalar")]
    decay, average, ours = float(stored["decay"].reshape(())), {"x": jnp.float32(0)}, []
    for step, value in enumerate(values, start=1):
        average = update_ema(average, {"x": jnp.float32(value)}, jnp.int32(step), decay)
        ours.append(float(average["x"]))
    return [compare(file.name, "shadow", ours, stored["shadow"], atol, rtol)]


def _load(file: epath.Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz that are numbers; nothing is unpickled."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} is no readable .npz of numbers: {error}") from None
    if wrong := [name for name, array in arrays.items() if array.dtype.kind not in "fiub"]:
        raise UserError(f"{file} holds arrays that are no numbers: {', '.join(wrong)}")
    return arrays


def compare(file: str, array: str, ours: Any, stored: np.ndarray, atol: float, rtol: float) -> Check:
    """|ours - stored| <= atol + rtol |stored|, and -inf on both sides (tests/golden/README.md)."""
    ours, stored = np.asarray(ours, np.float64), stored.astype(np.float64)
    if ours.shape != stored.shape:
        return Check(file, array, stored.shape, np.nan, np.nan, f"ours has shape {list(ours.shape)}")
    if np.isnan(stored).any() or np.isnan(ours).any():
        return Check(
            file, array, stored.shape, np.nan, np.nan, f"{'stored' if np.isnan(stored).any() else 'ours'} has nan"
        )
    impossible = stored < IMPOSSIBLE
    differ = int(((ours < IMPOSSIBLE) != impossible).sum())
    ours, stored_finite = ours[~impossible], stored[~impossible]
    difference = np.abs(ours - stored_finite)
    absolute = float(difference.max(initial=0))
    nonzero = stored_finite != 0
    relative = float((difference[nonzero] / np.abs(stored_finite[nonzero])).max(initial=0))
    outside = int((~(difference <= atol + rtol * np.abs(stored_finite))).sum())
    problem = f"{differ} entries are -inf on one side alone" if differ else ""
    if not problem and outside:
        problem = f"{outside} of {stored.size} entries differ"
    return Check(file, array, stored.shape, absolute, relative, problem)


def table(checks: Sequence[Check]) -> str:
    """A line for every array, and the verdict."""
    lines = [f"{'folder':<20} {'array':<28} {'shape':<14} {'max abs':>9} {'max rel':>9}  verdict"]
    for check in checks:
        shape = "x".join(map(str, check.shape)) or "-"
        verdict = f"FAIL: {check.problem}" if check.problem else "pass"
        lines.append(
            f"{check.file:<20} {check.array:<28} {shape:<14} {check.absolute:>9.2e} {check.relative:>9.2e}  {verdict}"
        )
    failed = sum(bool(check.problem) for check in checks)
    lines.append(f"{len(checks)} arrays, {failed} failed" if failed else f"{len(checks)} arrays, all agree")
    return "\n".join(lines)
