"""text8 in rows of 256 characters: 90, 5 and 5 million for training, validation and test.

bd3 prepare --config=configs/text8.py:mdlm
bd3 train --config=configs/text8.py:mdlm --workdir=gs://BUCKET/text8-mdlm
bd3 train --config=configs/text8.py:bd3lm,block_size=256 --workdir=gs://BUCKET/text8-pretrain
bd3 train --config=configs/text8.py:bd3lm,block_size=4 --workdir=gs://BUCKET/text8-4 --config.init_from=gs://BUCKET/text8-pretrain
bd3 eval --workdir=gs://BUCKET/text8-4 --config.eval.split=test

The recipe is that of the other corpora: AdamW 3e-4, 512 rows a step, 1 M steps; a BD3-LM 850 K steps as one block, then
150 K with its own. The paper has no figure for text8; results are told in bits per character, which
`bd3 eval` prints as bits per token.

| string | FLOPs per token | v5e chip-hours |
| --- | --- | --- |
| ar | 0.52 G | 242 |
| mdlm | 0.54 G | 249 |
| sedd | 0.54 G | 249 |
| bd3lm,block_size=256 | 0.54 G | 211 |
| bd3lm,block_size=16 | 1.01 G | 70 |
| bd3lm,block_size=8 | 1.01 G | 70 |
| bd3lm,block_size=4 | 1.01 G | 70 |

FLOPs and hours are computed, not measured: the products that the loss depends on (the output layer's at the half of the
tokens that is masked), at 40 % of the chips' peak.

text8 is one text: no BOS and no EOS. With BOS and EOS around rows: --config.data.insert_special=True and a
--config.data.directory of its own.
"""

from ml_collections import ConfigDict

from bd3_jax.configs import base


def get_config(string: str = "bd3lm,block_size=4") -> ConfigDict:
    config = base.get_config(string)
    config.model.update(length=256)
    config.data.update(corpus="text8", tokenizer="text8", directory="data/text8", insert_eos=False)
    config.training.update(keep_every=100_000, keep_best=1)
    config.sampling.update(max_length=256, num_steps=256)
    if config.objective == "bd3lm":
        config.training.num_steps = 850_000
    if config.objective == "bd3lm" and config.block_size < config.model.length:
        config.training.num_steps = 150_000
        config.noise.resample = True
        config.search.enabled = True
    return config
