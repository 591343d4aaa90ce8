"""`bd3 sample` in two real processes on loopback, against one."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from bd3_jax.sampling.run import sample

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "launch"))
from local import start

pytestmark = pytest.mark.slow

PROMPT = "redblue"


def in_order(path):
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    assert [sample["index"] for sample in samples] == list(range(len(samples)))
    return [sample["tokens"] for sample in samples]


@pytest.mark.parametrize("flags", [[], ["--config.mesh.fsdp=2", "--trace", "--watch"]], ids=["data", "fsdp"])
def test_two_processes_draw_the_samples_of_one(tiny_config, make_run, tmp_path, flags):
    """With a prompt that is read at once, and a last batch that is not full."""
    config = tiny_config("bd3lm,block_size=4", **{"sampling.prompt": PROMPT, "sampling.num_samples": 5})
    make_run(config, tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    expected = [each["tokens"] for each in sample(config, tmp_path / "one")]
    outputs = [tmp_path / "first", tmp_path / "second"]
    with outputs[0].open("w") as first, outputs[1].open("w") as second:
        workdir = f"--workdir={tmp_path / 'two'}"
        processes = start(2, [workdir, "--heartbeat_timeout=600", *flags], [first, second], "sample")
        assert [process.wait() for process in processes] == [0, 0], outputs[0].read_text()
    assert in_order(tmp_path / "two" / "samples.jsonl") == expected
    assert not (tmp_path / "two" / "samples-1.jsonl").exists()
    assert "5 samples in" in outputs[0].read_text()
    assert "samples in" not in outputs[1].read_text()
    assert (tmp_path / "two" / "trace.html").exists() == ("--trace" in flags)
