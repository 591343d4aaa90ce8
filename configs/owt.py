"""The paper's models of OpenWebText (Block Diffusion, section 6): small, L = 1024, GPT-2's tokens, batch 512.

bd3 train --config=configs/owt.py:bd3lm,block_size=4 --workdir=runs/owt_bd3lm4

The objective is ar, mdlm, sedd or bd3lm; `size=medium` after it takes the larger network. Whether a machine holds it,
without having the machine: bd3 compile --config=configs/owt.py:bd3lm,block_size=4 --topology=v5e:16x16
"""

from ml_collections import ConfigDict

from bd3_jax.configs import base
from bd3_jax.errors import UserError

# Width, layers, heads, width of the time embedding.
SIZES = {"tiny": (256, 8, 8, 64), "small": (768, 12, 12, 128), "medium": (1024, 24, 16, 128)}


def get_config(string: str = "bd3lm,block_size=4") -> ConfigDict:
    options = string.split(",")
    sizes = [option.removeprefix("size=") for option in options if option.startswith("size=")]
    config = base.get_config(",".join(option for option in options if not option.startswith("size=")))
    size = sizes[-1] if sizes else "small"
    if size not in SIZES:
        raise UserError(f"config string {string!r}: found size={size}, allowed: {', '.join(SIZES)}")
    width, layers, heads, cond = SIZES[size]
    config.model.update(width=width, num_layers=layers, num_heads=heads, cond_dim=cond)
    config.data.update(corpus="openwebtext", directory="data/owt", tokenizer="gpt2")
    return config
