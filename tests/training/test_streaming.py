"""Training from a stream: an interrupted run continues exactly, but not on another number of hosts."""

import json
import signal

import jax
import numpy as np
import pytest

from bd3_jax import sharding
from bd3_jax.checkpoints.orbax import latest_step, restore_params
from bd3_jax.data import streaming
from bd3_jax.data.streaming import stream_batches
from bd3_jax.errors import UserError
from bd3_jax.evaluation.perplexity import evaluate
from bd3_jax.training.loop import train
from tests.training.runs import records


@pytest.fixture(scope="module")
def run(tiny_config, tmp_path_factory):
    """A run of 6 steps and its settings; it shuffles in windows of 30 rows, of which a step takes 8."""
    patch = pytest.MonkeyPatch()
    patch.setattr(streaming, "WINDOW", 30)
    workdir = tmp_path_factory.mktemp("streamed")
    every = {"training.log_every": 1, "training.eval_every": 3, "training.checkpoint_every": 100}
    config = tiny_config("bd3lm,block_size=4", **every, **{"data.mode": "streaming", "data.directory": "not there"})
    train(config, workdir)
    yield config, workdir
    patch.undo()


@pytest.mark.parametrize("step", [3, 5])
def test_an_interrupted_run_continues_exactly(run, tmp_path, monkeypatch, step):
    config, reference = run
    with monkeypatch.context() as patch:
        patch.setattr(sharding, "global_batch", interrupt_at(step, sharding.global_batch))
        with pytest.raises(SystemExit) as ended:
            train(config, tmp_path)
    assert ended.value.code == 143
    assert latest_step(tmp_path) == step

    train(config, tmp_path)
    assert records(tmp_path) == records(reference)
    for weights in ("ema", "raw"):
        (ours, _), (theirs, _) = (restore_params(config, workdir, weights) for workdir in (tmp_path, reference))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def interrupt_at(step, function):
    """A function that is called once a step, with a signal to this process in the given one."""
    calls = iter(range(1, 100))

    def call(*args):
        if next(calls) == step:
            signal.raise_signal(signal.SIGTERM)
        return function(*args)

    return call


def test_another_number_of_hosts_is_refused(run, tiny_config, tmp_path):
    """The position of two hosts stands in the checkpoint; this is one."""
    _, workdir = run
    position = next((workdir / "checkpoints" / "6" / "position").iterdir())
    original = position.read_text()
    assert json.loads(original)["hosts"] == 1
    position.write_text(json.dumps(json.loads(original) | {"hosts": 2}))
    more = tiny_config("bd3lm,block_size=4", **{"data.mode": "streaming", "training.num_steps": 7})
    with pytest.raises(UserError, match=r"saved by 2 hosts, each with its own place in the stream, but there are 1;"):
        train(more, workdir)
    position.write_text(original)


def test_a_run_cannot_change_its_mode(run, tiny_config, tmp_path):
    _, workdir = run
    with pytest.raises(UserError, match=r"no manifest\.json, for it was not trained on prepared rows: it can be eval"):
        train(tiny_config("bd3lm,block_size=4", **{"training.num_steps": 7}), workdir)
    (tmp_path / "checkpoints" / "6").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("bd3lm,block_size=4").to_dict()))
    with pytest.raises(UserError, match=r"config\.data\.mode is 'streaming', but .* has 'prepared'"):
        train(tiny_config("bd3lm,block_size=4", **{"data.mode": "streaming"}), tmp_path)


def test_evaluation_reads_the_whole_split_in_order(run, tiny_config, tmp_path):
    """And so gives the same figures as on prepared rows."""
    config, workdir = run
    streamed = evaluate(config, workdir)
    prepared = evaluate(tiny_config("bd3lm,block_size=4"), workdir)
    assert streamed == prepared
    assert streamed["eval/sequences"] > 16


def test_the_checkpoint_holds_the_position_of_the_last_batch_used(run):
    """Not of one that was read ahead."""
    config, workdir = run
    state = json.loads((workdir / "checkpoints" / "6" / "stream" / "process_0-of-1.json").read_text())
    stream = streaming.open_stream(config.data, config.model.length, "train")
    used = stream_batches(stream, config.training.batch_size, config.seed, 0, 1)
    for _ in range(6):
        next(used)
    assert used.get_state() == state
    used.close()
