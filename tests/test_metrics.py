"""Records of a run: what is written, what is read back, and what an abrupt end leaves."""

import json

import pytest
from etils import epath

from bd3_jax.errors import UserError
from bd3_jax.metrics import append_metrics, drop_after, read_metrics, read_records


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path)


def steps(workdir):
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_records_are_one_object_a_line(workdir):
    append_metrics(workdir, {"step": 1, "train/loss": 2.5})
    append_metrics(workdir, {"step": 2, "train/loss": float("nan"), "eval/split": "validation"})
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    wanted = [{"step": 1, "train/loss": 2.5}, {"step": 2, "train/loss": None, "eval/split": "validation"}]
    assert [json.loads(line) for line in lines] == read_metrics(workdir) == wanted


def test_what_is_not_finite_is_null_at_any_depth(workdir):
    candidates = [[0.1, 0.6, float("nan")], (0.2, 0.7, 1.5)]
    append_metrics(workdir, {"step": 1, "search/candidates": candidates, "more": {"inner": float("inf")}})
    wanted = {"step": 1, "search/candidates": [[0.1, 0.6, None], [0.2, 0.7, 1.5]], "more": {"inner": None}}
    assert read_metrics(workdir) == [wanted]


@pytest.mark.parametrize("end", ['{"step": 1, "train/lo', '{"step": 1', "{", "\0\0"])
def test_what_a_kill_left_of_a_line_goes_before_the_next(workdir, end):
    append_metrics(workdir, {"step": 0})
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(end)
    assert [record["step"] for record in read_metrics(workdir)] == [0]
    append_metrics(workdir, {"step": 4})
    assert steps(workdir) == [0, 4]


def test_a_whole_record_without_its_line_end_stays(workdir):
    (workdir / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}')
    append_metrics(workdir, {"step": 2})
    assert steps(workdir) == [0, 1, 2]


def test_later_records_are_dropped(workdir):
    for step in range(4):
        append_metrics(workdir, {"step": step})
    drop_after(workdir, 1)
    assert steps(workdir) == [0, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"step": 0}\n{"loss": 1.5}\n', r"metrics\.jsonl: the record {.loss.: 1.5} has no step, so it is"),
        ('{"step": "last"}\n', "has no step"),
        ("[1, 2]\n", r"found \[1, 2\]; allowed: an object a line"),
        ('{"step"\n{"step": 1}\n', "line 1: not JSON"),
        ("\u00fc\n", "line 1: not JSON"),
    ],
)
def test_a_file_that_is_no_runs_stays_as_it_is(workdir, content, message):
    path = workdir / "metrics.jsonl"
    path.write_bytes(content.encode("latin-1"))
    for use in (read_metrics, lambda folder: drop_after(folder, 0)):
        with pytest.raises(UserError, match=message):
            use(workdir)
    assert path.read_bytes() == content.encode("latin-1")


def test_no_file_has_no_records(workdir):
    assert read_records(workdir / "samples.jsonl") == []
    drop_after(workdir, 3)
    assert list(workdir.iterdir()) == []


def test_a_full_disk_is_one_line(workdir, tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: No space left on device"):
        append_metrics(workdir, {"step": 0})
