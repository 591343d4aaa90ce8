"""Every config file resolves for every objective; every impossible setting is refused by name."""

import importlib
import json
from pathlib import Path

import ml_collections
import numpy as np
import pytest

import bd3_jax.configs
from bd3_jax.config import SAMPLERS, Config, can_clip
from bd3_jax.config_dict import from_config_dict
from bd3_jax.configs import base, owt
from bd3_jax.errors import UserError

CONFIGS = sorted(
    path.stem for path in Path(bd3_jax.configs.__file__).parent.glob("[a-z]*.py") if path.stem != "workdir"
)
STRINGS = ("ar", "mdlm", "sedd", "bd3lm,block_size=4")


def resolve(string: str = "bd3lm,block_size=16", **overrides: object) -> Config:
    """The base config with overrides such as model__width=3."""
    settings = base.get_config(string).to_dict()
    for name, value in overrides.items():
        *groups, field = name.split("__")
        node = settings
        for group in groups:
            node = node[group]
        node[field] = value
    return from_config_dict(ml_collections.ConfigDict(settings))


@pytest.mark.parametrize("string", STRINGS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_resolves(name, string):
    module = importlib.import_module(f"bd3_jax.configs.{name}")
    config = from_config_dict(module.get_config(string))
    assert config.objective == string.split(",")[0]
    assert config.block_size == {"ar": 1, "bd3lm": 4}.get(config.objective, config.model.length)
    assert config.sampling.sampler in SAMPLERS[config.objective]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_has_a_default_string(name):
    module = importlib.import_module(f"bd3_jax.configs.{name}")
    assert isinstance(from_config_dict(module.get_config()), Config)


def test_a_config_survives_json():
    config = resolve()
    again = from_config_dict(ml_collections.ConfigDict(json.loads(json.dumps(config.to_dict()))))
    assert again == config


def test_an_integer_stands_for_a_float():
    dropout = resolve(model__dropout=0).model.dropout
    assert dropout == 0.0
    assert isinstance(dropout, float)


IMPOSSIBLE = [
    # overrides, what the message must name
    (dict(model__widht=3), "unknown setting config.model.widht; did you mean config.model.width?"),
    (dict(modle=3), "unknown setting config.modle; did you mean config.model?"),
    (dict(zzz=3), "unknown setting config.zzz; allowed: objective, block_size"),
    (dict(model=3), "config.model must be a group of settings, found 3"),
    (dict(model__width="wide"), "config.model.width must be of type int, found 'wide'"),
    (dict(model__width=64.0), "config.model.width must be of type int, found 64.0"),
    (dict(model__width=True), "config.model.width must be of type int, found True"),
    (dict(model__dropout=True), "config.model.dropout must be of type float, found True"),
    (dict(noise__resample=1), "config.noise.resample must be of type bool, found 1"),
    (dict(optimizer__learning_rate=float("inf")), "config.optimizer.learning_rate must be finite"),
    (dict(noise__high=float("nan")), "config.noise.high must be finite"),
    (dict(objective="gpt"), "config.objective must be one of ar, mdlm, sedd, bd3lm; found 'gpt'"),
    (dict(noise__schedule="linear"), "config.noise.schedule must be one of loglinear, square"),
    (dict(model__width=0), "config.model.width is 0; allowed: 1 or more"),
    (dict(model__width=100), "config.model.num_heads is 12; allowed: a divisor of model.width = 100"),
    (dict(model__width=36), "config.model.num_heads is 12; allowed: an even width per head"),
    (dict(model__dropout=0.999999), "config.model.dropout is 0.999999; allowed: 0 to 0.99"),
    (dict(model__dropout=-0.1), "config.model.dropout is -0.1; allowed: 0 to 0.99"),
    (dict(block_size=7), "config.block_size is 7; allowed: a divisor of model.length = 1024"),
    (dict(block_size=0), "config.block_size is 0; allowed: a divisor of model.length = 1024"),
    (dict(block_size=-16), "config.block_size is -16; allowed: a divisor"),
    (dict(block_size=2048), "config.block_size is 2048; allowed: a divisor"),
    (dict(noise__low=0.0), "config.noise.low, noise.high is (0.0, 1.0); allowed: 0 < low <= high <= 1"),
    (dict(noise__low=0.6, noise__high=0.5), "config.noise.low, noise.high is (0.6, 0.5)"),
    (dict(noise__low=0.51, noise__high=0.52, noise__resample=True), "a range that holds k/16 for some k"),
    (dict(noise__schedule="cosine", noise__high=0.5), "config.noise.schedule is 'cosine'; allowed: loglinear"),
    (dict(objective=["ar"]), "config.objective must be one of ar, mdlm, sedd, bd3lm; found ['ar']"),
    (dict(model__length=1, block_size=1), "config.model.length is 1; allowed: 2 or more"),
    (dict(model__length=10**30), f"config.model.length is {10**30}; allowed: integers up to 2**31 - 1"),
    (dict(training__num_steps=2**31), "config.training.num_steps is 2147483648; allowed: integers up to 2**31 - 1"),
    (dict(optimizer__learning_rate=10**400), "config.optimizer.learning_rate must be of type float"),
    (dict(sampling__prompt="caf\udce9"), r"config.sampling.prompt is 'caf\udce9'; allowed: text in UTF-8"),
    (dict(data__corpus=""), "config.data.corpus"),
    (dict(data__directory=""), "config.data.directory"),
    (dict(data__vocab_size=0), "config.data.vocab_size"),
    (dict(optimizer__learning_rate=0.0), "config.optimizer.learning_rate is 0.0; allowed: above 0"),
    (dict(optimizer__ema_decay=1.0), "config.optimizer.ema_decay is 1.0; allowed: 0 <= x < 1"),
    (dict(optimizer__warmup_steps=-1), "config.optimizer.warmup_steps is -1; allowed: 0 or more"),
    (dict(optimizer__clip_norm=0.0), "config.optimizer.clip_norm"),
    (dict(training__batch_size=0), "config.training.batch_size is 0; allowed: 1 or more"),
    (dict(training__log_every=0), "config.training.log_every"),
    (dict(training__microbatches=3), "config.training.microbatches is 3; allowed: a divisor of training.batch_size"),
    (dict(training__noise_copies=0), "config.training.noise_copies is 0; allowed: 1 or more"),
    (
        dict(training__noise_copies=2**20),
        "config.training.batch_size, training.noise_copies, model.length is (512, 104",
    ),
    (dict(training__noise_copies=2, block_size=1024), "noise_copies is 2; allowed: 1 where a block is the whole row"),
    (dict(training__max_skipped=0), "config.training.max_skipped is 0; allowed: 1 or more"),
    (dict(training__keep_every=7000), "keep_every is 7000; allowed: a multiple of training.checkpoint_every = 5000"),
    (dict(training__keep_best=-1), "config.training.keep_best is -1; allowed: 0 or more"),
    (dict(training__sigterm_status=300), "config.training.sigterm_status is 300; allowed: 0 to 255"),
    (dict(profile_steps=-1), "config.profile_steps is -1; allowed: 0 or more"),
    (dict(search__widths=(1.5,)), "config.search.widths is (1.5,); allowed: 0 < width < 1"),
    (dict(search__widths=0.5), "config.search.widths must be a tuple of float values, found 0.5"),
    (dict(search__widths=(0.5, "x")), "config.search.widths must be of type float, found 'x'"),
    (dict(search__enabled=True, search__batch_size=1, block_size=1024), "search.batch_size is 1; allowed: 2 or more"),
    (dict(search__num_batches=0), "config.search.num_batches is 0; allowed: 1 or more"),
    (dict(search__enabled=True, noise__schedule="cosine"), "config.search.enabled is True; allowed: False with noise"),
    (
        dict(search__enabled=True, search__widths=(0.05,), noise__resample=True),
        "config.search.widths is (0.05,); allowed: 1/16 or more",
    ),
    (dict(eval__split=""), "config.eval.split"),
    (dict(eval__num_batches=-1), "config.eval.num_batches is -1; allowed: 0 or more"),
    (dict(sampling__sampler="analytic"), "config.sampling.sampler is 'analytic'; allowed: first_hitting, ancestral"),
    (dict(sampling__sampler="beam"), "config.sampling.sampler must be one of"),
    (dict(sampling__nucleus=0.0), "config.sampling.nucleus is 0.0; allowed: 0 < P <= 1"),
    (dict(sampling__temperature=0.0), "config.sampling.temperature is 0.0; allowed: 1e-3 or more"),
    (dict(sampling__temperature=1e-40), "config.sampling.temperature is 1e-40; allowed: 1e-3 or more"),
    (dict(sampling__max_length=1), "config.sampling.max_length is 1; allowed: 2 or more"),
    (
        dict(sampling__max_length=2 * 10**9),
        "config.sampling.batch_size, sampling.max_length is (4, 2000000000); allowed: up to 2**28 tokens a batch",
    ),
    (
        dict(training__batch_size=2**20),
        "config.training.batch_size, training.noise_copies, model.length is (1048576, 1, 1024)",
    ),
    (dict(eval__batch_size=2**20), "config.eval.batch_size, model.length is (1048576, 1024)"),
    (dict(search__batch_size=2**20), "config.search.batch_size, model.length is (1048576, 1024)"),
    (dict(sampling__weights="best"), "config.sampling.weights must be one of ema, raw; found 'best'"),
    (dict(sampling__top_k=-1), "config.sampling.top_k is -1; allowed: 0 or more"),
    (dict(sampling__min_entropy=-2.0), "config.sampling.min_entropy is -2.0; allowed: 0 or more, or -1"),
    (dict(sampling__tokens_per_step=0), "config.sampling.tokens_per_step is 0; allowed: 1 or more"),
    (dict(sampling__threshold=1.5), "config.sampling.threshold is 1.5; allowed: 0 to 1"),
    (dict(sampling__entropy_bound=-0.1), "config.sampling.entropy_bound is -0.1; allowed: 0 or more"),
    (dict(sampling__remasking=2.0), "config.sampling.remasking is 2.0; allowed: 0 to 1"),
    (dict(sampling__seed=-1), "config.sampling.seed is -1; allowed: 0 <= seed < 2**32"),
    (dict(seed=2**32), "config.seed is 4294967296; allowed: 0 <= seed < 2**32"),
    (dict(mesh__data=0), "config.mesh.data is 0; allowed: 1 or more, or -1"),
    (dict(mesh__fsdp=0), "config.mesh.fsdp is 0; allowed: 1 or more"),
]


@pytest.mark.parametrize(("overrides", "message"), IMPOSSIBLE, ids=[str(case[0]) for case in IMPOSSIBLE])
def test_impossible_settings_are_refused_by_name(overrides, message):
    with pytest.raises(UserError) as error:
        resolve(**overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("objective", SAMPLERS)
@pytest.mark.parametrize("sampler", sorted({name for names in SAMPLERS.values() for name in names}))
def test_a_sampler_must_fit_the_objective(objective, sampler):
    string = "bd3lm,block_size=16" if objective == "bd3lm" else objective
    if sampler in SAMPLERS[objective]:
        assert resolve(string, sampling__sampler=sampler).sampling.sampler == sampler
    else:
        with pytest.raises(UserError, match=f"for objective {objective}"):
            resolve(string, sampling__sampler=sampler)


@pytest.mark.parametrize(("string", "only"), [("ar", 1), ("mdlm", 1024), ("sedd", 1024)])
def test_other_objectives_have_one_block_size(string, only):
    assert resolve(string).block_size == only
    assert resolve(string, block_size=only).block_size == only
    with pytest.raises(UserError, match=rf"block_size is 16; allowed: {only} \(or 0\)"):
        resolve(string, block_size=16)


def test_the_low_variance_estimator_is_for_masked_diffusion():
    assert resolve("mdlm", eval__estimator="low_variance").eval.estimator == "low_variance"
    with pytest.raises(UserError, match=r"eval\.estimator is 'low_variance'; allowed: monte_carlo"):
        resolve("sedd", eval__estimator="low_variance")
    with pytest.raises(UserError, match=r"'low_variance'; allowed: monte_carlo with noise.schedule scaled_loglinear"):
        resolve("mdlm", eval__estimator="low_variance", noise__schedule="scaled_loglinear")


def test_the_loss_weight_of_1_is_not_for_sedd():
    assert resolve("mdlm", noise__low=0.6).noise.low == 0.6
    assert resolve("sedd", noise__low=0.5).noise.low == 0.5
    with pytest.raises(UserError, match=r"noise\.low is 0.6; allowed: up to 0.5 for objective sedd"):
        resolve("sedd", noise__low=0.6)


@pytest.mark.parametrize("string", ["ar", "sedd"])
def test_the_search_is_for_subs(string):
    with pytest.raises(UserError, match=rf"search\.enabled is True; allowed: False for objective {string}"):
        resolve(string, search__enabled=True)


def test_a_missing_setting_is_named():
    config = base.get_config()
    del config.model.width
    with pytest.raises(UserError, match=r"missing setting config\.model\.width"):
        from_config_dict(config)


@pytest.mark.parametrize(
    ("string", "message"),
    [
        ("gpt", "found 'gpt', allowed: ar, mdlm, bd3lm, sedd"),
        ("", "found '', allowed: ar"),
        ("bd3lm", "bd3lm needs a block size"),
        ("bd3lm,blocksize=4", "found 'blocksize=4', allowed: block_size=B"),
        ("bd3lm,block_size=-4", "found 'block_size=-4', allowed: block_size=B"),
        ("bd3lm,block_size=four", "allowed: block_size=B"),
    ],
)
def test_a_wrong_config_string_is_refused(string, message):
    with pytest.raises(UserError) as error:
        base.get_config(string)
    assert message in str(error.value)


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 7, 10, 15, 49])
def test_an_interval_is_allowed_where_a_number_of_masked_tokens_fits(block_size):
    """Bounds k/B are inclusive, as floats of 32 and of 64 bits alike; between them nothing fits."""
    for k in range(1, block_size):
        for bound in (k / block_size, float(np.float32(k / block_size))):
            assert can_clip(block_size, bound, bound)
        assert not can_clip(block_size, (k + 0.4) / block_size, (k + 0.6) / block_size)
    assert can_clip(block_size, 1e-3, 0.9999 / block_size)  # nothing masked: the lower bound is waived
    assert not can_clip(block_size, 0.002, 0.9999 / block_size)


def test_owt_is_the_papers_small_model_and_has_others():
    config = from_config_dict(owt.get_config("sedd"))
    m, o = config.model, config.optimizer
    assert (m.width, m.num_layers, m.num_heads, m.cond_dim) == (768, 12, 12, 128)
    assert (config.training.batch_size, o.learning_rate, o.warmup_steps, o.ema_decay) == (512, 3e-4, 2500, 0.9999)
    assert config.data.insert_eos
    assert config.eval.without_special == "training"
    medium = from_config_dict(owt.get_config("bd3lm,block_size=8,size=medium"))
    assert (medium.block_size, medium.model.width, medium.model.num_layers) == (8, 1024, 24)
    with pytest.raises(UserError, match="found size=huge, allowed: tiny, small, medium"):
        owt.get_config("ar,size=huge")
