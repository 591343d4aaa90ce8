"""Fixtures shared by all tests: the authors' golden numbers and small models."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file

from bd3_jax.checkpoints.pytorch import from_tensors
from bd3_jax.config import Config, ModelConfig, NoiseConfig
from bd3_jax.config_dict import from_config_dict
from bd3_jax.configs import base
from bd3_jax.data.prepare import prepare
from bd3_jax.data.tokenizers import Tokenizer
from bd3_jax.language_model import LanguageModel
from bd3_jax.models.network import Network
from bd3_jax.special_ids import SpecialIds

GOLDEN = Path(__file__).parent / "golden"

# What one test has compiled, no other compiles again, whatever its process and whatever the run of the suite.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".pytest_cache" / "compiled")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])


def assert_agree(ours: Any, reference: np.ndarray) -> None:
    """Float32 agreement with the authors' implementation, as tests/golden/README.md defines it."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    impossible = reference < -1e5
    np.testing.assert_array_equal(ours < -1e5, impossible)
    np.testing.assert_allclose(ours[~impossible], reference[~impossible], rtol=1e-5, atol=2e-5)


@dataclasses.dataclass(frozen=True)
class Golden:
    """A folder of tests/golden: the authors' model as ours, and the arrays of `io.npz`."""

    lm: LanguageModel
    params: Any
    arrays: dict[str, np.ndarray]
    tensors: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def agree(self, ours: Any, name: str) -> None:
        """Asserts that `ours` agrees with the array called `name`."""
        assert_agree(ours, self[name])


@pytest.fixture(scope="session")
def golden() -> Callable[..., Golden]:
    """Opens a folder of tests/golden by its name; keywords replace fields of its ModelConfig."""

    def load(name: str, **model: Any) -> Golden:
        config = json.loads((GOLDEN / name / "config.json").read_text())
        objective = name.split("_")[0]
        settings = ModelConfig(
            length=config["model_length"],
            width=config["hidden_dim"],
            num_layers=config["n_blocks"],
            num_heads=config["n_heads"],
            cond_dim=config["cond_dim"],
            dropout=config["dropout"],
            dtype="float32",
            attention="auto",
            attention_chunk=256,
            scan_unroll=1,
            remat="none",
            max_logits=0,
        )
        scaled = name.endswith("loss_scale")
        noise = NoiseConfig(
            "scaled_loglinear" if scaled else "loglinear", 1e-3, 1.0, resample=False, ignore_bos=not scaled
        )
        vocab_size = config["vocab_size"]
        ids = SpecialIds(bos=0, eos=0, mask=vocab_size - 1, vocab_size=vocab_size)
        network = Network(
            dataclasses.replace(settings, **model), vocab_size, config["adaln"], config["time_conditioning"]
        )
        lm = LanguageModel(objective, config["block_size"], noise, network, ids)
        tensors = load_file(GOLDEN / name / "model.safetensors")
        with np.load(GOLDEN / name / "io.npz") as arrays:
            return Golden(lm, from_tensors(tensors, network.abstract_params()), dict(arrays), tensors)

    return load


@pytest.fixture(scope="session")
def toy_lm() -> Callable[..., LanguageModel]:
    """Makes a small float32 model of an objective; keywords replace settings by their name."""

    def build(objective: str, block_size: int = 0, vocab_size: int = 11, **settings: Any) -> LanguageModel:
        model = dict(
            length=12, width=16, num_layers=2, num_heads=2, cond_dim=8, dropout=0.1,
            dtype="float32", attention="auto", attention_chunk=5, scan_unroll=1, remat="none", max_logits=0,
        )  # fmt: skip
        noise = dict(schedule="loglinear", low=1e-3, high=1.0, resample=False, ignore_bos=True)
        for group in (model, noise):
            group.update({name: settings.pop(name) for name in list(settings) if name in group})
        assert not settings, f"unknown settings {settings}"
        if not block_size:
            block_size = 1 if objective == "ar" else model["length"]
        ids = SpecialIds(bos=0, eos=0, mask=vocab_size - 1, vocab_size=vocab_size)
        network = Network(
            ModelConfig(**model), vocab_size, adaln=objective != "ar", time_conditioned=objective == "sedd"
        )
        return LanguageModel(objective, block_size, NoiseConfig(**noise), network, ids)

    return build


@pytest.fixture(scope="session")
def random_params() -> Callable[..., Any]:
    """Draws parameters without the zero matrices of a fresh initialisation, so that every part of a model matters."""

    def draw(lm: LanguageModel, seed: int = 0, scale: float = 0.3) -> Any:
        rng = np.random.default_rng(seed)
        abstract = lm.network.abstract_params()
        return jax.tree.map(lambda leaf: (rng.normal(size=leaf.shape) * scale).astype(np.float32), abstract)

    return draw


@pytest.fixture(scope="session")
def attentive_params(random_params: Callable[..., Any]) -> Callable[..., Any]:
    """Draws parameters with which a model depends on all that it sees; the larger its output layer, the surer it is."""

    def draw(lm: LanguageModel, output: float, seed: int = 0) -> Any:
        params = random_params(lm, seed, scale=1.5)
        # Nothing that is the same in every context.
        params["output"] = {"kernel": output * params["output"]["kernel"], "bias": 0 * params["output"]["bias"]}
        if "final_modulation" in params:
            params["final_modulation"] = jax.tree.map(np.zeros_like, params["final_modulation"])
        return params

    return draw


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    """Settings of a model that trains in seconds, data prepared; takes a config string and fields by dotted name."""
    source, rows = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("data") / "rows"
    rng = np.random.default_rng(0)
    for split, count in (("train", 90), ("validation", 10)):
        (source / split).mkdir()
        texts = [" ".join(rng.choice(["red", "blue", "cat", "dog"], 40)) for _ in range(count)]
        (source / split / "documents.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))

    def build(string: str, **overrides: Any) -> Config:
        config = base.get_config(string)
        config.model.update(length=16, width=32, num_layers=2, num_heads=2, cond_dim=8, dtype="float32")
        config.data.update(corpus="files", source=str(source), directory=str(rows), tokenizer="bytes")
        config.optimizer.update(warmup_steps=4, learning_rate=1e-3)
        config.training.update(num_steps=6, batch_size=8, log_every=1, eval_every=4, checkpoint_every=4)
        config.eval.update(batch_size=8, num_batches=2)
        config.sampling.update(num_samples=2, batch_size=2, max_length=16, num_steps=4)
        config.update_from_flattened_dict(overrides)
        return from_config_dict(config)

    prepare(build("ar").data, build("ar").model.length)
    return build


@pytest.fixture(scope="session")
def word_pieces() -> Tokenizer:
    """BERT's kind of tokenizer, with a few words: [CLS] 0, [MASK] 1, red 3, walk 4, ##ing 5, . 6, cat 7."""
    words = ["[CLS]", "[MASK]", "[UNK]", "red", "walk", "##ing", ".", "cat"]
    model = tokenizers.models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.add_special_tokens(words[:3])
    return Tokenizer(tokenizer.to_str(), "word pieces")


@pytest.fixture
def files_in() -> Callable[[Path], dict[str, str]]:
    """Name and sha256 of every file in a folder."""

    def files(folder: Path) -> dict[str, str]:
        found = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}

    return files
