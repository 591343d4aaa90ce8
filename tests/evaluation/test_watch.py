"""`bd3 eval --watch`: every checkpoint once; `--suite`: the paper's table."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from etils import epath

from bd3_jax.checkpoints import orbax, run_folder
from bd3_jax.config_dict import from_config_dict
from bd3_jax.configs import base
from bd3_jax.data.prepare import prepare
from bd3_jax.errors import UserError
from bd3_jax.evaluation import watch as module
from bd3_jax.evaluation.perplexity import evaluate
from bd3_jax.evaluation.result import Result
from bd3_jax.evaluation.suite import evaluate_suite, table
from bd3_jax.evaluation.watch import watch
from bd3_jax.metrics import append_metrics, read_metrics
from bd3_jax.training.loop import train


@pytest.fixture(scope="module")
def run(tiny_config, tmp_path_factory):
    """Four steps, with checkpoints at 2 and 4."""
    workdir = epath.Path(tmp_path_factory.mktemp("run") / "toy")
    config = tiny_config("ar", **{"training.num_steps": 4, "training.checkpoint_every": 2, "training.eval_every": 2})
    train(config, workdir)
    return config, workdir


def test_every_checkpoint_is_evaluated_once(run, monkeypatch):
    config, workdir = run
    before = (workdir / "metrics.jsonl").read_bytes()
    watch(config, workdir)
    found = read_metrics(workdir, "evaluations.jsonl")
    assert [record["step"] for record in found] == [2, 4]
    assert found[0]["eval/nll"] > found[1]["eval/nll"]
    assert found[1]["eval/nll"] == evaluate(config, workdir)["eval/nll"]
    assert (workdir / "metrics.jsonl").read_bytes() == before
    watch(config, workdir)
    assert read_metrics(workdir, "evaluations.jsonl") == [*found, found[1]]


def test_it_waits_for_the_last_and_passes_over_what_was_removed(run, monkeypatch):
    config, workdir = run
    (workdir / "evaluations.jsonl").unlink(missing_ok=True)
    append_metrics(workdir, {"step": 4, "eval/split": "another"}, "evaluations.jsonl")  # which does not count
    there, waits = [[], [3, 4], [4], [4], [4]], []
    monkeypatch.setattr(module, "orbax", SimpleNamespace(steps=lambda _: there.pop(0)))
    monkeypatch.setattr(module.time, "sleep", waits.append)
    watch(config, workdir, seconds=7)
    assert waits == [7]
    assert [record["step"] for record in read_metrics(workdir, "evaluations.jsonl")] == [4, 4]


@pytest.fixture
def evaluated(monkeypatch):
    """Steps that are evaluated, without doing it."""
    steps = []
    monkeypatch.setattr(module, "evaluate", lambda config, workdir, step: steps.append(step))
    return steps


RECORD = {
    "step": 4, "eval/split": "validation", "eval/estimator": "low_variance", "eval/weights": "ema", "eval/seed": 0,
    "eval/insert_special": False, "eval/insert_eos": True, "eval/batch_size": 8,
}  # fmt: skip


@pytest.fixture
def waiting(tiny_config, tmp_path):
    """A run of 4 steps with checkpoints 2 and 4, as far as is looked at; records go to its evaluations."""
    config = tiny_config("bd3lm,block_size=4", **{"training.num_steps": 4, "eval.estimator": "low_variance"})
    workdir = epath.Path(tmp_path)
    run_folder.write_config(config, workdir)
    for step in (2, 4):
        orbax.save_params(workdir, step, {"x": np.zeros(2)}, 0.0, 1.0)
    return config, workdir


def test_what_waits_is_evaluated_though_the_last_is_done(waiting, evaluated):
    config, workdir = waiting
    append_metrics(workdir, RECORD, "evaluations.jsonl")
    watch(config, workdir)
    assert evaluated == [2]


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": "raw"},
        {"seed": 1},
        {"batch_size": 2},
        {"estimator": "monte_carlo"},
        {"without_special": "always"},
        {"split": "train"},
    ],
)
def test_an_evaluation_with_other_settings_does_not_count(waiting, evaluated, changes):
    config, workdir = waiting
    for step in (2, 4):
        append_metrics(workdir, RECORD | {"step": step}, "evaluations.jsonl")
    watch(config, workdir)
    assert evaluated == []
    watch(dataclasses.replace(config, eval=dataclasses.replace(config.eval, **changes)), workdir)
    assert evaluated == [2, 4]


@pytest.mark.parametrize(("first", "then"), [(4, 6), (8, 6)])
def test_a_run_that_is_continued_meanwhile(waiting, monkeypatch, first, then):
    """With more steps than when it began, or with fewer, which it has done."""
    config, workdir = waiting
    steps = lambda number: dataclasses.replace(config, training=dataclasses.replace(config.training, num_steps=number))
    run_folder.write_config(steps(first), workdir)
    evaluated = []

    def evaluate(config, workdir, step):
        evaluated.append(step)
        if step == 4:
            run_folder.write_config(steps(then), workdir)
            orbax.save_params(workdir, 6, {"x": np.zeros(2)}, 0.0, 1.0)

    monkeypatch.setattr(module, "evaluate", evaluate)
    watch(config, workdir, seconds=0)
    assert evaluated == [2, 4, 6]


def test_several_processes_are_refused(waiting, evaluated, monkeypatch):
    monkeypatch.setattr(module.jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="--watch is given to 2 processes; allowed: one, or bd3 eval --step=N in all"):
        watch(*waiting)
    assert evaluated == []


def test_a_suite_of_what_is_prepared(run, tmp_path, capsys):
    """LAMBADA in its own format, with the run's tokenizer."""
    config, workdir = run
    (tmp_path / "lambada_test.jsonl").write_text(
        "".join(json.dumps({"text": f"a red cat {n}"}) + "\n" for n in range(40))
    )
    data = dataclasses.replace(
        config.data, corpus="lambada", source=str(tmp_path / "lambada_test.jsonl"),
        directory=str(tmp_path / "zeroshot" / "lambada"), insert_special=True, insert_eos=False,
    )  # fmt: skip
    prepare(data, config.model.length)
    capsys.readouterr()
    results = evaluate_suite(config, workdir, epath.Path(tmp_path / "zeroshot"))
    assert list(results) == ["lambada"]
    direct = evaluate(
        dataclasses.replace(config, data=data, eval=dataclasses.replace(config.eval, split="test")), workdir
    )
    assert results["lambada"].nll == direct["eval/nll"]
    out = capsys.readouterr().out
    assert f"{direct['eval/perplexity']:.2f}" in out
    assert "not prepared: ptb, wikitext103, lm1b, ag_news, pubmed_papers, arxiv_papers" in out
    record = read_metrics(workdir, "evaluations.jsonl")[-2]
    assert record["zeroshot/lambada/nll"] == direct["eval/nll"]
    for name in ("estimator", "weights", "seed", "batch_size"):
        assert record[f"zeroshot/{name}"] == direct[f"eval/{name}"]
    early = evaluate_suite(config, workdir, epath.Path(tmp_path / "zeroshot"), step=2)["lambada"]
    assert read_metrics(workdir, "evaluations.jsonl")[-1]["step"] == 2
    assert early.nll != results["lambada"].nll
    with pytest.raises(UserError, match=r"--suite_data is .*none'; allowed: a folder with one of ptb, wikitext103"):
        evaluate_suite(config, workdir, epath.Path(tmp_path / "none"))


def test_no_model_is_asked_for_bos_by_the_suite(tiny_config, tmp_path):
    """Nor one that in training was."""
    workdir = epath.Path(tmp_path / "run")
    config = tiny_config("mdlm", **{"noise.ignore_bos": False, "training.num_steps": 1})
    train(config, workdir)
    (tmp_path / "lambada_test.jsonl").write_text('{"text": "a red cat"}\n' * 40)
    data = dataclasses.replace(
        config.data, corpus="lambada", source=str(tmp_path / "lambada_test.jsonl"),
        tokenizer=str(workdir / "tokenizer"),
        directory=str(tmp_path / "zeroshot" / "lambada"), insert_special=True, insert_eos=False,
    )  # fmt: skip
    prepare(data, config.model.length)
    (result,) = evaluate_suite(config, workdir, epath.Path(tmp_path / "zeroshot")).values()
    assert not result.first_counted
    assert result.tokens == result.sequences * (config.model.length - 1)


@pytest.mark.parametrize(
    ("string", "model", "published"),
    [
        ("bd3lm,block_size=4", "bd3lm, B = 4", "96.81"),
        ("ar", "ar", "81.07"),
        ("mdlm", "mdlm", "90.96"),
        ("sedd", "sedd", "96.33"),
        ("bd3lm,block_size=8", "bd3lm, B = 8", None),
    ],
)
def test_what_is_published_of_the_model_is_a_table_of_its_own(string, model, published):
    result = Result(4.0, 0.01, 100, 10, 0, "low_variance", "validation", True, False, False, "ema", 0, 8)
    text = table(from_config_dict(base.get_config(string)), "mine", {"ptb": result})
    if published is None:
        assert text.endswith(f"\npublished (table 5): none for {model}")
        return
    ours, theirs = (part.splitlines() for part in text.split("\n\n"))
    assert [line.split()[-7] for line in ours[1:3]] == ["54.60", "0.55"]
    assert not any("published" in line for line in ours)
    assert theirs[0] == "published (table 5): a model trained on OpenWebText"
    assert theirs[1] == ours[0]
    assert theirs[2].startswith(model)
    assert theirs[2].split()[-7] == published
