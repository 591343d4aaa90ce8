"""Run by test_programs.py with 2 devices: lowers every program for a TPU, prints how many kernels each has, as JSON."""

import itertools
import json

import jax

from bd3_jax.compiling import programs
from bd3_jax.config_dict import from_config_dict
from bd3_jax.configs import base

OBJECTIVES, MODES = ("ar", "mdlm", "sedd", "bd3lm,block_size=4"), ("train", "eval", "sample")


def kernels(objective: str, mode: str, tensor: int, heads: int) -> int:
    config = base.get_config(objective)
    config.model.update(length=128, width=64 * heads, num_layers=2, num_heads=heads, cond_dim=8)
    config.data.tokenizer = "bytes"
    config.mesh.tensor = tensor
    config.training.batch_size = config.eval.batch_size = config.sampling.batch_size = 4
    config.sampling.update(max_length=128, num_steps=4)
    program = programs.trace(from_config_dict(config), mode, jax.devices(), "tpu", 0)
    text = program.traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "bf16" in text
    return text.count("tpu_custom_call")


def main() -> None:
    found = {f"{o.split(',')[0]} {mode}": kernels(o, mode, 1, 2) for o, mode in itertools.product(OBJECTIVES, MODES)}
    # One head for two devices: it stays whole.
    found["undivided"] = kernels("bd3lm,block_size=4", "train", 2, 1)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
