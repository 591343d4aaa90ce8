"""The authors' checkpoints: what config.json means, where they are downloaded from, Lightning files and EMA weights."""

import dataclasses
import json
import re
import sys
import types
from pathlib import Path
from typing import Any, get_args

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import load_file

from bd3_jax.checkpoints.architecture import config_json, read_architecture
from bd3_jax.config import ScheduleName
from bd3_jax.errors import UserError
from bd3_jax.pretrained import load_pretrained
from bd3_jax.special_ids import SpecialIds
from tests.conftest import GOLDEN
from tests.reference import config_json as authors_config
from tests.reference import random_tensors, write_checkpoint

FULL = authors_config("bd3lm", 4, 31, 16, 32, 2, 4, 16)
IDS = {"bos_token_id": 0, "eos_token_id": 1, "mask_token_id": 4}
# What config.json of `mdlm-owt` and `louaaron/sedd-small` hold.
MDLM_OWT = {
    "model_length": 1024, "vocab_size": 50258, "hidden_dim": 768, "cond_dim": 128, "n_blocks": 12, "n_heads": 12,
    "dropout": 0.1, "time_conditioning": False,
}  # fmt: skip
SEDD_SMALL = {
    "tokens": 50257, "ngpus": 8, "graph": {"type": "absorb", "file": "data", "report_all": False},
    "noise": {"type": "loglinear", "sigma_min": 0.0001, "sigma_max": 20},
    "model": {"name": "small", "type": "ddit", "hidden_size": 768, "cond_dim": 128, "length": 1024, "n_blocks": 12,
              "n_heads": 12, "scale_by_sigma": True, "dropout": 0.1},
}  # fmt: skip
TENSORS = {str(n): np.zeros(()) for n in range(200)}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (FULL, ("bd3lm", 4, "loglinear", True)),
        (FULL | {"block_size": 16}, ("bd3lm", 16, "loglinear", True)),
        (FULL | {"cross_attn": False}, ("mdlm", 16, "loglinear", True)),
        (FULL | {"cross_attn": False, "block_size": 1}, ("mdlm", 16, "loglinear", True)),
        (FULL | {"cross_attn": False, "time_conditioning": True}, ("sedd", 16, "loglinear", True)),
        (FULL | {"cross_attn": False, "causal": True, "adaln": False}, ("ar", 1, "loglinear", True)),
        (MDLM_OWT, ("mdlm", 1024, "scaled_loglinear", False)),
        (SEDD_SMALL, ("sedd", 1024, "scaled_loglinear", False)),
        (FULL | IDS, ("bd3lm", 4, "loglinear", True)),
        (MDLM_OWT | IDS, ("mdlm", 1024, "scaled_loglinear", False)),
    ],
)
def test_the_objective_is_told_from_the_config(config, expected):
    found = read_architecture(config, TENSORS, "config.json")
    assert (found.objective, found.block_size, found.schedule, found.ignore_bos) == expected
    assert found.adaln == (found.objective != "ar")
    assert found.time_conditioned == (found.objective == "sedd")
    # What is written of it is read as the same again, tensors of the interval apart.
    assert read_architecture(config_json(found), TENSORS, "config.json") == found


@pytest.mark.parametrize("ignore_bos", [True, False])
@pytest.mark.parametrize("schedule", get_args(ScheduleName))
@pytest.mark.parametrize("config", [FULL, FULL | {"cross_attn": False}, FULL | {"var_min": True}, MDLM_OWT, SEDD_SMALL])
def test_any_noise_is_read_as_it_was_written(config, schedule, ignore_bos):
    found = read_architecture(config, TENSORS, "config.json")
    wanted = dataclasses.replace(found, schedule=schedule, ignore_bos=ignore_bos)
    assert read_architecture(config_json(wanted), TENSORS, "config.json") == wanted


def test_var_min_survives_the_older_noise():
    found = read_architecture(FULL | {"cross_attn": False}, TENSORS, "config.json")
    wanted = dataclasses.replace(found, schedule="scaled_loglinear", ignore_bos=False, var_min=True)
    assert read_architecture(config_json(wanted), TENSORS, "config.json") == wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_schedule": "linear"}, "config.noise.schedule must be one of loglinear, .*; found 'linear'"),
        ({"noise_schedule": 1}, "noise_schedule is 1; expected a value of type str"),
        ({"ignore_bos": "no"}, "ignore_bos is 'no'; expected a value of type bool"),
    ],
)
def test_an_impossible_noise_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        read_architecture(FULL | changes, TENSORS, "config.json")


@pytest.mark.parametrize("config", [FULL, MDLM_OWT])
def test_the_ids_are_those_of_the_config(config):
    assert read_architecture(config, TENSORS, "config.json").ids is None
    found = read_architecture(config | IDS, TENSORS, "config.json")
    assert found.ids == SpecialIds(bos=0, eos=1, mask=4, vocab_size=config["vocab_size"])
    assert config_json(found).items() >= IDS.items()


def test_sedd_counts_the_mask_in_its_vocabulary():
    assert read_architecture(SEDD_SMALL, TENSORS, "config.json").vocab_size == 50258


@pytest.mark.parametrize("name", ["bd3lm_block4", "bd3lm_block1", "mdlm", "sedd", "ar"])
def test_their_config_comes_out_as_it_went_in(name):
    content = json.loads((GOLDEN / name / "config.json").read_text())
    tensors = load_file(GOLDEN / name / "model.safetensors")
    assert config_json(read_architecture(content, tensors, "config.json")) == content


def test_the_interval_among_the_tensors_wins(tmp_path):
    config = FULL | {"sampling_eps_min": 0.001, "sampling_eps_max": 1.0}
    tensors = random_tensors(config, np.random.default_rng(0))
    tensors |= {"sampling_eps_min": np.array(0.45, np.float32), "sampling_eps_max": np.array(0.95, np.float32)}
    loaded = load_pretrained(str(write_checkpoint(tmp_path, config, tensors)))
    assert loaded.interval == (0.45, 0.95)
    assert (loaded.config.noise.low, loaded.config.noise.high, loaded.config.noise.resample) == (0.45, 0.95, True)


def test_names_without_the_prefix_are_the_same_model(tmp_path):
    """`louaaron/sedd-*`: no `backbone.`, sizes under `model`."""
    config = authors_config("sedd", 16, 31, 16, 32, 2, 4, 16)
    tensors = random_tensors(config, np.random.default_rng(0))
    theirs = write_checkpoint(tmp_path / "a", config, tensors)
    sizes = {"hidden_size": 32, "cond_dim": 16, "length": 16, "n_blocks": 2, "n_heads": 4}
    bare = {name.removeprefix("backbone."): value for name, value in tensors.items()}
    lou = write_checkpoint(tmp_path / "b", SEDD_SMALL | {"tokens": 30, "model": SEDD_SMALL["model"] | sizes}, bare)
    tokens, sigma = np.full((1, 16), 30), np.ones(1, np.float32)
    a, b = (load_pretrained(str(folder)).apply(tokens, sigma=sigma) for folder in (theirs, lou))
    np.testing.assert_array_equal(a, b)


# ---------------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(monkeypatch) -> list[dict[str, Any]]:
    """In place of the hub: every id is the golden bd3lm_block4; the calls are recorded."""
    calls: list[dict[str, Any]] = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        calls.append({"repo_id": repo_id, **options})
        return str(GOLDEN / "bd3lm_block4")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_hub_id_is_downloaded_with_revision_and_token(hub):
    loaded = load_pretrained("kuleshov-group/bd3lm-owt-block_size4", revision="abc123", token="hf_secret")
    assert (loaded.objective, loaded.block_size) == ("bd3lm", 4)
    (call,) = hub
    assert call["repo_id"] == "kuleshov-group/bd3lm-owt-block_size4"
    assert (call["revision"], call["token"]) == ("abc123", "hf_secret")
    assert {"config.json", "model.safetensors"} <= set(call["allow_patterns"])
    # No code is fetched, so that none could run.
    assert not any(re.search(r"\.py$|\*$|\.bin$|\.pt$", pattern) for pattern in call["allow_patterns"])
    assert "hf_secret" not in repr(loaded)


def test_without_revision_and_token_the_hubs_defaults_hold(hub):
    load_pretrained("kuleshov-group/mdlm-noeos-owt")
    assert (hub[0]["revision"], hub[0]["token"]) == (None, None)


def test_a_local_folder_goes_before_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "owner" / "name", FULL, random_tensors(FULL, np.random.default_rng(0)))
    load_pretrained("owner/name")
    assert hub == []


def test_offline_the_error_says_what_to_do(tmp_path, monkeypatch):
    """The real library, told that there is no network, with an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = (
        r"'kuleshov-group/mdlm-owt' is no path here and could not be taken from the Hugging Face hub \(.+\); "
        "download its config.json, model.safetensors and, if it has one, tokenizer.json into a folder and give that"
    )
    with pytest.raises(UserError, match=message) as caught:
        load_pretrained("kuleshov-group/mdlm-owt")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("source", ["nowhere", "a/b/c", "../x/y", "kuleshov-group/", "https://huggingface.co/a/b", ""])
def test_what_is_no_id_is_not_asked_of_the_hub(source, hub):
    with pytest.raises(
        UserError, match=r"does not exist here and is no hub id|must hold|OWNER/NAME on the hub, is .*unknown kind"
    ):
        load_pretrained(source)
    assert hub == []


# -------------------------------------------------------------------------------------------------------- Lightning


class StandInTensor:
    """As much of a torch.Tensor as is used."""

    def __init__(self, value: np.ndarray):
        self._value, self.shape = value, value.shape

    detach = float = lambda self: self

    def numpy(self) -> np.ndarray:
        return self._value


@pytest.fixture(params=["torch", "stand-in"])
def save(request, monkeypatch):
    """Writes a .ckpt with PyTorch, or, where there is none, lets a stand-in for it return what was written."""
    if request.param == "torch":
        torch = pytest.importorskip("torch")

        def convert(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: convert(item) for name, item in value.items()}
            if isinstance(value, list):
                return [convert(item) for item in value]
            return torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value

        return lambda content, path: torch.save(convert(content), path)

    contents: dict[str, Any] = {}

    def wrap(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: wrap(item) for name, item in value.items()}
        if isinstance(value, list):
            return [wrap(item) for item in value]
        return StandInTensor(value) if isinstance(value, np.ndarray) else value

    def load(path: str, *, map_location: str, weights_only: bool, mmap: bool) -> Any:
        assert weights_only is True
        return wrap(contents[path])

    stand_in = types.SimpleNamespace(
        load=load,
        is_tensor=lambda value: isinstance(value, StandInTensor),
        is_floating_point=lambda value: value.numpy().dtype.kind == "f",
    )
    monkeypatch.setitem(sys.modules, "torch", stand_in)

    def write(content: Any, path: Path) -> None:
        path.write_bytes(b"")
        contents[str(path)] = content

    return write


def lightning(folder: Path, save: Any, compiled: bool = False, **changes: Any) -> tuple[Path, dict, dict]:
    """A folder with config.json and last.ckpt: raw weights, and averaged ones as a nameless list."""
    config = FULL | {"var_min": True}
    raw, ema = (random_tensors(config, np.random.default_rng(seed)) for seed in (0, 1))
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    # The list has their order of registration, adaLN last in each block; a dict of shapes would not.
    inside = ["norm1.weight", "attn_qkv.weight", "attn_out.weight", "norm2.weight", "mlp.0.weight", "mlp.0.bias",
              "mlp.2.weight", "mlp.2.bias", "adaLN_modulation.weight", "adaLN_modulation.bias"]  # fmt: skip
    mlp = [f"sigma_map.mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")]
    output = ["norm_final.weight", "linear.weight", "linear.bias", "adaLN_modulation.weight", "adaLN_modulation.bias"]
    names = ["vocab_embed.embedding", *mlp, *(f"blocks.{i}.{name}" for i in range(2) for name in inside)]
    names += [f"output_layer.{name}" for name in output]
    state = {name.replace("backbone.", "backbone._orig_mod.") if compiled else name: v for name, v in raw.items()}
    content = {
        "epoch": 3, "global_step": 1000, "state_dict": state, "loops": {"fit_loop": {"state_dict": {}}},
        "ema": {"decay": 0.9999, "num_updates": 7, "shadow_params": [ema["backbone." + name] for name in names]},
        "optimizer_states": [{"state": {0: {"step": 5.0}}}],
    }  # fmt: skip
    content |= changes
    save({name: value for name, value in content.items() if value is not None}, folder / "last.ckpt")
    return folder, raw, ema


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_a_lightning_checkpoint(weights, compiled, save, tmp_path):
    folder, raw, ema = lightning(tmp_path, save, compiled)
    expected = load_pretrained(str(write_checkpoint(tmp_path / "same", FULL, ema if weights == "ema" else raw)))
    loaded = load_pretrained(str(folder / "last.ckpt"), weights=weights)
    assert loaded.architecture == expected.architecture
    tokens = np.arange(16)[None]
    np.testing.assert_array_equal(loaded.apply(tokens), expected.apply(tokens))


def test_a_folder_with_one_ckpt_and_no_average(save, tmp_path):
    folder, raw, _ = lightning(tmp_path, save, ema=None)
    loaded = load_pretrained(str(folder))
    np.testing.assert_array_equal(loaded.params["embedding"], raw["backbone.vocab_embed.embedding"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state_dict": None}, "last.ckpt is no Lightning checkpoint: it holds no 'state_dict'"),
        ({"ema": {"shadow_params": []}}, "ema.shadow_params holds 0 tensors, the model 30 tensors"),
        ({"ema": {}}, "ema.shadow_params holds no list"),
        ({"ema": {"shadow_params": [np.zeros(3, np.float32)] * 30}}, r"has shape \(3,\), expected"),
        ({"ema": {"shadow_params": [1.0] * 30}}, "entries that are no floating-point tensors: "),
        ({"state_dict": {"backbone.vocab_embed.embedding": np.arange(3)}, "ema": None}, "no floating-point tensors"),
    ],
)
def test_a_damaged_lightning_checkpoint(changes, message, save, tmp_path):
    folder, *_ = lightning(tmp_path, save, **changes)
    with pytest.raises(UserError, match=message):
        load_pretrained(str(folder))


def test_published_weights_are_the_averaged_ones():
    with pytest.raises(UserError, match=r"model.safetensors holds one set of weights, .* allowed: weights = ema"):
        load_pretrained(str(GOLDEN / "mdlm"), weights="raw")
    with pytest.raises(UserError, match="weights is 'swa'; allowed: ema, raw"):
        load_pretrained(str(GOLDEN / "mdlm"), weights="swa")
