"""OpenWebText in rows of 1024 GPT-2 tokens: the paper's models (Block Diffusion, tables 4 to 7).

bd3 prepare --config=configs/owt.py:mdlm
bd3 train --config=configs/owt.py:mdlm --workdir=gs://BUCKET/owt-mdlm
bd3 train --config=configs/owt.py:bd3lm,block_size=1024 --workdir=gs://BUCKET/owt-pretrain
bd3 train --config=configs/owt.py:bd3lm,block_size=4 --workdir=gs://BUCKET/owt-4 --config.init_from=gs://BUCKET/owt-pretrain
bd3 eval --workdir=gs://BUCKET/owt-4
bd3 prepare --config=configs/owt.py:mdlm --config.data.corpus=ptb --config.data.directory=data/zeroshot/ptb \
    --config.data.insert_special=True --config.data.insert_eos=False    # and so on, see bd3_jax/evaluation/suite.py
bd3 eval --workdir=gs://BUCKET/owt-4 --suite=zeroshot

A BD3-LM begins as one block of 1024 (850 K steps), and goes on for 150 K steps with blocks of 4, 8 or 16, searching the
interval of its noise. Everything else trains for 1 M steps of 512 rows: 524 B tokens.

| string | test perplexity published | parameters | FLOPs per token | v5e chip-hours |
| --- | --- | --- | --- | --- |
| ar | 17.54 | 162.2 M | 0.80 G | 1475 |
| mdlm | 22.98 | 169.6 M | 0.74 G | 1365 |
| sedd | 24.10 | 169.6 M | 0.74 G | 1365 |
| bd3lm,block_size=1024 | - | 169.6 M | 0.74 G | 1161 |
| bd3lm,block_size=16 | 22.27 | 169.6 M | 1.21 G | 335 |
| bd3lm,block_size=8 | 21.68 | 169.6 M | 1.21 G | 335 |
| bd3lm,block_size=4 | 20.73 | 169.6 M | 1.21 G | 335 |

Of a BD3-LM the table has the two parts of its training apart. With its beginning as one block it takes
1161 + 335 = 1496 chip-hours.

FLOPs and hours are computed, not measured: the products that the loss depends on (the output layer's at the half of the
tokens that is masked), at 40 % of the chips' peak; on v5e-256 divide the hours by 256. Published are diffusion models'
upper bounds. After the objective, `size=medium` takes the larger network, `size=tiny` a small one. Each string is
compiled for `TOPOLOGY`, as for any other machine, without having it:

bd3 compile --config=configs/owt.py:bd3lm,block_size=4 --topology=v5e:16x16

Rows are as for the paper's BD3-LMs and every published `-noeos` model: EOS after documents, no BOS or EOS around rows.
With injection, as for the paper's other baselines, which count BOS as well: --config.data.insert_special=True
--config.noise.ignore_bos=False and a --config.data.directory of its own. Validations during training, and so the
search, look at the same text without BOS and EOS; `bd3 eval` at the rows as they are, or at those too with
--config.eval.without_special=always.
"""

from ml_collections import ConfigDict

from bd3_jax.configs import base
from bd3_jax.errors import UserError

# What experiments/compile_report.py compiles every string of the table for, with its 512 rows: a v5litepod-256.
TOPOLOGY = "v5e:16x16"
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
    config.eval.without_special = "training"  # as the paper's validations and searches, whatever training reads
    # A row for every chip of `TOPOLOGY`; about as many rows as elsewhere.
    config.eval.update(batch_size=256, num_batches=7)
    config.search.update(batch_size=256, num_batches=7)
    base.set_recipe(config)
    return config
