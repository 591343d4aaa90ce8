"""text8 in rows of 256 characters: 90, 5 and 5 million for training, validation and test.

bd3 prepare --config=configs/text8.py:mdlm
bd3 train --config=configs/text8.py:mdlm --workdir=gs://BUCKET/text8-mdlm
bd3 train --config=configs/text8.py:bd3lm,block_size=256 --workdir=gs://BUCKET/text8-pretrain
bd3 train --config=configs/text8.py:bd3lm,block_size=4 --workdir=gs://BUCKET/text8-4 --config.init_from=gs://BUCKET/text8-pretrain
bd3 eval --workdir=gs://BUCKET/text8-4 --config.eval.split=test

The recipe is that of the other corpora: AdamW 3e-4, 512 rows a step, 1 M steps; a BD3-LM 850 K steps as one block, then
150 K with its own. The paper has no figure for text8; results are told in bits per character, which
`bd3 eval` prints as bits per token.

| string | parameters | FLOPs per token | v5e chip-hours |
| --- | --- | --- | --- |
| ar | 85.1 M | 0.52 G | 242 |
| mdlm | 92.4 M | 0.54 G | 249 |
| sedd | 92.4 M | 0.54 G | 249 |
| bd3lm,block_size=256 | 92.4 M | 0.54 G | 211 |
| bd3lm,block_size=16 | 92.4 M | 1.01 G | 70 |
| bd3lm,block_size=8 | 92.4 M | 1.01 G | 70 |
| bd3lm,block_size=4 | 92.4 M | 1.01 G | 70 |

Of a BD3-LM the table has the two parts of its training apart. With its beginning as one block it takes
211 + 70 = 281 chip-hours.

FLOPs and hours are computed, not measured: the products that the loss depends on (the output layer's at the half of the
tokens that is masked), at 40 % of the chips' peak; on v5e-16 divide the hours by 16. Each string is compiled for
`TOPOLOGY`, as for any other machine, without having it:

bd3 compile --config=configs/text8.py:bd3lm,block_size=4 --topology=v5e:4x4

text8 is one text: no BOS and no EOS. With BOS and EOS around rows: --config.data.insert_special=True and a
--config.data.directory of its own.
"""

from ml_collections import ConfigDict

from bd3_jax.configs import base

# What experiments/compile_report.py compiles every string of the table for, with its 512 rows: a v5litepod-16.
TOPOLOGY = "v5e:4x4"


def get_config(string: str = "bd3lm,block_size=4") -> ConfigDict:
    config = base.get_config(string)
    config.model.update(length=256)
    config.data.update(corpus="text8", tokenizer="text8", directory="data/text8", insert_eos=False)
    config.sampling.update(max_length=256, num_steps=256)
    base.set_recipe(config)
    return config
