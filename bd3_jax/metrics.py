"""Records of a run: files of JSON lines, one object each. `metrics.jsonl` is training's, with its validations.

What `bd3 eval` finds is in a file of its own: training, which may go on at the same time, drops records when it repeats
steps, and in a bucket writes the file anew.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

from etils import epath

from bd3_jax.errors import UserError
from bd3_jax.folders import append_text, write_text, writing

FILE_NAME = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"

Record = dict[str, Any]


def read_records(path: epath.Path) -> list[Record]:
    """The objects of a file; none where there is no file. A last line cut short by a kill is left out.

    Raises:
      UserError: naming another line that is no object.
    """
    if not path.exists():
        return []
    records = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"{path}, line {number}: not JSON ({error})") from error
    if wrong := [record for record in records if not isinstance(record, dict)]:
        raise UserError(f"{path}: found {wrong[0]!r}; allowed: an object a line")
    return records


def read_metrics(workdir: epath.Path, file_name: str = FILE_NAME) -> list[Record]:
    """The records of a run, or of another such file, each with its `step`; none where there is no file.

    Raises:
      UserError: the file is damaged, or no run's.
    """
    path = workdir / file_name
    records = read_records(path)
    for record in records:
        if type(record.get("step")) is not int:
            raise UserError(f"{path}: the record {json.dumps(record)[:80]} has no step, so it is not one of a run")
    return records


def read_all(workdir: epath.Path) -> list[Record]:
    """The records of training and those of `bd3 eval`, by step.

    Raises:
      UserError: a file is damaged, or no run's.
    """
    records = [*read_metrics(workdir), *read_metrics(workdir, EVALUATIONS)]
    return sorted(records, key=lambda record: record["step"])


def weights_of(record: Record) -> str:
    """Which weights an evaluation is of: ema or raw. Records of before do not say it, and count as ema."""
    return record.get("eval/weights", "ema")


def kind(record: Record) -> tuple[Any, ...]:
    """What an evaluation is of, and how it was done: figures are compared where this is the same."""
    names = ("split", "sequences", "insert_special", "insert_eos", "estimator")
    return weights_of(record), *(record.get(f"eval/{name}") for name in names)


def to_json(record: Record) -> str:
    """A line of such a file. A number that is not finite becomes null, at any depth, since JSON has none."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: finite(each) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [finite(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(record), allow_nan=False)


def append_metrics(workdir: epath.Path, record: Record, file_name: str = FILE_NAME) -> None:
    """Appends a line to the metrics of a run, or to another such file.

    A number that is not finite becomes null. What a kill left of a last line goes first.

    Raises:
      UserError: the file cannot be written, or is no run's.
    """
    path = workdir / file_name
    with writing(path):
        if not _is_whole(path):
            _write(path, read_metrics(workdir, file_name))
        append_text(path, to_json(record) + "\n")


def drop_after(workdir: epath.Path, step: int, measured: int | None = None) -> None:
    """Drops the records of later steps, and what a kill left of a last line.

    Where `measured` is given, so go those of validations and samples after that step.

    Raises:
      UserError: the file cannot be written, or is no run's.
    """
    path = workdir / FILE_NAME
    if path.exists():
        last = step if measured is None else measured
        kept = [
            record
            for record in read_metrics(workdir)
            if record["step"] <= (last if "eval/split" in record or "samples/text" in record else step)
        ]
        _write(path, kept)


def _is_whole(path: epath.Path) -> bool:
    """Whether the last line has its end."""
    if not path.exists():
        return True
    with path.open("rb") as file:
        if file.seek(0, 2) == 0:
            return True
        file.seek(-1, 2)
        return file.read(1) == b"\n"


def _write(path: epath.Path, records: Sequence[Record]) -> None:
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))
