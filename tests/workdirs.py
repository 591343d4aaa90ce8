"""Workdirs of ours that nobody trained."""

import jax
import numpy as np
from etils import epath

from bd3_jax.checkpoints import orbax, run_folder
from bd3_jax.config import Config
from bd3_jax.data.tokenizers import load_tokenizer
from bd3_jax.language_model import LanguageModel


def write_workdir(config: Config, workdir: epath.Path, step: int, low: float, high: float) -> None:
    """Settings, the tokenizer of bytes, and a checkpoint of fresh weights: the raw ones are twice the averaged ones."""
    tokenizer = load_tokenizer("bytes")
    params = LanguageModel.from_config(config, tokenizer.ids).network.init(jax.random.key(0))
    run_folder.write_config(config, workdir)
    tokenizer.save(workdir / "tokenizer")
    weights = {"ema": params, "params": jax.tree.map(lambda p: 2 * p, params)}
    checkpoints = orbax.Checkpoints(workdir, keep=1)
    checkpoints.save(step, weights | {"low": np.float32(low), "high": np.float32(high)}, {"rows": 0})
    checkpoints.close()
