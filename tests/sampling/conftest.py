import pytest

from bd3_jax.sampling.sampler import Sampler
from tests.sampling.settings import sampling_config


@pytest.fixture
def make(toy_lm, random_params):
    def build(objective, block_size=0, num_layers=2, **fields):
        lm = toy_lm(objective, block_size, num_layers=num_layers)
        return Sampler(lm, sampling_config(objective, **fields)), random_params(lm)

    return build
