"""A small model of English Wikipedia's lead summaries, for a laptop: 2 CPU cores, a few minutes.

bd3 train --config=configs/quickstart.py:bd3lm,block_size=8 --workdir=runs/quickstart
"""

from ml_collections import ConfigDict

from bd3_jax.configs import base


def get_config(string: str = "bd3lm,block_size=8") -> ConfigDict:
    config = base.get_config(string)
    config.model.update(
        length=128, width=256, num_layers=4, num_heads=4, cond_dim=64, attention_chunk=64, scan_unroll=4
    )
    config.data.update(directory="data/quickstart")
    config.optimizer.update(learning_rate=1e-3, warmup_steps=100, decay="cosine")
    config.training.update(num_steps=1000, batch_size=16, log_every=20, eval_every=250, checkpoint_every=250)
    config.eval.update(batch_size=32, num_batches=8)
    config.sampling.update(num_samples=3, batch_size=3, max_length=128, num_steps=128)
    return config
