"""`bd3_jax.load_pretrained`: one object for workdirs and published checkpoints, ready to use."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

import bd3_jax
from bd3_jax.data.tokenizers import load_tokenizer
from bd3_jax.errors import UserError
from bd3_jax.pretrained import load_pretrained
from tests import reference
from tests.conftest import GOLDEN, assert_agree

# As an export has them, and the authors' files do not.
IDS = {"bos_token_id": 28, "eos_token_id": 29, "mask_token_id": 30}


@pytest.fixture
def golden(tmp_path):
    """A golden model, with settings added to its config.json."""

    def load(name, settings=IDS, **options):
        folder = shutil.copytree(GOLDEN / name, tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | settings))
        return load_pretrained(str(folder), **options)

    return load


@pytest.mark.parametrize("name", ["bd3lm_block4", "bd3lm_block1", "mdlm", "sedd", "ar"])
def test_apply_gives_the_authors_logits(name):
    loaded, stored = load_pretrained(str(GOLDEN / name)), np.load(GOLDEN / name / "io.npz")
    assert loaded.objective == name.split("_")[0]
    inputs = {}
    if loaded.objective == "bd3lm":
        inputs["clean"] = stored["x0"]
    if loaded.objective == "sedd":
        inputs["sigma"] = stored["sigma"][:, 0]
    tokens = stored["x0"] if loaded.objective == "ar" else stored["xt"]
    assert_agree(loaded.apply(tokens, **inputs), stored["logits"])


def test_apply_without_clean_tokens_is_the_sampling_mode():
    config = json.loads((GOLDEN / "bd3lm_block4" / "config.json").read_text())
    tensors = load_file(GOLDEN / "bd3lm_block4" / "model.safetensors")
    x = np.load(GOLDEN / "bd3lm_block4" / "io.npz")["sample_x"]
    assert_agree(load_pretrained(str(GOLDEN / "bd3lm_block4")).apply(x), reference.logits(config, tensors, x))


def test_what_it_tells_of_itself(golden):
    loaded = golden("bd3lm_block4")
    assert isinstance(loaded, bd3_jax.Pretrained)
    assert (loaded.objective, loaded.block_size, loaded.mask_id, loaded.interval) == ("bd3lm", 4, 30, (0.001, 1.0))
    assert (loaded.model_config.width, loaded.model_config.num_layers, loaded.model_config.length) == (32, 2, 16)
    assert (loaded.tokenizer, loaded.step) == (None, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.source = "elsewhere"
    assert len(repr(loaded)) < 4000  # no weights


@pytest.mark.parametrize("name", ["bd3lm_block4", "sedd"])
def test_samples_and_perplexity_of_tokens_need_no_tokenizer(name, golden):
    loaded = golden(name)
    samples = loaded.sample([3, 4], num_samples=3, batch_size=2, num_steps=3, max_length=16, seed=1)
    assert len(samples) == 3
    for drawn in samples:
        assert drawn.tokens[:3] == [28, 3, 4]  # BOS as config.json says
        assert len(drawn.tokens) == 16
        assert loaded.mask_id not in drawn.tokens
        assert drawn.text is None
    result = loaded.perplexity(np.load(GOLDEN / name / "io.npz")["x0"], batch_size=2)
    assert result.sequences == 3
    assert result.tokens == 45
    assert 1 < result.perplexity < 1000


def test_exact_perplexity_is_the_authors_loss(golden):
    stored = np.load(GOLDEN / "ar" / "io.npz")
    result = golden("ar").perplexity(stored["x0"], batch_size=2)
    np.testing.assert_allclose(result.nll, stored["loss"], rtol=1e-5)
    assert result.estimator == "exact"


def test_rows_may_be_shorter_than_the_context(golden):
    """Where one block is the whole row, it is as long as the row."""
    loaded, x = golden("mdlm"), np.load(GOLDEN / "mdlm" / "io.npz")["xt"][:, :5]
    config = json.loads((GOLDEN / "mdlm" / "config.json").read_text())
    tensors = load_file(GOLDEN / "mdlm" / "model.safetensors")
    assert_agree(loaded.apply(x), reference.logits(config, tensors, x))
    assert loaded.perplexity(np.load(GOLDEN / "mdlm" / "io.npz")["x0"][:, :5]).tokens == 3 * 4


def test_the_objective_and_the_block_size_can_be_overridden(golden):
    """MDLM's network is a BD3-LM at B = L; at another B the same weights give another model."""
    mdlm = load_pretrained(str(GOLDEN / "mdlm"))
    whole = load_pretrained(str(GOLDEN / "mdlm"), objective="bd3lm")
    x = np.load(GOLDEN / "mdlm" / "io.npz")["xt"]
    assert (whole.objective, whole.block_size) == ("bd3lm", 16)
    np.testing.assert_array_equal(mdlm.apply(x), whole.apply(x))
    blocks = golden("mdlm", objective="bd3lm", block_size=4)
    assert (blocks.block_size, blocks.config.block_size, blocks.model.block_size) == (4, 4, 4)
    tensors = load_file(GOLDEN / "mdlm" / "model.safetensors")
    config = json.loads((GOLDEN / "mdlm" / "config.json").read_text()) | {"cross_attn": True, "block_size": 4}
    assert_agree(blocks.apply(x), reference.logits(config, tensors, x))
    assert len(blocks.sample(num_samples=1)) == 1


def test_a_time_conditioned_network_keeps_its_input_under_another_objective(golden):
    loaded = golden("sedd", objective="mdlm")
    with pytest.raises(UserError, match="sigma is missing"):
        loaded.apply(np.zeros((1, 16), int))
    with pytest.raises(UserError, match=r"conditioned on time; mdlm's samplers"):
        loaded.sample()
    assert loaded.perplexity(np.zeros((1, 16), int)).tokens == 15
    with pytest.raises(UserError, match=r"conditioned on time; allowed: estimator='monte_carlo'"):
        loaded.perplexity(np.zeros((1, 16), int), estimator="low_variance")
    blocks = load_pretrained(loaded.source, objective="bd3lm", block_size=4)
    with pytest.raises(UserError, match=r"conditioned on time; bd3lm's blocks are for models that are not"):
        blocks.perplexity(np.zeros((1, 16), int))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mdlm", {"objective": "gpt"}, "objective is 'gpt'; allowed: ar, mdlm, bd3lm, sedd"),
        ("mdlm", {"objective": "ar"}, "objective is 'ar', but .*mdlm has adaLN tensors"),
        ("ar", {"objective": "mdlm"}, "objective is 'mdlm', but .*ar has no adaLN tensors"),
        ("mdlm", {"block_size": 4}, "config.block_size is 4; allowed: 16"),
        ("bd3lm_block4", {"block_size": 3}, "config.block_size is 3; allowed: a divisor"),
        ("mdlm", {"tokenizer": "bytes"}, "the tokenizer has V = 258 with the mask, .* 31"),
        ("mdlm", {"tokenizer": "nowhere"}, "nowhere"),
    ],
)
def test_what_does_not_fit_is_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        load_pretrained(str(GOLDEN / name), **options)


USES = {
    # what is asked of the golden bd3lm_block4, what the error must say
    "an unknown setting": (lambda m: m.sample(nucleos=0.9), "unknown setting config.sampling.nucleos; did you mean"),
    "an impossible setting": (lambda m: m.sample(nucleus=2.0), "config.sampling.nucleus is 2.0"),
    "another model's sampler": (lambda m: m.sample(sampler="analytic"), "config.sampling.sampler is 'analytic'"),
    "text without a tokenizer": (lambda m: m.sample("The city"), "has no tokenizer here .* pass load_pretrained"),
    "texts without a tokenizer": (lambda m: m.perplexity(["The city"]), "has no tokenizer here"),
    "a vocabulary of another size": (lambda m: m.apply(np.full((1, 16), 31)), "ids from 31 to 31; allowed: 0 to 30"),
    "a prompt beyond the vocabulary": (lambda m: m.sample([3, 31]), "prompt holds the id 31; allowed: 0 to 30, but"),
    "a negative token": (lambda m: m.sample(np.array([-1])), "prompt holds the id -1; allowed: 0 to 30"),
    "a masked prompt": (lambda m: m.sample([30]), "prompt holds the id 30; allowed: 0 to 30, but for 30, the mask"),
    "a prompt of no tokens": (lambda m: m.sample([1.5]), "the prompt is .1.5.; allowed: text, or token ids"),
    "half a block": (lambda m: m.apply(np.zeros((1, 6), int)), "rows have 6 tokens; allowed: a multiple of the block"),
    "beyond the context": (lambda m: m.apply(np.zeros((1, 20), int)), "rows have 20 tokens; allowed: up to"),
    "ragged rows": (lambda m: m.perplexity([[1, 2], [3]]), "rows must be rows of one length"),
    "numbers that are no ids": (lambda m: m.apply(np.zeros((1, 16))), "tokens must be integers"),
    "one row without its axis": (lambda m: m.apply(np.zeros(16, int)), "tokens must be integers"),
    "masked tokens": (lambda m: m.perplexity(np.full((1, 16), 30)), "rows hold the mask's id 30"),
    "no rows": (lambda m: m.perplexity([]), "rows must be integers"),
    "clean tokens of another shape": (
        lambda m: m.apply(np.zeros((1, 16), int), clean=np.zeros((1, 12), int)),
        "clean is for bd3lm alone",
    ),
}


@pytest.mark.parametrize("name", USES)
def test_mistakes_in_use_are_one_line(name, golden):
    use, message = USES[name]
    with pytest.raises(UserError, match=message) as caught:
        use(golden("bd3lm_block4"))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "use",
    [
        lambda m: m.sample([3], num_samples=1),
        lambda m: m.replay([3], num_samples=1),
        lambda m: m.stream([3]),
        lambda m: m.perplexity(np.zeros((1, 16), int)),
        lambda m: m.mask_id,
    ],
)
def test_ids_that_nobody_says_are_not_guessed(use):
    """The mask need not be the last token, nor BOS the one before."""
    loaded = load_pretrained(str(GOLDEN / "bd3lm_block4"))
    message = r"does not say which ids are BOS, EOS and the mask, for it has no tokenizer\.json; put the one"
    with pytest.raises(UserError, match=message) as caught:
        use(loaded)
    assert len(str(caught.value).splitlines()) == 1


def test_ids_of_the_config_win_over_the_usual_tokenizer(tmp_path, monkeypatch):
    """A tokenizer of our own may be as large as that of GPT-2, and have other ids."""
    monkeypatch.setattr("bd3_jax.pretrained.load_tokenizer", lambda name: pytest.fail(f"asked for {name}"))
    ids = {"bos_token_id": 0, "eos_token_id": 1, "mask_token_id": 50257}
    config = reference.config_json("mdlm", 8, 50258, 8, 4, 1, 1, 2) | ids
    reference.write_checkpoint(tmp_path, config, reference.random_tensors(config, np.random.default_rng(0)))
    loaded = load_pretrained(str(tmp_path))
    assert (loaded.model.ids.bos, loaded.model.ids.eos, loaded.mask_id) == (0, 1, 50257)
    assert loaded.tokenizer is None


def test_a_tokenizer_with_other_ids_is_refused(tmp_path):
    load_tokenizer("bytes").save(tmp_path / "bytes")
    config = reference.config_json("mdlm", 8, 258, 8, 4, 1, 1, 2) | IDS
    reference.write_checkpoint(tmp_path / "m", config, reference.random_tensors(config, np.random.default_rng(0)))
    with pytest.raises(UserError, match=r"the tokenizer has SpecialIds\(bos=.*\), but the config.json of .* says"):
        load_pretrained(str(tmp_path / "m"), tokenizer=str(tmp_path / "bytes"))


def test_vocabularies_that_everybody_uses(tmp_path, monkeypatch):
    """V tells the tokenizer; where it cannot be had, its special ids still hold and texts say why."""

    def offline(name):
        raise UserError(f"cannot download {name}")

    monkeypatch.setattr("bd3_jax.pretrained.load_tokenizer", offline)
    for vocab_size, name, ids in (
        (50258, "gpt2", (50256, 50256, 50257)),
        (30522, "bert-base-uncased", (101, 101, 103)),
    ):
        config = reference.config_json("mdlm", 8, vocab_size, 8, 4, 1, 1, 2)
        folder = tmp_path / name
        reference.write_checkpoint(folder, config, reference.random_tensors(config, np.random.default_rng(0)))
        loaded = load_pretrained(str(folder))
        found = loaded.model.ids
        assert (found.bos, found.eos, found.mask) == ids
        with pytest.raises(UserError, match=f"has no tokenizer here .cannot download {name}.; pass load_pretrained"):
            loaded.sample("text")


# --------------------------------------------------------------------------------------------- the model of the seed

USE_IT = """
import re, sys
import numpy as np
import jax
import bd3_jax
from bd3_jax import pretrained

def mib(field):
    return int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

jax.numpy.zeros(1).block_until_ready()
before = mib("VmRSS")
model = bd3_jax.load_pretrained(sys.argv[1])
jax.block_until_ready(model.params)
size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)) / 2**20
print("MiB", size, mib("VmHWM") - before)
assert (model.objective, model.block_size, model.mask_id) == ("sedd", 1024, 50257)
result = model.perplexity(np.arange(100, 116)[None])
print("nll", result.nll, result.tokens)
(drawn,) = model.sample([5, 6, 7], num_samples=1, num_steps=2)
assert drawn.nfe == 3 and drawn.tokens[:4] == [50256, 5, 6, 7] and 50257 not in drawn.tokens, drawn
print("tokens", len(drawn.tokens))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_sedd_of_170_million_parameters(tmp_path):
    """`sedd-noeos-owt` in its exact shapes: loaded in twice its size at most, evaluated, sampled."""
    config = reference.config_json("sedd", 1024, 50258, 1024, 768, 12, 12, 128)
    tensors = reference.random_tensors(config, np.random.default_rng(0), scale=0.02)
    count = sum(value.size for name, value in tensors.items() if "inv_freq" not in name)
    assert round(count / 1e6, 1) == 169.6
    reference.write_checkpoint(tmp_path, config, tensors)
    del tensors
    ended = subprocess.run([sys.executable, "-c", USE_IT, tmp_path], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    said = {line.split()[0]: [float(word) for word in line.split()[1:]] for line in ended.stdout.splitlines()}
    print(ended.stdout)
    size, peak = said["MiB"]
    assert size == pytest.approx(count * 4 / 2**20)
    assert peak <= 2 * size
    nll, tokens = said["nll"]
    assert tokens == 15
    assert 0 < nll < 100
    assert said["tokens"] == [1024]
