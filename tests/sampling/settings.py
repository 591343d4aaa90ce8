"""Settings and samplers of toy models."""

import dataclasses

from bd3_jax.config_dict import from_config_dict
from configs import base

GREEDY = 1e-6
"""A nucleus of the most probable token alone."""


def sampling_config(objective, **fields):
    config = base.get_config(f"{objective},block_size=4" if objective == "bd3lm" else objective)
    config.model.length = 12
    config.sampling.update(max_length=12, num_steps=7, nucleus=0.9)
    config.sampling.update(fields)
    return from_config_dict(config).sampling


def change(sampler, **fields):
    return dataclasses.replace(sampler, config=dataclasses.replace(sampler.config, **fields))
