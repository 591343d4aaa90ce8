"""Damaged, contradictory and hostile checkpoints: one line that says what is wrong; nothing in them is executed."""

import json
import os
import pickle
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from bd3_jax.errors import UserError
from bd3_jax.pretrained import load_pretrained
from tests.reference import config_json, random_tensors, write_checkpoint

NORM, QKV = "backbone.blocks.1.norm1.weight", "backbone.blocks.0.attn_qkv.weight"
EMBEDDING = "backbone.vocab_embed.embedding"
IDS = {"bos_token_id": 0, "eos_token_id": 1, "mask_token_id": 10}


@pytest.fixture
def checkpoint(tmp_path):
    """A folder of the authors' layout, its settings and tensors."""
    config = config_json("bd3lm", block_size=4, vocab_size=11, length=8, width=16, layers=2, heads=2, cond=4)
    tensors = random_tensors(config, np.random.default_rng(0))
    return write_checkpoint(tmp_path / "model", config, tensors), config, tensors


def rewrite(change):
    """Damages the tensors before they are written."""

    def apply(folder, config, tensors):
        tensors = dict(tensors)
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def setting(**changes):
    """Replaces keys of config.json; None takes one out."""

    def apply(folder, config, tensors):
        content = {key: value for key, value in (config | changes).items() if value is not None}
        (folder / "config.json").write_text(json.dumps(content))

    return apply


def content(name, data):
    return lambda folder, config, tensors: (folder / name).write_bytes(data)


def truncate(keep):
    """Keeps a fraction of the file of tensors."""

    def apply(folder, config, tensors):
        file = folder / "model.safetensors"
        data = file.read_bytes()
        file.write_bytes(data[: int(len(data) * keep)])

    return apply


def header(change):
    """Replaces the JSON header of the file of tensors."""

    def apply(folder, config, tensors):
        file = folder / "model.safetensors"
        data = file.read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        new = change(data[8 : 8 + size])
        file.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + size :])

    return apply


def claim(name, **entry):
    """Lets the header say something else of a tensor."""

    def change(text):
        parsed = json.loads(text)
        parsed[name] |= entry
        return json.dumps(parsed).encode()

    return header(change)


def only(name):
    """Leaves one file in the folder."""

    def apply(folder, config, tensors):
        for file in list(folder.iterdir()):
            if file.name != name:
                file.unlink()

    return apply


def nan(tensors):
    tensors[QKV] = np.where(np.arange(tensors[QKV].size).reshape(tensors[QKV].shape) == 5, np.nan, tensors[QKV])


def drop(tensors):
    del tensors[NORM]
    del tensors[EMBEDDING]


DAMAGES = {
    # what is done, what the error must say
    "truncated tensors": (truncate(0.7), "model.safetensors is no readable safetensors file"),
    "truncated header": (truncate(0.01), "model.safetensors is no readable safetensors file"),
    "empty file": (content("model.safetensors", b""), "model.safetensors is no readable safetensors file"),
    "text in place of tensors": (content("model.safetensors", b"x" * 1000), "is no readable safetensors file"),
    "endless header": (content("model.safetensors", b"\xff" * 8 + b"{}"), "is no readable safetensors file"),
    "header that is no JSON": (header(lambda text: text[:-2]), "is no readable safetensors file"),
    "tensors that overlap": (claim(NORM, data_offsets=[0, 64]), "is no readable safetensors file"),
    "a shape beyond the data": (claim(NORM, shape=[2**40]), "is no readable safetensors file"),
    "an unknown dtype": (claim(NORM, dtype="F33"), "is no readable safetensors file"),
    "integers": (
        rewrite(lambda t: t.update({NORM: np.ones(16, np.int32)})),
        rf"holds tensors that are not F16, BF16, F32, F64: {NORM} \(16,\) of I32",
    ),
    "complex numbers": (rewrite(lambda t: t.update({NORM: np.ones(16, np.complex64)})), rf"{NORM} \(16,\) of C64"),
    "missing tensors": (
        rewrite(drop),
        r"missing vocab_embed.embedding \(11, 16\); missing blocks.1.norm1.weight \(16,\)",
    ),
    "no tensors at all": (rewrite(dict.clear), "n_blocks is 2, but there are 0 tensors"),
    "unexpected tensors": (
        rewrite(lambda t: t.update({"backbone.extra.weight": np.ones((3, 4), np.float32)})),
        r"unexpected extra.weight \(3, 4\)",
    ),
    "a layer too many": (
        rewrite(lambda t: t.update({"backbone.blocks.2.norm1.weight": t[NORM]})),
        r"unexpected blocks.2.norm1.weight \(16,\)",
    ),
    "the same tensor twice": (
        rewrite(lambda t: t.update({NORM.removeprefix("backbone."): t[NORM]})),
        "blocks.1.norm1.weight stands with and without the prefix backbone",
    ),
    "a transposed tensor": (
        rewrite(lambda t: t.update({QKV: np.ascontiguousarray(t[QKV].T)})),
        r"blocks.0.attn_qkv.weight has shape \(16, 48\), expected \(48, 16\)",
    ),
    "nan": (rewrite(nan), r"blocks.0.attn_qkv.weight \(48, 16\) holds values that are not finite"),
    "infinity": (
        rewrite(lambda t: t.update({NORM: np.full(16, np.inf, np.float32)})),
        r"blocks.1.norm1.weight \(16,\) holds values that are not finite",
    ),
    "float64 beyond float32": (rewrite(lambda t: t.update({NORM: np.full(16, 1e300)})), "not finite"),
    "nan as an interval": (
        rewrite(lambda t: t.update(sampling_eps_min=np.array(np.nan, np.float32))),
        "sampling_eps_min, sampling_eps_max are nan, 1.0; expected 0 < min <= max <= 1",
    ),
    "a list as an interval": (
        rewrite(lambda t: t.update(sampling_eps_max=np.ones(2, np.float32))),
        r"sampling_eps_max has shape \(2,\), expected a scalar",
    ),
    "an interval upside down": (
        rewrite(lambda t: t.update(sampling_eps_min=np.float32(0.9)[...], sampling_eps_max=np.float32(0.5)[...])),
        "sampling_eps_min, sampling_eps_max are 0.9, 0.5",
    ),
    "no config": (only("model.safetensors"), "config.json does not exist"),
    "no tensors file": (
        only("config.json"),
        "must hold model.safetensors, or one .safetensors or .ckpt file; found none",
    ),
    "config that is no JSON": (content("config.json", b"{"), "config.json cannot be read as JSON"),
    "config that is no text": (content("config.json", b"\xff\xfe\x00"), "config.json cannot be read as JSON"),
    "config without end": (content("config.json", b"[" * 100_000), "config.json cannot be read as JSON"),
    "config that is a list": (content("config.json", b"[1]"), "must hold an object of settings, found list"),
    "no hidden_dim": (setting(hidden_dim=None), "hidden_dim is missing; expected a value of type int"),
    "no block_size": (setting(block_size=None), "block_size is missing"),
    "n_blocks as text": (setting(n_blocks="2"), "n_blocks is '2'; expected a value of type int"),
    "cross_attn as a number": (setting(cross_attn=1), "cross_attn is 1; expected a value of type bool"),
    "vocab_size as a float": (setting(vocab_size=11.0), "vocab_size is 11.0"),
    "a width of nothing": (setting(hidden_dim=0), "config.model.width is 0"),
    "heads that do not divide": (setting(n_heads=3), "config.model.num_heads is 3; allowed: a divisor"),
    "a block that does not divide": (setting(block_size=3), "config.block_size is 3; allowed: a divisor"),
    "a negative block": (setting(block_size=-4), "config.block_size is -4"),
    "a billion layers": (setting(n_blocks=10**9), "n_blocks is 1000000000, but there are"),
    "a vocabulary beyond memory": (setting(vocab_size=10**12), r"has shape \(11, 16\), expected \(1000000000000, 16\)"),
    "a mask beyond the vocabulary": (setting(**IDS | {"mask_token_id": 11}), "are 0, 1, 11; expected ids from 0 to 10"),
    "a negative BOS": (setting(**IDS | {"bos_token_id": -1}), "bos_token_id, .* are -1, 1, 10; expected ids from 0"),
    "a mask that is EOS": (
        setting(**IDS | {"mask_token_id": 1}),
        "are 0, 1, 1; expected ids from 0 to 10, and the mas",
    ),
    "a mask without EOS": (
        setting(**IDS | {"eos_token_id": None}),
        "eos_token_id is missing; expected a value of type",
    ),
    "a mask as text": (setting(**IDS | {"mask_token_id": "[MASK]"}), r"mask_token_id is '\[MASK\]'; expected a value"),
    "no vocabulary": (setting(vocab_size=0), "vocab_size is 0; expected 2 or more"),
    "causal with adaLN": (setting(causal=True, cross_attn=False), "causal, adaln, cross_attn are True, True, False"),
    "causal with two streams": (setting(causal=True, adaln=False), "causal, adaln, cross_attn are True, False, True"),
    "neither causal nor adaLN": (setting(adaln=False), "causal, adaln, cross_attn are False, False, True"),
    "an adaLN that the config denies": (
        setting(adaln=False, causal=True, cross_attn=False),
        r"unexpected sigma_map.mlp.0.weight \(4, 256\)",
    ),
    "dropout above 1": (setting(dropout=1.5), "config.model.dropout is 1.5"),
    "an infinite dropout": (setting(dropout=float("inf")), "dropout"),
    "a uniform SEDD": (setting(model={}, graph={"type": "uniform"}), "graph.type is 'uniform'"),
    "a SEDD without sizes": (setting(model={"length": 8}, tokens=10), "model: hidden_size is missing"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(name, checkpoint):
    folder, config, tensors = checkpoint
    damage, message = DAMAGES[name]
    damage(folder, config, tensors)
    with pytest.raises(UserError, match=message) as caught:
        load_pretrained(str(folder))
    assert len(str(caught.value).splitlines()) == 1


def test_there_are_enough_of_them():
    assert len(DAMAGES) >= 20


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floats_are_read(dtype, checkpoint):
    folder, _, tensors = checkpoint
    save_file({name: value.astype(dtype) for name, value in tensors.items()}, folder / "model.safetensors")
    loaded = load_pretrained(str(folder))
    expected = tensors[EMBEDDING].astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(loaded.params["embedding"], expected)


class Bomb:
    """Pickled, it makes a folder as soon as it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_bomb(file: Path, form: str, target: Path) -> None:
    saved = {"state_dict": {"backbone.vocab_embed.embedding": Bomb(target)}}
    if form == "pickle":
        file.write_bytes(pickle.dumps(saved, protocol=2))
        return
    torch = pytest.importorskip("torch")
    torch.save(saved, file, _use_new_zipfile_serialization=form == "zip")


@pytest.mark.parametrize("form", ["pickle", "zip", "legacy"])
def test_a_pickled_bomb_is_refused(form, checkpoint, tmp_path):
    folder, *_ = checkpoint
    (folder / "model.safetensors").unlink()
    write_bomb(folder / "model.ckpt", form, tmp_path / "executed")
    with pytest.raises(UserError, match=r"\.ckpt") as caught:
        load_pretrained(str(folder))
    assert not (tmp_path / "executed").exists()
    said = str(caught.value)
    assert "no .ckpt of tensors alone" in said or "needs PyTorch: pip install 'bd3_jax[torch]'" in said


def test_the_bomb_would_go_off(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


def test_without_pytorch_the_extra_is_named(checkpoint, monkeypatch):
    folder, *_ = checkpoint
    (folder / "model.safetensors").rename(folder / "model.ckpt")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(UserError, match=r"model.ckpt: reading a .ckpt needs PyTorch: pip install 'bd3_jax\[torch\]'"):
        load_pretrained(str(folder / "model.ckpt"))


@pytest.mark.parametrize("names", [["a.safetensors", "b.safetensors"], ["a.safetensors", "b.ckpt"]])
def test_one_file_must_be_the_model(names, checkpoint):
    folder, *_ = checkpoint
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    for name in names:
        (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=f"found {names[0]}, {names[1]}"):
        load_pretrained(str(folder))
    assert load_pretrained(str(folder / "a.safetensors")).block_size == 4


def test_a_file_of_another_kind(checkpoint):
    folder, *_ = checkpoint
    with pytest.raises(UserError, match=r"config.json is neither .safetensors nor .ckpt"):
        load_pretrained(str(folder / "config.json"))
