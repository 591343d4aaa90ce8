"""The recorded experiments on models that take seconds, against other ways to the same figures."""

import contextlib
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from bd3_jax.checkpoints.orbax import restore_params
from bd3_jax.checkpoints.run_folder import read_config
from bd3_jax.data.pipeline import open_dataset, train_batches
from bd3_jax.evaluation.interval_search import block_variance
from bd3_jax.evaluation.perplexity import evaluate_params
from bd3_jax.language_model import LanguageModel
from bd3_jax.training.loop import train

pytestmark = pytest.mark.slow
SMALL = {
    "training.num_steps": 4, "training.eval_every": 2, "training.checkpoint_every": 4, "model.dropout": 0.0,
    "noise.resample": True, "search.enabled": True, "search.num_batches": 1, "search.batch_size": 8,
    "search.widths": (0.5,),
}  # fmt: skip


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_variances_of_a_trained_model(script, tiny_config, tmp_path, monkeypatch):
    """By the function of the search, and by evaluations."""
    config, intervals = tiny_config("bd3lm,block_size=4", **SMALL), script("interval_variance")
    monkeypatch.setattr(intervals, "BLOCK_SIZES", (4,))
    monkeypatch.setattr(intervals, "settings", lambda block_size, steps: config)
    argv = ["--steps=4", "--batches=3", f"--workdir={tmp_path / 'runs'}", f"--out={tmp_path / 'intervals'}"]
    with contextlib.suppress(SystemExit):  # which interval is best for a model of four steps is chance
        intervals.main(argv)
    (cell,) = results(tmp_path / "intervals")
    chosen = cell["figures"]["low"], cell["figures"]["high"]
    workdir = epath.Path(tmp_path / "runs" / "block-4-steps-4")
    dataset = open_dataset(config.data, config.model.length, "train")
    model = LanguageModel.from_config(config, dataset.tokenizer.ids)
    params, _ = restore_params(config, workdir, "ema")
    unread = train_batches(dataset, 8, config.seed, 4 * 8, 0, 1)
    batches = [next(unread) for _ in range(3)]
    keys = [jax.random.split(jax.random.fold_in(jax.random.key(1), index))[0] for index in range(3)]
    score = jax.jit(lambda *args: block_variance(model, params, *args))
    for name, interval in {"U[0, 1]": (1e-3, 1.0), "U[.3, .8]": (0.3, 0.8)}.items():
        bounds = [jnp.float32(bound) for bound in interval]
        wanted = [score(rows, jnp.ones(8, bool), key, *bounds) for rows, key in zip(batches, keys, strict=True)]
        found = cell["figures"]["intervals"][name]["block_variance"]
        assert found == pytest.approx(float(np.mean(wanted)), rel=1e-4)
    assert (tmp_path / "intervals" / "interval_variance.png").stat().st_size > 1000
    assert "| 4 | U[" in (tmp_path / "intervals" / "table.md").read_text()

    estimators = script("estimator_variance")
    estimators.main([f"--workdirs={workdir}", "--batches=2", "--draws=40", f"--out={tmp_path / 'estimators'}"])
    (cell,) = results(tmp_path / "estimators")
    validation = open_dataset(config.data, config.model.length, "validation")
    for name, figures in cell["figures"]["estimators"].items():
        settings = [dataclasses.replace(config.eval, estimator=name, seed=seed) for seed in range(100, 140)]
        nlls = [evaluate_params(model, params, validation, each, 2).nll for each in settings]
        noise = np.hypot(figures["standard_error"], np.std(nlls) / 40**0.5)
        assert abs(np.mean(nlls) - figures["nll"]) < 4 * noise
        # Of two batches together; 39 degrees of freedom there, 78 here.
        assert 0.4 < np.var(nlls, ddof=1) / (figures["variance"] / 2) < 2.5
    assert cell["figures"]["ratio"] > 1.5

    script("noise_copies").main([f"--workdir={workdir}", "--batches=2", f"--out={tmp_path / 'copies'}"])
    (cell,) = results(tmp_path / "copies")
    pairs, found = train_batches(dataset, 16, config.seed + 1, 0, 0, 1), []
    gradient = jax.jit(jax.grad(lambda *args: dataclasses.replace(model, noise_copies=2).training_loss(*args)[0]))
    for index in range(3):
        rows, keys = next(pairs), jax.random.split(jax.random.fold_in(jax.random.key(1), index))
        both = [gradient(params, part, key, *chosen) for part, key in zip(np.split(rows, 2), keys, strict=True)]
        pair = np.stack([np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(each)]) for each in both])
        found.append(pair.var(axis=0, ddof=1).sum())
    assert cell["figures"]["2"]["variance"] == pytest.approx(np.mean(found[1:]), rel=1e-3)
    assert cell["figures"]["2"]["variance"] < cell["figures"]["1"]["variance"]
    assert (tmp_path / "copies" / "noise_copies.png").stat().st_size > 1000


def test_attention_by_length(script, tmp_path, monkeypatch):
    lengths = script("attention_length")
    monkeypatch.setattr(lengths, "memory", lambda: 2**22)  # bytes
    lengths.main(["--lengths=64,512", "--runs=1", f"--out={tmp_path}"])
    small, _, large, _ = (cell["figures"] for cell in results(tmp_path))
    assert small["seconds"] > 0
    assert large["temporaries"] > 30 * small["temporaries"]  # of the plain form: quadratic in L
    assert "not run |" in (tmp_path / "table.md").read_text()


def test_steps_by_setting(script, tmp_path, monkeypatch):
    steps = script("step_settings")
    monkeypatch.setattr(steps, "ROWS", ({}, {"training.microbatches": 4}, {"model.remat": "full"}))
    small = {"model.length": 64, "model.width": 32, "model.num_layers": 2, "model.num_heads": 2, "model.cond_dim": 8}
    sets = [f"--set={name}={value}" for name, value in small.items()]
    steps.main([*sets, "--steps=2", "--vocab_size=20", f"--out={tmp_path}"])
    first, parts, remat = (cell["figures"] for cell in results(tmp_path))
    assert parts["temporaries"] < 0.7 * first["temporaries"]
    assert parts["flops"] == pytest.approx(first["flops"], rel=0.01)
    assert remat["flops"] > first["flops"]
    assert all(figures["step_seconds"] > 0 for figures in (first, parts, remat))


def test_three_random_kills(script, tiny_config, tmp_path, monkeypatch):
    """The third comes while the process starts, for all that is known."""
    kills, data = script("random_kills"), tiny_config("ar").data
    for name, value in {"corpus": "files", "tokenizer": "bytes", "source": data.source}.items():
        monkeypatch.setitem(kills.SETTINGS, f"data.{name}", value)
    monkeypatch.setitem(kills.SETTINGS, "data.directory", data.directory)
    kills.main(["--kills=3", f"--workdir={tmp_path / 'runs'}", f"--out={tmp_path / 'kills'}"])
    *each, end = (cell["figures"] for cell in results(tmp_path / "kills"))
    assert len(each) == 3
    assert all(kill["holds"] for kill in each)
    assert all(kill["readable"] for kill in each)
    assert end["records_equal"]
    assert end["parameters_equal"]


class ByteJudge:
    """Finds every byte as likely as any other."""

    bos, ends = "", frozenset()

    def __init__(self, name):
        pass

    def encode(self, text):
        return list(text.encode())

    def losses(self, tokens):
        return np.full(len(tokens) - 1, np.log(256))


def test_samplers(script, tiny_config, tmp_path, monkeypatch):
    """Texts are drawn in one run and judged in the next."""
    config = tiny_config("bd3lm,block_size=4", **{"training.num_steps": 2, "training.checkpoint_every": 2})
    train(config, tmp_path / "run")
    samplers, out = script("samplers"), f"--out={tmp_path / 'samplers'}"
    names = ["first-hitting", "first-hitting, no cache", "confidence, 2 a call"]
    only = [f"--only={name}" for name in names]
    samplers.main([f"--workdir={tmp_path / 'run'}", "--num_samples=5", out, *only])
    with_cache, without, confident, held_out = (cell["figures"] for cell in results(tmp_path / "samplers"))
    assert with_cache["texts"] == without["texts"]
    assert (with_cache["nfe"], confident["nfe"]) == (15, 8)
    assert len(held_out["texts"]) == 5
    monkeypatch.setattr(samplers, "TransformersJudge", ByteJudge)
    samplers.main(["--judge=some/bytes.gguf", out])
    judged = results(tmp_path / "samplers")[4:]
    assert [cell["figures"]["pooled_perplexity"] for cell in judged] == pytest.approx([256] * 4)
    table = (tmp_path / "samplers" / "table.md").read_text()
    assert "by bytes.gguf" in table
    assert all(f"| {name} | " in table for name in [*names, "held-out text"])
    assert (tmp_path / "samplers" / "samplers.png").stat().st_size > 1000


def test_sampling_speed(script, tmp_path, monkeypatch):
    speed = script("sampling_speed")
    tiny = dict(width=16, num_layers=2, num_heads=2, cond_dim=8)
    configure = speed.configure

    def smaller(string, settings, length):
        config = configure(string, settings, length)
        return dataclasses.replace(config, model=dataclasses.replace(config.model, **tiny))

    monkeypatch.setattr(speed, "configure", smaller)
    speed.main(["--batches=1,2", "--lengths=32", f"--out={tmp_path}"])
    figures = [cell["figures"] for cell in results(tmp_path)]
    assert [each["calls_per_token"] for each in figures] == [1, 1, 0.25] * 2
    assert all(each["tokens_per_second"] > 0 for each in figures)
    assert (tmp_path / "table.md").read_text().count("\n| ") == 1 + 6
    assert (tmp_path / "sampling_speed.png").stat().st_size > 1000


def test_small_models(script, tiny_config, tmp_path, monkeypatch):
    """Likelihoods row by row, as an evaluation of each checkpoint has them; a BD3-LM goes on from an MDLM; texts."""
    models, likelihood = script("small_models"), script("likelihood")
    names = ["AR", "BD3-LM B = 4"]
    monkeypatch.setattr(models, "MODELS", {name: models.MODELS[name] for name in names})
    monkeypatch.setattr(likelihood, "DRAWS", 2)

    monkeypatch.setattr(models, "settings", few_steps_of(tiny_config))
    argv = ["--seeds=1", "--steps=4", f"--runs={tmp_path / 'runs'}", f"--out={tmp_path / 'out'}"]
    likelihood.main(argv)
    recorded = results(tmp_path / "out")
    cells = recorded[:2]
    assert [(cell["settings"]["model"], cell["settings"]["seed"]) for cell in cells] == [(name, 1) for name in names]
    for cell in cells:
        name, seed = cell["settings"]["model"], cell["settings"]["seed"]
        workdir = models.workdir(name, seed, 4, epath.Path(tmp_path / "runs"))
        config = read_config(workdir)
        assert cell["config"] == json.loads(json.dumps(config.to_dict()))
        assert config.init_from == (str(models.workdir("first half", seed, 4, workdir.parent)) if "BD3" in name else "")
        dataset = open_dataset(config.data, config.model.length, "validation")
        model = LanguageModel.from_config(config, dataset.tokenizer.ids)
        params, _ = restore_params(config, workdir, "ema")
        draws = [dataclasses.replace(config.eval, seed=draw) for draw in range(2)]
        wanted = np.mean([evaluate_params(model, params, dataset, each).nll for each in draws])
        assert cell["figures"]["nll"] == pytest.approx(wanted, rel=1e-5)
        assert cell["figures"]["estimator"] == ("exact" if name == "AR" else config.eval.estimator)
        assert np.mean(cell["figures"]["rows"]) / cell["figures"]["counted"] == pytest.approx(wanted, rel=1e-3)
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| AR | BD3-LM B = 4 |" in text
    for (name, place), cell in zip({"AR": "ar", "first half": "firsthalf"}.items(), recorded[2:], strict=True):
        lines = (tmp_path / "runs" / f"{place}-seed-1-steps-4" / "metrics.jsonl").read_text().splitlines()
        losses = [line["train/loss"] for line in map(json.loads, lines) if "train/loss" in line]
        assert len(losses) == (4 if name == "AR" else 2)
        assert cell["settings"] == {"curve": name, "seed": 1, "steps": 4}
        assert cell["figures"] == {"step": [200], "loss": pytest.approx([np.mean(losses)], abs=1e-4)}
    assert "| first half of BD3-LMs | 200 | " in text
    assert (tmp_path / "out" / "training.png").stat().st_size > 1000
    likelihood.main(argv)
    assert results(tmp_path / "out") == recorded

    runs, one = f"--runs={tmp_path / 'runs'}", script("one_token_blocks")
    one.main(["--seeds=1", "--steps=4", runs, f"--out={tmp_path / 'one'}"])
    found = {cell["settings"].get("model"): cell["figures"] for cell in results(tmp_path / "one")}
    assert found.pop(None)["step"] == [200]  # curves
    assert found[one.AR]["rows"] == cells[0]["figures"]["rows"]
    assert {figures["estimator"] for figures in found.values()} == {"exact"}
    # Of tokens that are masked with chance t and weigh 1/t: all but nothing is learnt in 4 steps, so losses are alike.
    assert found[one.UNIFORM]["variances"]["block_variance"] > 3 * found[one.MASKED]["variances"]["block_variance"]
    assert f"| {one.MASKED} | 1 | " in (tmp_path / "one" / "table.md").read_text()
    assert (tmp_path / "one" / "one_token_blocks.png").stat().st_size > 1000

    script("exact_orders").main(["--seed=1", "--steps=4", runs, "--rows=3", f"--out={tmp_path / 'orders'}"])
    exact = {cell["settings"]["estimator"]: cell["figures"] for cell in results(tmp_path / "orders")}
    batch = dataset.read([0, (len(dataset) - 1) // 2, len(dataset) - 1])  # model and parameters of the BD3-LM
    for order in ("left_to_right", "most_confident"):
        losses = np.asarray(model.eval_losses(params, batch, jax.random.key(5), order)) * np.asarray(
            model.counted(model.length)
        )
        np.testing.assert_allclose(exact[order]["rows"], losses.sum(1), atol=2e-3)
    assert exact["low_variance"]["nll"] == pytest.approx(exact["left_to_right"]["nll"], rel=0.1)
    assert "| BD3-LM B = 4 | " in (tmp_path / "orders" / "table.md").read_text()
    assert (tmp_path / "orders" / "exact_orders.png").stat().st_size > 1000

    quality, out = script("sample_quality"), f"--out={tmp_path / 'quality'}"
    quality.main(["--seed=1", "--steps=4", runs, out, "--num_samples=2"])
    drawn = results(tmp_path / "quality")
    length = model.length
    assert [cell["settings"].get("max_length") for cell in drawn] == [length, 2 * length, length, 2 * length, None]
    assert drawn[-2]["figures"]["nfe"] == 2 * length - 1  # one call a token, BOS given
    monkeypatch.setattr(script("samplers"), "TransformersJudge", ByteJudge)
    quality.main(["--judge=some/bytes.gguf", out])
    assert "256.0" in (tmp_path / "quality" / "table.md").read_text()
    assert (tmp_path / "quality" / "sample_quality.png").stat().st_size > 1000


def few_steps_of(tiny_config):
    """`small_models.settings` of models that train in seconds."""

    def tiny(string, seed, steps):
        resample = {"noise.resample": True} if string.startswith("bd3lm") else {}
        changed = {"training.num_steps": steps, "training.eval_every": steps, "eval.estimator": "low_variance"}
        return tiny_config(string, seed=seed, **changed, **resample)

    return tiny


def test_the_standard_error_of_a_difference(script):
    """Over many experiments of three seeds and 400 rows, with spreads of seeds and rows that are known."""
    rng, found = np.random.default_rng(0), []
    for _ in range(400):
        rows, first = rng.normal(0, 1, 400), rng.normal(0, 0.05, (3, 1))
        second = first + rng.normal(0, 0.05, (3, 1)) + 0.3 + rng.normal(0, 0.5, 400)
        found.append(script("measures").compare(rows + first, rows + second))
    means, errors = np.array(found).T
    assert means.mean() == pytest.approx(0.3, abs=0.01)
    assert np.sqrt((errors**2).mean()) == pytest.approx(means.std(), rel=0.15)
