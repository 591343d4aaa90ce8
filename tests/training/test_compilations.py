"""Nothing is compiled again after its first use: counted over training, validation, saving, resuming, sampling."""

import collections
import dataclasses

import jax
import pytest

from bd3_jax.data.pipeline import train_batches
from bd3_jax.sampling.run import sample
from bd3_jax.training import loop
from bd3_jax.training.loop import train

EVENT = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compiled():
    """Names of the programs that are compiled, or read from the cache of compiled ones, from here on."""
    names = []

    def listen(event, seconds, fun_name="", **kwargs):
        if event == EVENT:
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def at_step(compiled, monkeypatch):
    """How many programs were compiled before the batch of each step was read."""
    counts = {}

    def read(dataset, batch_size, seed, rows, *hosts):
        for step, batch in enumerate(
            train_batches(dataset, batch_size, seed, rows, *hosts), start=rows // batch_size + 1
        ):
            counts[step] = len(compiled)
            yield batch

    monkeypatch.setattr(loop, "train_batches", read)
    return counts


@pytest.mark.parametrize("string", [pytest.param("bd3lm,block_size=4", marks=pytest.mark.slow), "ar"])
def test_nothing_is_compiled_twice(string, tiny_config, tmp_path, compiled, at_step):
    every = {"training.log_every": 1, "training.eval_every": 2, "training.checkpoint_every": 2}
    config = tiny_config(string, **every, **{"training.num_steps": 6, "sampling.num_samples": 3})
    jax.clear_caches()
    train(config, tmp_path)
    counts = collections.Counter(compiled)
    assert counts["jit(update)"] == 1
    assert counts["jit(sum_losses)"] == (1 if string == "ar" else 2)  # one an estimator
    # From step 3 on: two updates, validations, saves and records are done.
    assert compiled[at_step[3] :] == []

    resumed = dataclasses.replace(config, training=dataclasses.replace(config.training, num_steps=12))
    begun = len(compiled)
    train(resumed, tmp_path)
    assert compiled[begun:].count("jit(update)") == 1
    assert compiled[at_step[9] :] == []

    # Batches of 2 and of 1 sample, one program, and none when it is done again.
    sample(config, tmp_path)
    begun = len(compiled)
    sample(config, tmp_path)
    assert compiled[begun:].count("jit(draw_blocks)") == 0
