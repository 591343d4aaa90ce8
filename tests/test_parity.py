"""`bd3 parity`: agrees with the authors' numbers and with an independent reference, and fails on everything else."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bd3_jax import cli
from bd3_jax.parity import IMPOSSIBLE, compare, parity
from tests import reference
from tests.conftest import GOLDEN, assert_agree

FOLDERS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
OUTPUTS = {
    "ar": {"logits", "log_probs", "nlls", "loss"},
    "mdlm": {"sigma", "logits", "model_output", "nll_per_token", "ddpm_p_x0", "ddpm_p_x0_nucleus", "ddpm_q_xs"},
    "bd3lm": {"sigma", "logits", "model_output", "nll_per_token", "sample_model_output", "ddpm_q_xs"},
    "sedd": {"sigma", "logits", "model_output", "nll_per_token"},
}


def failed(paths, **tolerances) -> set[tuple[str, str]]:
    return {(check.file, check.array) for check in parity(map(str, paths), **tolerances) if check.problem}


def copy(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / name, tmp_path / name))


def rewrite(folder: Path, **changes: np.ndarray | None) -> None:
    arrays = dict(np.load(folder / "io.npz")) | changes
    np.savez(folder / "io.npz", **{name: value for name, value in arrays.items() if value is not None})


def run(*arguments: object) -> int:
    """Exit status of `bd3 parity`."""
    try:
        return cli.main(["parity", *map(str, arguments)])
    except SystemExit as ended:
        return int(ended.code or 0)


# ------------------------------------------------------------------------------------------------- what must agree


@pytest.mark.slow
def test_the_authors_numbers(capsys):
    """One folder of folders; what lies beside them is found by itself."""
    assert run(GOLDEN) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1].endswith("arrays, all agree")
    for folder in FOLDERS:
        arrays = {line.split()[1] for line in said.splitlines() if line.split()[0] == folder}
        wanted = OUTPUTS[folder.split("_")[0]]
        if folder.startswith("sedd"):
            wanted = wanted | {f"{step}_probs_nucleus{p}" for step in ("analytic", "denoiser") for p in ("0.9", "1.0")}
        assert arrays == wanted
    assert sum(line.startswith("schedules.npz") for line in said.splitlines()) == 10
    assert sum(line.startswith("ema.npz") for line in said.splitlines()) == 1


@pytest.mark.parametrize("name", FOLDERS)
def test_reference_agrees_with_the_authors(name):
    """Of tests/reference.py, so that it may judge sizes for which the authors left no numbers."""
    config = json.loads((GOLDEN / name / "config.json").read_text())
    tensors, stored = load_file(GOLDEN / name / "model.safetensors"), np.load(GOLDEN / name / "io.npz")
    assert {key: value.shape for key, value in tensors.items() if "backbone" in key and "inv_freq" not in key} == (
        reference.shapes(config)
    )
    if config["causal"]:
        ours = reference.logits(config, tensors, stored["x0"])
    else:
        x0 = stored["x0"] if config["cross_attn"] else None
        ours = reference.logits(config, tensors, stored["xt"], x0, stored["sigma"][:, 0])
    assert_agree(ours, stored["logits"])


slow = pytest.mark.slow
SIZES = [
    # folder, objective, block size, sizes
    ("ar", "ar", 1, dict(vocab_size=9, length=7, width=20, layers=1, heads=5)),
    pytest.param("mdlm", "mdlm", 10, dict(vocab_size=50, length=10, width=48, layers=4, heads=2, cond=7), marks=slow),
    pytest.param("mdlm_loss_scale", "mdlm", 9, dict(vocab_size=5, length=9), marks=slow),
    pytest.param("sedd", "sedd", 6, dict(vocab_size=40, length=6, layers=1), marks=slow),
    ("sedd_loss_scale", "sedd", 12, dict(cond=3)),
    ("one", "bd3lm", 1, dict(length=5, layers=2)),
    ("three", "bd3lm", 3, dict(length=15, vocab_size=101)),
    pytest.param("eight", "bd3lm", 8, dict(length=24, width=8, heads=1), marks=slow),
    pytest.param("whole", "bd3lm", 12, dict(), marks=slow),
]


@pytest.mark.parametrize(("name", "objective", "block_size", "sizes"), SIZES)
def test_sizes_that_nobody_announced(name, objective, block_size, sizes, tmp_path):
    folder = reference.write_folder(tmp_path / name, objective, block_size, **sizes)
    checks = parity([str(folder)])
    assert {check.array for check in checks} >= OUTPUTS[objective]
    assert [check for check in checks if check.problem] == []


# -------------------------------------------------------------------------------------------------- what must fail


@pytest.mark.parametrize("name", ["ar", "mdlm", "sedd", "bd3lm_block4"])
def test_every_perturbed_array_fails_and_no_other(name, tmp_path):
    """Each output in its turn, by ten times the tolerance in one entry."""
    folder = copy(name, tmp_path)
    outputs = [check.array for check in parity([str(folder)])]
    stored = dict(np.load(folder / "io.npz"))
    changed = {}
    for array in outputs:
        value = np.array(stored[array], np.float64)
        entry = np.unravel_index(np.argmax(value > IMPOSSIBLE), value.shape)
        value[entry] += 10 * (2e-5 + 1e-5 * abs(value[entry]))
        changed[array] = value
    half = len(outputs) // 2
    for names in (outputs[:half], outputs[half:]):
        rewrite(folder, **stored | {array: changed[array] for array in names})
        assert failed([folder]) == {(name, array) for array in names}
    assert failed([folder], atol=1.0) == set()


def test_a_perturbed_array_exits_1(tmp_path, capsys):
    folder = copy("ar", tmp_path)
    rewrite(folder, nlls=np.load(folder / "io.npz")["nlls"] + np.eye(3, 15, dtype=np.float32) * 1e-3)
    assert run(folder) == 1
    said = capsys.readouterr().out
    assert "FAIL: 3 of 45 entries differ" in said
    assert said.splitlines()[-1] == "4 arrays, 1 failed"
    assert run(folder, "--atol=0.01") == 0
    assert run("--rtol", "0.01", folder) == 0


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("ar", "backbone.blocks.1.attn_qkv.weight"),
        ("mdlm", "backbone.sigma_map.mlp.0.bias"),
        ("sedd", "backbone.output_layer.adaLN_modulation.weight"),
        ("bd3lm_block4", "backbone.blocks.0.norm2.weight"),
    ],
)
def test_a_perturbed_weight_fails(name, tensor, tmp_path):
    folder = copy(name, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors[tensor].flat[3] += 0.05
    save_file(tensors, folder / "model.safetensors")
    assert {array for _, array in failed([folder])} >= {"logits"}
    assert run(folder) == 1


@pytest.mark.parametrize(("name", "array"), [("ar", "loss"), ("mdlm", "ddpm_q_xs"), ("sedd", "model_output")])
def test_a_missing_array_fails(name, array, tmp_path, capsys):
    folder = copy(name, tmp_path)
    rewrite(folder, **{array: None})
    assert failed([folder]) == {(name, array)}
    assert run(folder) == 1
    assert f"FAIL: {array} is missing" in capsys.readouterr().out


def test_missing_inputs_fail_what_needs_them(tmp_path):
    folder = copy("bd3lm_block4", tmp_path)
    rewrite(folder, sample_x=None, ddpm_t=None)
    assert failed([folder]) == {("bd3lm_block4", "sample_model_output"), ("bd3lm_block4", "ddpm_q_xs")}


def test_a_missing_half_of_the_sampler_arrays_fails(tmp_path):
    folder = copy("sedd", tmp_path)
    rewrite(folder, **{"denoiser_probs_nucleus0.9": None})
    assert failed([folder]) == {("sedd", "denoiser_probs_nucleus0.9")}
    probs = [f"{step}_probs_nucleus{p}" for step in ("analytic", "denoiser") for p in ("0.9", "1.0")]
    rewrite(folder, **dict.fromkeys(probs))
    assert {array for _, array in failed([folder])} == {"analytic_probs_nucleus0.99", "denoiser_probs_nucleus0.99"}


UNUSABLE = {
    "ids beyond the vocabulary": {"x0": np.full((3, 16), 31, np.int32)},
    "rows of another length": {"xt": np.zeros((3, 12), np.int32)},
    "ids that are no integers": {"xt": np.zeros((3, 16), np.float32)},
    "times beyond 1": {"t": np.full((3, 1), 1.5, np.float32)},
    "times of another shape": {"t": np.full((3, 5), 0.5, np.float32)},
    "another batch": {"x0": np.zeros((2, 16), np.int32)},
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_inputs_fail(name, tmp_path):
    folder = copy("mdlm", tmp_path)
    rewrite(folder, **UNUSABLE[name])
    assert {array for _, array in failed([folder])} >= {"sigma", "logits", "model_output", "nll_per_token"}


def test_a_damaged_folder_fails_and_the_others_are_checked(tmp_path, capsys):
    broken, whole = copy("mdlm", tmp_path), copy("ar", tmp_path)
    (broken / "model.safetensors").write_bytes(b"no tensors")
    assert run(broken, whole) == 1
    said = capsys.readouterr().out
    assert "is no readable safetensors file" in said
    assert said.splitlines()[-1] == "5 arrays, 1 failed"


@pytest.mark.parametrize("damage", ["nothing", "text", "objects"])
def test_damaged_arrays_fail(damage, tmp_path):
    folder = copy("ar", tmp_path)
    if damage == "nothing":
        (folder / "io.npz").unlink()
    elif damage == "text":
        (folder / "io.npz").write_bytes(b"PK\x03\x04 no more")
    else:
        np.savez(folder / "io.npz", x0=np.array([{"a": 1}], dtype=object))
    assert run(folder) == 1


def test_the_folders_name_chooses_the_noise_of_the_loss(tmp_path):
    shutil.copytree(GOLDEN / "sedd", tmp_path / "sedd_loss_scale")
    assert failed([tmp_path / "sedd_loss_scale"]) >= {
        ("sedd_loss_scale", "sigma"),
        ("sedd_loss_scale", "nll_per_token"),
    }


def test_what_lies_beside_is_checked(tmp_path):
    folder = copy("ar", tmp_path)
    schedules, ema = (dict(np.load(GOLDEN / name)) for name in ("schedules.npz", "ema.npz"))
    ema["shadow"][20] += 1e-3
    del schedules["log_loss_scale"]
    schedules["cosine_move_chance"] += np.where(np.arange(41) == 7, 0.01, 0).astype(np.float32)
    np.savez(tmp_path / "schedules.npz", **schedules)
    np.savez(tmp_path / "ema.npz", **ema)
    wanted = {("schedules.npz", "log_loss_scale"), ("schedules.npz", "cosine_move_chance"), ("ema.npz", "shadow")}
    assert failed([folder]) == wanted
    assert failed([tmp_path / "ema.npz", tmp_path / "schedules.npz"]) == wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "takes folders"), (["nowhere"], "nowhere is no folder"), (["."], "holds no io.npz"), (["--atol=-1"], "atol")],
)
def test_mistakes_exit_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ours", "stored", "agrees"),
    [
        ([1.0, 2.0], [1.0, 2.0], True),
        ([1.0 + 2.9e-5, 2.0], [1.0, 2.0], True),
        ([1.0 + 3.1e-5, 2.0], [1.0, 2.0], False),
        ([-np.inf, 2.0], [-1e6, 2.0], True),
        ([-2e6, 2.0], [-1e6, 2.0], True),
        ([-3.0, 2.0], [-1e6, 2.0], False),
        ([-np.inf, 2.0], [-3.0, 2.0], False),
        ([np.nan, 2.0], [1.0, 2.0], False),
        ([1.0, 2.0], [np.nan, 2.0], False),
        ([np.inf, 2.0], [1.0, 2.0], False),
        ([1.0], [1.0, 2.0], False),
    ],
)
def test_agreement(ours, stored, agrees):
    assert (compare("", "", np.array(ours), np.array(stored), 2e-5, 1e-5).problem == "") == agrees
