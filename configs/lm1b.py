"""The One Billion Words benchmark in rows of 128 tokens (bert-base-uncased): tables 1 to 3 and 8 of the paper.

bd3 prepare --config=configs/lm1b.py:mdlm
bd3 train --config=configs/lm1b.py:mdlm --workdir=gs://BUCKET/lm1b-mdlm
bd3 train --config=configs/lm1b.py:bd3lm,block_size=128 --workdir=gs://BUCKET/lm1b-pretrain
bd3 train --config=configs/lm1b.py:bd3lm,block_size=4 --workdir=gs://BUCKET/lm1b-4 --config.init_from=gs://BUCKET/lm1b-pretrain
bd3 eval --workdir=gs://BUCKET/lm1b-4 --config.eval.split=test

A BD3-LM begins as one block of 128 (850 K steps), and goes on for 150 K steps with blocks of 4, 8 or 16, searching the
interval of its noise. Everything else trains for 1 M steps of 512 rows: 65 B tokens.

| string | test perplexity published | parameters | FLOPs per token | v5e chip-hours |
| --- | --- | --- | --- | --- |
| ar | 22.83 | 131.9 M | 0.66 G | 152 |
| mdlm | 31.78 | 139.3 M | 0.59 G | 137 |
| sedd | 32.68 | 139.3 M | 0.59 G | 137 |
| bd3lm,block_size=128 | - | 139.3 M | 0.59 G | 117 |
| bd3lm,block_size=16 | 30.60 | 139.3 M | 1.07 G | 37 |
| bd3lm,block_size=8 | 29.83 | 139.3 M | 1.07 G | 37 |
| bd3lm,block_size=4 | 28.23 | 139.3 M | 1.07 G | 37 |

Of a BD3-LM the table has the two parts of its training apart. With its beginning as one block it takes
117 + 37 = 154 chip-hours.

FLOPs and hours are computed, not measured: the products that the loss depends on (the output layer's at the half of the
tokens that is masked), at 40 % of the chips' peak; on v5e-16 divide the hours by 16. Published are diffusion models'
upper bounds. Each string is compiled for `TOPOLOGY`, as for any other machine, without having it:

bd3 compile --config=configs/lm1b.py:bd3lm,block_size=4 --topology=v5e:4x4

Rows are as in the paper: BOS (which is [CLS], as EOS is) before and after 126 tokens, and after every sentence. Without
injection: --config.data.insert_special=False --config.data.insert_eos=False and a --config.data.directory of its own.
"""

from ml_collections import ConfigDict

from bd3_jax.configs import base

# What experiments/compile_report.py compiles every string of the table for, with its 512 rows: a v5litepod-16.
TOPOLOGY = "v5e:4x4"


def get_config(string: str = "bd3lm,block_size=4") -> ConfigDict:
    config = base.get_config(string)
    config.model.length = 128
    config.data.update(
        corpus="lm1b", tokenizer="bert-base-uncased", directory="data/lm1b", insert_special=True, insert_eos=True
    )
    # The corpus has no split for validation; the paper's validations during training read the test set too.
    config.eval.split = "test"
    config.sampling.update(max_length=128, num_steps=128)
    base.set_recipe(config)
    config.training.keep_best = 0  # the test set is there to measure, not to choose
    return config
