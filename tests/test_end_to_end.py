"""The main program in all its modes, for every objective, on a small corpus: what a user types, and what is left."""

import json
import math
from pathlib import Path

import pytest

from bd3_jax import cli, main

WORDS = ["the", "city", "of", "river", "is", "in", "north", "a", "south", "town", "and", "was", "king", "had", "born"]
SMALL = [
    "--config.model.length=16", "--config.model.width=32", "--config.model.num_layers=2", "--config.model.num_heads=2",
    "--config.model.cond_dim=8", "--config.data.vocab_size=300", "--config.data.corpus=files",
    "--config.training.batch_size=8", "--config.training.log_every=10", "--config.training.eval_every=30",
    "--config.training.checkpoint_every=30", "--config.training.num_steps=60", "--config.optimizer.warmup_steps=5",
    "--config.optimizer.learning_rate=0.01", "--config.eval.batch_size=8", "--config.eval.num_batches=0",
    "--config.sampling.max_length=16", "--config.sampling.num_samples=3", "--config.sampling.batch_size=2",
    "--config.sampling.num_steps=8",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a prepared corpus of short documents."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text").mkdir()
    for n in range(300):
        words = [WORDS[(n * (i + 3) + i * i) % len(WORDS)] for i in range(8 + n % 20)]
        (folder / "text" / f"{n}.txt").write_text(" ".join(words) + f" {n}.")
    flags = [f"--config.data.source={folder / 'text'}", f"--config.data.directory={folder / 'rows'}"]
    assert cli.main(["prepare", "--config=configs/quickstart.py:ar", *SMALL, *flags]) == 0
    return flags


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("objective", "sampler"),
    [
        ("ar", "autoregressive"),
        pytest.param("mdlm", "first_hitting", marks=pytest.mark.slow),
        pytest.param("mdlm", "ancestral", marks=pytest.mark.slow),
        ("sedd", "analytic"),
        ("bd3lm,block_size=4", "first_hitting"),
        pytest.param("bd3lm,block_size=1", "ancestral", marks=pytest.mark.slow),
    ],
)
def test_train_eval_sample(
    objective: str, sampler: str, data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = tmp_path / "run"
    flags = [f"--config=configs/quickstart.py:{objective}", f"--workdir={workdir}", *SMALL, *data]
    prompt = ["--config.sampling.prompt=the city of", f"--config.sampling.sampler={sampler}"]

    assert main.main(["--mode=train", *flags]) == 0
    validations = [record for record in records(workdir / "metrics.jsonl") if "eval/nll" in record]
    assert [record["step"] for record in validations] == [0, 30, 60]
    # Untrained, the zero-initialised output layer makes all 300 tokens equally likely.
    if objective != "sedd":
        error = 4 * validations[0]["eval/standard_error"]
        assert math.isclose(validations[0]["eval/nll"], math.log(300), rel_tol=1e-5, abs_tol=error)
    assert validations[-1]["eval/nll"] < validations[0]["eval/nll"] - 0.5

    assert main.main(["--mode=eval", *flags]) == 0
    assert math.isclose(
        records(workdir / "evaluations.jsonl")[-1]["eval/nll"], validations[-1]["eval/nll"], rel_tol=1e-5
    )

    assert main.main(["--mode=sample", *flags, *prompt]) == 0
    samples, printed = records(workdir / "samples.jsonl"), capsys.readouterr().out
    assert len(samples) == 3
    for sample in samples:
        assert sample["text"] in printed
        assert sample["text"].startswith("the city of")
        assert len(sample["tokens"]) == 16
        assert max(sample["tokens"]) < 300  # no mask is left
        assert 0 < sample["nfe"] <= 16
        assert sample["length"] <= 15
        assert sample["entropy"] <= math.log(16)

    # A finished run does not train again, and its folder alone is enough to sample from.
    metrics = (workdir / "metrics.jsonl").read_text()
    assert main.main(["--mode=train", *flags]) == 0
    assert (workdir / "metrics.jsonl").read_text() == metrics
    assert "finished" in capsys.readouterr().out
    assert cli.main(["sample", f"--workdir={workdir}"]) == 0
    assert len(records(workdir / "samples.jsonl")) == 3

    assert cli.main(["report", str(workdir)]) == 0
    page = (workdir / "report.html").read_text()
    assert "Validation perplexity" in page
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize(
    ("mode", "flag", "names"),
    [
        ("train", "--config.data.directory=nowhere", ["nowhere", "bd3 prepare"]),
        ("train", "--config.model.length=32", ["32", "16"]),
        ("train", "--config.data.vocab_size=310", ["310", "300"]),
        ("train", "--config.mesh.fsdp=3", ["config.mesh"]),
        ("eval", "--config.seed=1", ["checkpoint"]),
        ("sample", "--config.seed=1", ["checkpoint"]),
    ],
)
def test_user_errors_leave_nothing_behind(
    mode: str, flag: str, names: list[str], data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = tmp_path / "run"
    status = main.main(
        [f"--mode={mode}", "--config=configs/quickstart.py:mdlm", f"--workdir={workdir}", *SMALL, *data, flag]
    )
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2
    assert error.startswith("error: ")
    assert all(name in error for name in names), error
    assert not workdir.exists()
