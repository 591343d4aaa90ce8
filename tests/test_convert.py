"""`bd3 convert`: the same bits there and back, in their layout and in ours, and nothing overwritten."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file

from bd3_jax import cli
from bd3_jax.checkpoints import orbax, run_folder
from bd3_jax.convert import convert
from bd3_jax.data.manifest import load_manifest
from bd3_jax.data.tokenizers import load_tokenizer
from bd3_jax.errors import UserError
from bd3_jax.language_model import LanguageModel
from bd3_jax.pretrained import load_pretrained
from tests import reference
from tests.conftest import GOLDEN
from tests.data.bucket import bucket, objects_in
from tests.workdirs import write_workdir

FOLDERS = ["bd3lm_block4", "bd3lm_block1", "mdlm", "sedd", "ar"]


def equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def same_tensors(folder: Path, other: Path) -> None:
    """Names, shapes, dtypes and every bit."""
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, other))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape), name
        assert ours[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("name", FOLDERS)
def test_theirs_comes_out_as_it_went_in(name, tmp_path):
    assert cli.main(["convert", str(GOLDEN / name), str(tmp_path / "out")]) == 0
    same_tensors(tmp_path / "out", GOLDEN / name)
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "out", GOLDEN / name))
    assert ours == theirs  # without ids, which nobody said
    assert list(ours) == list(theirs)


@pytest.mark.parametrize("name", FOLDERS)
def test_through_our_layout(name, tmp_path):
    """Theirs -> ours -> theirs: a workdir that loads as the same model, and every tensor bit for bit."""
    assert cli.main(["convert", str(GOLDEN / name), str(tmp_path / "run"), "--format=bd3"]) == 0
    assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "back")]) == 0
    there, first = load_pretrained(str(tmp_path / "run")), load_pretrained(str(GOLDEN / name))
    equal(there.params, first.params)
    assert there.model == first.model
    assert there.interval == first.interval
    tensors = load_file(tmp_path / "back" / "model.safetensors")
    original = load_file(GOLDEN / name / "model.safetensors")
    assert tensors.keys() == original.keys()
    same_tensors(tmp_path / "back", GOLDEN / name)


def test_a_searched_interval_and_the_older_noise_survive(tmp_path):
    """Through both layouts; an older config.json has fewer keys, which say that its noise is another."""
    config = reference.config_json("bd3lm", 4, 11, 8, 16, 2, 2, 4)
    tensors = reference.random_tensors(config, np.random.default_rng(0))
    tensors |= {"sampling_eps_min": np.array(0.45, np.float32), "sampling_eps_max": np.array(0.95, np.float32)}
    reference.write_checkpoint(tmp_path / "searched", config, tensors)
    older = reference.config_json("mdlm", 8, 11, 8, 16, 2, 2, 4)
    weights = reference.random_tensors(older, np.random.default_rng(0))
    kept = (
        "model_length",
        "vocab_size",
        "hidden_dim",
        "cond_dim",
        "n_blocks",
        "n_heads",
        "dropout",
        "time_conditioning",
    )
    reference.write_checkpoint(tmp_path / "older", {key: older[key] for key in kept}, weights)
    for name in ("searched", "older"):
        source, run, back = (tmp_path / path for path in (name, f"{name}_run", f"{name}_back"))
        convert(str(source), str(run), format="bd3")
        convert(str(run), str(back))
        same_tensors(back, source)
        first, last = load_pretrained(str(source)), load_pretrained(str(back))
        assert first.model == last.model
        assert first.interval == last.interval
    assert load_pretrained(str(tmp_path / "searched_back")).interval == (0.45, 0.95)
    assert load_pretrained(str(tmp_path / "older_back")).model.noise.schedule == "scaled_loglinear"


@pytest.fixture(scope="module")
def run(tiny_config, tmp_path_factory) -> Path:
    """A workdir of ours, averaged weights apart from the raw ones, with an evaluation on record."""
    workdir = epath.Path(tmp_path_factory.mktemp("run"))
    config = tiny_config("bd3lm,block_size=8")
    write_workdir(config, workdir, 1234, low=0.001, high=1)
    load_manifest(epath.Path(config.data.directory)).save(workdir)
    record = {"perplexity": 21.5, "perplexity_standard_error": 0.25, "estimator": "exact", "tokens": 999}
    record = {f"eval/{name}": value for name, value in (record | {"split": "validation"}).items()}
    lines = [
        {"step": 1000, **record, "eval/perplexity": 99.0},
        {"step": 1234, **record, "eval/estimator": "low_variance", "eval/perplexity": 98.0},
        {"step": 1234, **record, "eval/estimator": "low_variance", "eval/perplexity": 30.25},
        {"step": 1234, **record, "eval/weights": "ema"},
        {"step": 1234, **record, "eval/weights": "raw", "eval/perplexity": 77.0},
        {"step": 1234, "train/loss": 1},
    ]
    (workdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return Path(workdir)


def test_the_checkpoint_of_a_step(run, tmp_path, capsys):
    """With the figures of that step; the newest has others."""
    workdir, newest = tmp_path / "run", load_pretrained(str(run))
    shutil.copytree(run, workdir)
    half = jax.tree.map(lambda p: p / 2, newest.params)
    checkpoints = orbax.Checkpoints(epath.Path(workdir), keep=2)
    checkpoints.save(1000, {"ema": half, "low": np.float32(0.001), "high": np.float32(1)}, {})
    checkpoints.close()
    assert cli.main(["convert", str(workdir), str(tmp_path / "newest")]) == 0
    assert cli.main(["convert", str(workdir), str(tmp_path / "early"), "--step=1000"]) == 0
    equal(load_pretrained(str(tmp_path / "newest")).params, newest.params)
    equal(load_pretrained(str(tmp_path / "early")).params, half)
    card = (tmp_path / "early" / "README.md").read_text()
    assert "| training steps | 1,000 of 8 sequences |" in card
    assert "| evaluation | perplexity 99.000 +- 0.250 (exact) on 999 tokens of the validation split, after 1,00" in card
    assert "21.500" not in card
    capsys.readouterr()
    assert cli.main(["convert", str(workdir), str(tmp_path / "none"), "--step=999"]) == 2
    assert "run has no checkpoint of step 999; allowed: 1000, 1234\n" in capsys.readouterr().err


@pytest.mark.parametrize("weights", ["ema", "raw"])
@pytest.mark.parametrize("form", ["pytorch", "bd3"])
def test_a_workdir_with_its_tokenizer(weights, form, run, tmp_path):
    out = tmp_path / "out"
    assert cli.main(["convert", f"--format={form}", str(run), str(out), f"--weights={weights}"]) == 0
    wanted, found = load_pretrained(str(run), weights=weights), load_pretrained(str(out))
    equal(found.params, wanted.params)
    assert found.architecture == wanted.architecture
    assert found.tokenizer.fingerprint == wanted.tokenizer.fingerprint


@pytest.mark.parametrize(
    ("objective", "schedule", "ignore_bos"),
    [
        ("bd3lm,block_size=8", "loglinear", False),
        ("bd3lm,block_size=8", "scaled_loglinear", False),
        ("mdlm", "scaled_loglinear", True),
        ("sedd", "scaled_loglinear", True),
        ("mdlm", "cosine", True),
    ],
)
def test_the_noise_of_a_run_survives(objective, schedule, ignore_bos, tiny_config, tmp_path):
    """Also through another export."""
    config = tiny_config(objective)
    noise = dataclasses.replace(config.noise, schedule=schedule, ignore_bos=ignore_bos)
    config = dataclasses.replace(config, noise=noise)
    params = LanguageModel.from_config(config, load_tokenizer("bytes").ids).network.init(jax.random.key(0))
    run_folder.write_config(config, epath.Path(tmp_path / "run"))
    load_tokenizer("bytes").save(tmp_path / "run" / "tokenizer")
    orbax.save_params(epath.Path(tmp_path / "run"), 0, params, noise.low, noise.high)
    convert(str(tmp_path / "run"), str(tmp_path / "out"))
    convert(str(tmp_path / "out"), str(tmp_path / "again"))
    for name in ("run", "out", "again"):
        assert load_pretrained(str(tmp_path / name)).model.noise == noise, name


def test_names_and_shapes_are_the_authors(run, tmp_path):
    convert(str(run), str(tmp_path / "out"))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = reference.shapes(reference.config_json("bd3lm", 8, 258, 16, 32, 2, 2, 8))
    expected["backbone.rotary_emb.inv_freq"] = (8,)
    assert {name: value.shape for name, value in tensors.items()} == expected
    readable = {(tmp_path / "out" / name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert len(readable) == 1
    assert {value.dtype for value in tensors.values()} == {np.dtype(np.float32)}
    ids = {"bos_token_id": 256, "eos_token_id": 256, "mask_token_id": 257}
    assert config.keys() == json.loads((GOLDEN / "mdlm" / "config.json").read_text()).keys() | ids.keys()
    assert config.items() >= ids.items()
    # The frequencies are not read by us, but by them.
    exact = 10000.0 ** (-np.arange(8) / 8)
    np.testing.assert_allclose(tensors["backbone.rotary_emb.inv_freq"], exact, rtol=1e-6)


def test_an_export_without_its_tokenizer_keeps_the_ids(run, tmp_path):
    """Also through another export; an old one, whose config.json has none, is no model to sample from."""
    convert(str(run), str(tmp_path / "out"))
    (tmp_path / "out" / "tokenizer.json").unlink()
    convert(str(tmp_path / "out"), str(tmp_path / "again"))
    for name in ("out", "again"):
        loaded = load_pretrained(str(tmp_path / name))
        assert loaded.tokenizer is None
        assert loaded.model.ids == load_pretrained(str(run)).model.ids
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    old = {key: value for key, value in config.items() if not key.endswith("_token_id")}
    (tmp_path / "out" / "config.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match=r"does not say which ids are BOS, EOS and the mask, for it has no tokenizer"):
        load_pretrained(str(tmp_path / "out")).sample()
    load_tokenizer("bytes").save(tmp_path / "out")
    assert load_pretrained(str(tmp_path / "out")).mask_id == 257


@pytest.mark.parametrize("name", ["ar", "bd3lm-b8", "mdlm", "sedd"])
def test_the_models_that_come_along_with_ids_and_as_exports_of_before(name, tmp_path):
    """Those had no ids in config.json: they are the tokenizer's."""
    folder = Path(__file__).parents[1] / "experiments" / "models" / name
    loaded = load_pretrained(str(folder))
    assert loaded.architecture.ids == loaded.tokenizer.ids
    shutil.copytree(folder, tmp_path / name)
    config = json.loads((folder / "config.json").read_text())
    old = {key: value for key, value in config.items() if not key.endswith("_token_id")}
    assert len(old) == len(config) - 3
    (tmp_path / name / "config.json").write_text(json.dumps(old))
    assert load_pretrained(str(tmp_path / name)).architecture.ids == loaded.tokenizer.ids


@pytest.mark.slow
def test_our_layout_evaluates_and_samples(run, tiny_config, tmp_path, capsys):
    convert(str(run), str(tmp_path / "out"), format="bd3")
    workdir = f"--workdir={tmp_path / 'out'}"
    assert cli.main(["eval", workdir]) == 0
    assert re.search(r"perplexity\s+\d+", capsys.readouterr().out)
    assert cli.main(["sample", workdir, "--config.sampling.num_samples=1"]) == 0
    assert (tmp_path / "out" / "samples.jsonl").exists()


def test_our_layout_is_no_run_to_continue(run, tmp_path, capsys):
    out = tmp_path / "out"
    convert(str(run), str(out), format="bd3")
    assert cli.main(["train", f"--workdir={out}"]) == 2
    assert f"a new run may start from it with --config.init_from={out}" in capsys.readouterr().err


def test_the_model_card(run, tmp_path):
    convert(str(run), str(tmp_path / "my-model"))
    card = (tmp_path / "my-model" / "README.md").read_text()
    for fact in (
        "| objective | bd3lm: block diffusion", "| block size B | 8 |", "| context L | 16 tokens |",
        "| tokenizer | bytes (fingerprint ", "| EOS | after every document; none around rows |",
        "| training corpus | files; licence of the text: that of the files |",
        "| training steps | 1,234 of 8 sequences |",
        "| evaluation | perplexity 30.250 +- 0.250 (low_variance) on 999 tokens of the validation split, after 1,234 "
        "steps; perplexity 21.500 +- 0.250 (exact) on 999 tokens of the validation split",
        'load_pretrained("my-model")', "--config.init_from=my-model",
    ):  # fmt: skip
        assert fact in card, fact
    assert card.startswith("---\nlibrary_name: bd3_jax\n")


def test_a_card_has_the_figures_of_the_weights_that_it_comes_with(run, tmp_path):
    """Records of before, which do not say their weights, are of the average."""
    for weights, told, not_told in (("raw", ("77.000",), ("30.250", "21.500")), ("ema", ("30.250", "21.500"), ("77",))):
        convert(str(run), str(tmp_path / weights), weights=weights)
        card = (tmp_path / weights / "README.md").read_text()
        assert all(f"perplexity {figure} +- " in card for figure in told)
        assert not any(f"perplexity {figure}" in card for figure in not_told)


def test_a_card_claims_nothing_that_the_source_does_not_say(tmp_path):
    convert(str(GOLDEN / "mdlm"), str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in ("tokenizer", "EOS", "training corpus", "training steps", "evaluation"):
        assert f"| {fact} | not stated by the source |" in card


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_nothing_is_overwritten(kind, tmp_path, capsys, files_in):
    dest = tmp_path / "out"
    if kind == "folder":
        dest.mkdir()
        (dest / "mine").write_text("precious")
    elif kind == "file":
        dest.write_text("precious")
    else:
        dest.symlink_to("nowhere")
    before = files_in(tmp_path)
    assert cli.main(["convert", str(GOLDEN / "ar"), str(dest)]) == 2
    assert f"{dest} exists and is not overwritten" in capsys.readouterr().err
    assert files_in(tmp_path) == before
    assert dest.is_symlink() == (kind == "link")


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr("bd3_jax.convert.write_published", fail)
    with pytest.raises(OSError, match="No space left"):
        convert(str(GOLDEN / "ar"), str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "takes SOURCE and DEST, found nothing"),
        (["a"], "takes SOURCE and DEST, found a"),
        (["a", "b", "c"], "takes SOURCE and DEST"),
        ([str(GOLDEN / "ar"), "out", "--format=onnx"], "pytorch|bd3"),
        ([str(GOLDEN / "ar"), "out", "--weights=raw"], "holds one set of weights"),
        ([str(GOLDEN / "ar"), "out", "--step=3"], "ar is no workdir; allowed: none, for it holds one checkpoint"),
        ([str(GOLDEN / "ar"), "out", "--tokenizer=bytes"], "the tokenizer has V = 258"),
        (["nowhere", "out"], "'nowhere' does not exist here and is no hub id"),
    ],
)
def test_mistakes_end_with_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["convert", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argv", [["convert", "gs://b/run", "out"], ["judge", "gs://b/samples.jsonl"], ["replay", "--workdir=gs://b/run"]]
)
def test_a_bucket_without_its_library_is_one_line(argv, monkeypatch, capsys):
    def missing(*args):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr("etils.epath.backend.fsspec_backend._get_filesystem", missing)
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert f"is {argv[1].removeprefix('--workdir=')!r}, which cannot be reached: Please install gcsfs" in error
    assert error.count("\n") == 1


def test_the_authors_layout_is_on_a_local_disk(capsys):
    """Its library neither reads nor writes a bucket; both is told, and nothing is left there."""
    with bucket():
        target = epath.Path("gs://bucket/theirs")
        for file in (GOLDEN / "ar").iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        there = objects_in("gs://bucket")
        assert cli.main(["convert", str(target), "out"]) == 2
        assert "gs://bucket/theirs is in a bucket; allowed: the authors' layout in a local" in capsys.readouterr().err
        assert cli.main(["convert", str(GOLDEN / "ar"), "gs://bucket/out"]) == 2
        assert "DEST is 'gs://bucket/out'; allowed for format = pytorch: a local folder" in capsys.readouterr().err
        assert objects_in("gs://bucket") == there


def test_what_no_run_can_be_is_refused(tmp_path):
    """A BD3-LM that is fed the time."""
    config = reference.config_json("bd3lm", 4, 11, 8, 16, 2, 2, 4) | {"time_conditioning": True}
    reference.write_checkpoint(tmp_path / "m", config, reference.random_tensors(config, np.random.default_rng(0)))
    with pytest.raises(UserError, match="is bd3lm and is conditioned on time: no run is such"):
        convert(str(tmp_path / "m"), str(tmp_path / "run"), format="bd3")
    assert not (tmp_path / "run").exists()
    convert(str(tmp_path / "m"), str(tmp_path / "out"))
    same_tensors(tmp_path / "out", tmp_path / "m")


def test_unknown_formats_are_refused(tmp_path):
    with pytest.raises(UserError, match="format is 'onnx'; allowed: pytorch, bd3"):
        convert(str(GOLDEN / "ar"), str(tmp_path / "out"), format="onnx")
