import jax
import pytest

from bd3_jax.checkpoints import run_folder
from bd3_jax.checkpoints.orbax import Checkpoints
from bd3_jax.data.tokenizers import bytes_tokenizer
from bd3_jax.language_model import LanguageModel
from bd3_jax.sampling.sampler import Sampler
from tests.sampling.settings import sampling_config


@pytest.fixture
def make(toy_lm, attentive_params):
    """A sampler, and parameters with which what is drawn depends on the whole context."""

    def build(objective, block_size=0, num_layers=2, **fields):
        lm = toy_lm(objective, block_size, num_layers=num_layers)
        return Sampler(lm, sampling_config(objective, **fields)), attentive_params(
            lm, output=0.15 if objective == "ar" else 0.4
        )

    return build


@pytest.fixture(scope="session")
def make_run(random_params):
    """Writes a run of one checkpoint, step 5, whose averaged and raw weights differ; its tokenizer is that of bytes."""

    def write(config, workdir):
        lm = LanguageModel.from_config(config, bytes_tokenizer().ids)
        run_folder.write_config(config, workdir)
        bytes_tokenizer().save(workdir / "tokenizer")
        checkpoints = Checkpoints(workdir, keep=1)
        state = {"ema": random_params(lm, seed=1), "params": random_params(lm, seed=2)}
        checkpoints.save(5, jax.tree.map(jax.numpy.asarray, state), {"rows": 0})
        checkpoints.close()

    return write
