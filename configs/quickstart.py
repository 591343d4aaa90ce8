"""A small model of English Wikipedia's lead summaries, for a laptop: 2 CPU cores, a few minutes.

bd3 train --config=configs/quickstart.py:bd3lm,block_size=8 --workdir=runs/quickstart
"""

from ml_collections import ConfigDict

from bd3_jax.configs import base


def get_config(string: str = "bd3lm,block_size=8") -> ConfigDict:
    config = base.get_config(string)
    config.model.update(length=128, width=128, num_layers=4, num_heads=4, cond_dim=64)
    # Two epochs leave nothing to overfit to.
    config.model.update(dropout=0.0)
    config.data.update(directory="data/quickstart")
    if config.block_size > 1:
        # Blocks with few or all tokens masked teach little (Block Diffusion, section 5); evaluation covers them all.
        config.noise.update(low=0.3, high=0.8, resample=True)
    # 0.95: in so few steps a slower average of squared gradients keeps what the first ones were like.
    config.optimizer.update(learning_rate=1e-3, beta2=0.95, warmup_steps=100, decay="cosine")
    config.training.update(num_steps=2400, batch_size=8, log_every=50, eval_every=800, checkpoint_every=400)
    config.eval.update(batch_size=32, num_batches=0, both_estimators=False)
    if config.objective != "sedd":
        config.eval.estimator = "low_variance"
    config.sampling.update(num_samples=3, batch_size=3, max_length=128, num_steps=128)
    return config
