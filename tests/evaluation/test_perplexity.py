"""Figures of a split against the same sums done by hand, and against what is known of a fresh model."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from etils import epath

from bd3_jax.checkpoints import orbax, run_folder
from bd3_jax.config import EvalConfig, MeshConfig
from bd3_jax.data.pipeline import Dataset
from bd3_jax.data.tokenizers import bytes_tokenizer, train_bpe
from bd3_jax.errors import UserError
from bd3_jax.evaluation import perplexity
from bd3_jax.evaluation.result import Result, pool
from bd3_jax.language_model import LanguageModel
from bd3_jax.sharding import batch_sharding, make_mesh


def settings(**changes):
    base = EvalConfig(
        "validation", batch_size=4, num_batches=0, estimator="monte_carlo", without_special="never",
        both_estimators=False, seed=0, weights="ema",
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


class Rows(list):
    """A TFDS data source, as far as it is used."""

    def __getitems__(self, indices):
        return [{"tokens": self[i]} for i in indices]


@pytest.fixture
def dataset():
    """Builds a split of `count` random rows of 12 tokens."""

    def build(count=10, seed=0):
        settings = type("Settings", (), dict(length=12, insert_special=False, insert_eos=True))
        rows = Rows(np.random.default_rng(seed).integers(0, 10, (count, 12)).astype(np.int32))
        return Dataset(epath.Path("nowhere"), "validation", type("M", (), dict(settings=settings)), None, rows)

    return build


eval_losses = jax.jit(LanguageModel.eval_losses, static_argnums=(0, 4))


def by_hand(lm, params, rows, config, batches):
    """Summed losses of every row, from padded batches."""
    sums = []
    for index, start in enumerate(range(0, len(rows), config.batch_size)):
        batch = rows[start : start + config.batch_size]
        padded = np.concatenate([batch, np.repeat(rows[:1], config.batch_size - len(batch), axis=0)])
        losses = eval_losses(
            lm, params, padded, jax.random.fold_in(jax.random.key(config.seed), index), config.estimator
        )
        sums.append(np.asarray(losses, np.float64)[: len(batch), lm.counted(12)].sum(1))
    return np.concatenate(sums[: batches or None])


@pytest.mark.parametrize("batches", [0, 2])
@pytest.mark.parametrize("objective", ["ar", "bd3lm", "sedd"])
def test_pools_over_the_rows_and_not_over_padding(toy_lm, random_params, dataset, objective, batches):
    lm = toy_lm(objective, 4 if objective == "bd3lm" else 0, ignore_bos=objective != "sedd")
    params, data, config = random_params(lm), dataset(), settings(seed=3)
    result = perplexity.evaluate_params(lm, params, data, config, batches)
    sums = by_hand(lm, params, np.stack(list(data.rows)), config, batches)
    counted = 12 if objective == "sedd" else 11
    assert (result.sequences, result.tokens) == (len(sums), len(sums) * counted)
    assert result.sequences == (8 if batches else 10)
    assert result.nll == pytest.approx(sums.sum() / result.tokens, rel=1e-5)
    assert result.standard_error == pytest.approx((sums / counted).std(ddof=1) / math.sqrt(len(sums)), rel=1e-4)
    assert result.first_counted == (objective == "sedd")
    assert result.estimator == ("exact" if objective == "ar" else "monte_carlo")


def test_exact_figures_do_not_depend_on_the_batch_size(toy_lm, random_params, dataset):
    lm = toy_lm("bd3lm", 1)
    params = random_params(lm)
    results = [perplexity.evaluate_params(lm, params, dataset(7), settings(batch_size=b)) for b in (3, 16)]
    for result in results:
        assert result.nll == pytest.approx(results[0].nll, rel=1e-5)
        assert result.standard_error == pytest.approx(results[0].standard_error, rel=1e-4)
        assert (result.tokens, result.sequences, result.estimator) == (77, 7, "exact")


def test_the_seed_decides_the_noise(toy_lm, random_params, dataset):
    lm = toy_lm("mdlm")
    run = lambda **changes: perplexity.evaluate_params(lm, random_params(lm), dataset(), settings(**changes)).nll
    assert run() == run()
    assert run() != run(seed=1)
    assert run() != run(estimator="low_variance")
    # Every batch has noise of its own: two equal batches have different losses.
    rows = np.repeat(np.stack(list(dataset(4).rows))[None], 2, axis=0)
    losses = perplexity.sequence_losses(
        lm, random_params(lm), [(batch, np.ones(4, bool)) for batch in rows], settings()
    )
    assert not np.allclose(losses[:4], losses[4:])


def test_rows_split_over_a_mesh(toy_lm, random_params, dataset):
    lm = toy_lm("bd3lm", 4)
    split = batch_sharding(make_mesh(MeshConfig(data=1, fsdp=1, tensor=1)), 2, "eval.batch_size")
    params = random_params(lm)
    ours = perplexity.evaluate_params(lm, params, dataset(), settings(), sharding=split)
    assert ours.nll == pytest.approx(perplexity.evaluate_params(lm, params, dataset(), settings()).nll, rel=1e-5)


def test_another_tokenizer_of_the_same_size_is_refused(dataset, tmp_path):
    trained = train_bpe(["one two three one two three"] * 3, 260)
    other = train_bpe(["seven eight nine seven eight nine"] * 3, 260)
    assert trained.ids == other.ids
    trained.save(epath.Path(tmp_path) / "tokenizer")
    perplexity.check_tokenizer(dataclasses.replace(dataset(), tokenizer=trained), epath.Path(tmp_path))
    with pytest.raises(UserError, match=r"nowhere has another tokenizer.*--config.data.tokenizer="):
        perplexity.check_tokenizer(dataclasses.replace(dataset(), tokenizer=other), epath.Path(tmp_path))


def test_without_its_tokenizer_a_run_still_has_its_vocabulary(toy_lm, random_params, dataset, tmp_path):
    lm, workdir = toy_lm("ar", vocab_size=258), epath.Path(tmp_path)
    orbax.save_params(workdir, 7, random_params(lm), 0.0, 1.0)
    bytes_258, trained_259 = bytes_tokenizer(), train_bpe(["one two"], 258)
    perplexity.check_tokenizer(dataclasses.replace(dataset(), tokenizer=bytes_258), workdir)
    with pytest.raises(UserError, match=r"nowhere has V = 259 with the mask, but .* was trained with 258"):
        perplexity.check_tokenizer(dataclasses.replace(dataset(), tokenizer=trained_259), workdir)


def test_compiled_once(toy_lm, random_params, dataset):
    lm = toy_lm("ar", vocab_size=13)
    for seed in range(3):
        perplexity.evaluate_params(lm, random_params(lm, seed), dataset(), settings())
    assert perplexity.likelihood_program(lm, "monte_carlo", None)._cache_size() == 1


def test_a_fresh_model(toy_lm, dataset):
    """Every token alike: exactly ln 10 nats, for AR; no spread."""
    lm = toy_lm("ar")
    result = perplexity.evaluate_params(lm, lm.network.init(jax.random.key(0)), dataset(), settings())
    assert result.nll == pytest.approx(math.log(10), rel=1e-6)
    assert result.perplexity == pytest.approx(10, rel=1e-5)
    assert result.bits_per_token == pytest.approx(math.log2(10), rel=1e-6)
    assert result.standard_error < 1e-6


def test_standard_error_is_that_of_repeated_samples():
    """Of a ratio, with sequences of different lengths; and of the perplexity."""
    rng = np.random.default_rng(0)

    def draw():
        counts = rng.integers(5, 30, 200)
        return counts * 2 + rng.normal(size=200) * np.sqrt(counts), counts

    pooled = np.array([pool(*draw()) for _ in range(2000)])
    assert pooled[:, 0].std() == pytest.approx(pooled[:, 1].mean(), rel=0.05)
    result = Result(2.0, 0.01, 1, 1, 0, "exact", "test", False, True, False, "ema", 0, 8)
    assert result.perplexity_standard_error == pytest.approx(
        np.exp(pooled[:, 0]).std() * 0.01 / pooled[:, 0].std(), rel=0.05
    )


def test_standard_error_of_stratified_noise():
    """Of 8 sequences each has a stratum of its own: what they differ in by it is no error of the mean."""
    rng = np.random.default_rng(0)

    def draw():
        strata = rng.permuted(np.tile(np.arange(8), (40, 1)), axis=1) + rng.uniform(size=(40, 8))
        return (strata + 0.3 * rng.normal(size=(40, 8))).ravel(), np.ones(320, int)

    draws = [draw() for _ in range(500)]
    means, errors = np.transpose([pool(*each, together=8) for each in draws])
    assert means.std() == pytest.approx(errors.mean(), rel=0.1)
    assert np.mean([pool(*each)[1] for each in draws]) > 4 * means.std()


def test_batches_are_independent_where_noise_is_drawn(toy_lm, random_params, dataset):
    for objective, batches in (("mdlm", True), ("ar", False)):
        lm = toy_lm(objective)
        params, data, config = random_params(lm), dataset(46), settings()
        result = perplexity.evaluate_params(lm, params, data, config)
        sums = by_hand(lm, params, np.stack(list(data.rows)), config, 0)
        parts = [sums[n : n + 4] for n in range(0, 46, 4)] if batches else [sums[n : n + 1] for n in range(46)]
        off = [part.sum() - len(part) * sums.mean() for part in parts]
        error = math.sqrt(len(off) * np.var(off, ddof=0) * len(off) / (len(off) - 1)) / (46 * 11)
        assert result.standard_error == pytest.approx(error, rel=1e-4)


def test_one_sequence_has_no_standard_error():
    assert math.isnan(pool(np.array([3.0]), np.array([2]))[1])


def test_table_and_record_say_how_the_figure_came_about():
    result = Result(2.0, 0.01, 1100, 100, 0, "low_variance", "test", False, True, False, "raw", 3, 8)
    table = result.table()
    for part in ("2.0000 +- 0.0100", "2.8854", "7.389 +- 0.074", "1,100 in 100 rows of the test split"):
        assert part in table
    assert "upper bound, low_variance" in table
    assert "position 0 left out" in table
    assert "BOS and EOS around rows: no; EOS after documents: yes" in table
    assert "exact" in dataclasses.replace(result, estimator="exact").table()
    assert "exact, unmasking left_to_right" in dataclasses.replace(result, estimator="left_to_right").table()
    assert json.loads(json.dumps(result.record()))["eval/perplexity"] == pytest.approx(math.e**2)


@pytest.mark.parametrize(("wrong", "figure"), [(math.nan, math.isnan), (math.inf, math.isinf), (1e9, math.isinf)])
def test_losses_that_are_not_finite_are_counted(toy_lm, wrong, figure):
    """The third is finite, and its perplexity is not."""
    losses = np.array([[1.0], [wrong], [2.0]])
    result = Result.of(toy_lm("ar"), losses, 12, settings(), "test", False, True)
    assert result.nonfinite == int(not math.isfinite(wrong))
    assert figure(result.perplexity)
    assert "perplexity" in result.table()


def test_diverged_weights_are_told(tiny_config, tmp_path, capsys):
    config = tiny_config("ar")
    lm = LanguageModel.from_config(config, bytes_tokenizer().ids)
    run_folder.write_config(config, epath.Path(tmp_path))
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, np.float32), lm.network.abstract_params())
    orbax.save_params(epath.Path(tmp_path), 3, params, 1e-3, 1.0)
    record = perplexity.evaluate(config, epath.Path(tmp_path))
    assert record["eval/nonfinite"] == record["eval/sequences"]
    assert f"warning: the loss of {record['eval/sequences']} of" in capsys.readouterr().err
    assert json.loads((tmp_path / "evaluations.jsonl").read_text())["eval/nll"] is None


def test_a_record_says_what_is_needed_to_obtain_it_again(tiny_config, random_params, tmp_path):
    """Weights, seed and batch size, each of which gives another figure."""
    config, workdir = tiny_config("bd3lm,block_size=4"), epath.Path(tmp_path)
    lm = LanguageModel.from_config(config, bytes_tokenizer().ids)
    run_folder.write_config(config, workdir)
    weights = {name: random_params(lm, seed) for seed, name in enumerate(("ema", "params"))}
    checkpoints = orbax.Checkpoints(workdir, keep=1)
    checkpoints.save(3, weights | {"low": np.float32(1e-3), "high": np.float32(1)}, {})
    checkpoints.close()

    def nll(**how):
        return perplexity.evaluate(dataclasses.replace(config, eval=settings(**how)), workdir)["eval/nll"]

    first = nll(weights="raw", seed=5, batch_size=2)
    record = json.loads((workdir / "evaluations.jsonl").read_text())
    how = {name: record[f"eval/{name}"] for name in ("weights", "seed", "batch_size", "estimator", "split")}
    assert nll(**how) == first
    others = [nll(**how | other) for other in ({"weights": "ema"}, {"seed": 6}, {"batch_size": 4})]
    assert len({first, *others}) == 4


def test_the_seed_is_told_where_noise_is_drawn(tiny_config, tmp_path, capsys):
    config = tiny_config("bd3lm,block_size=4")
    lm = LanguageModel.from_config(config, bytes_tokenizer().ids)
    run_folder.write_config(config, epath.Path(tmp_path))
    orbax.save_params(epath.Path(tmp_path), 3, lm.network.init(jax.random.key(0)), 1e-3, 1.0)
    for estimator, both, told in (("left_to_right", False, False), ("left_to_right", True, True)):
        changed = dataclasses.replace(config.eval, estimator=estimator, both_estimators=both)
        perplexity.evaluate(dataclasses.replace(config, eval=changed), epath.Path(tmp_path))
        assert ("noise           seed" in capsys.readouterr().out) == told
