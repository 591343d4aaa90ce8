"""The tasks made of held-out documents, through the harness, on a run of two steps."""

import json
import math

import pytest
from etils import epath

from bd3_jax.training.loop import train

pytest.importorskip("lm_eval", reason="the extra eval is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # other people's packages


def test_tasks_of_a_trained_run(script, tiny_config, tmp_path, monkeypatch):
    for name in ("HF_DATASETS_CACHE", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    config = tiny_config("bd3lm,block_size=4", **{"training.num_steps": 2, "training.checkpoint_every": 2})
    train(config, epath.Path(tmp_path / "run"))
    tasks = script("harness_tasks")
    monkeypatch.setattr(tasks, "PASSAGE", 6)
    monkeypatch.setattr(tasks, "CONTINUATION", 2)
    argv = [f"--workdir={tmp_path / 'run'}", f"--tasks={tmp_path / 'tasks'}", "--limit=4", f"--out={tmp_path / 'out'}"]
    tasks.main(argv)
    questions = [json.loads(line) for line in (tmp_path / "tasks" / "bd3_continuation.jsonl").read_text().splitlines()]
    texts = tasks.documents(config.data, config.model.length)
    assert len(texts) == 9  # of ten documents the last one is cut off
    for question, text in zip(questions, texts, strict=True):
        assert f"{question['context']} {question['choices'][question['answer']]}" == " ".join(text.split()[:8])
    cells = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [cell["settings"]["estimator"] for cell in cells] == list(tasks.ESTIMATORS)
    for cell in cells:
        assert cell["figures"]["tasks"]["bd3_continuation"]["acc"] in (0, 0.25, 0.5, 0.75, 1)
        # Hardly trained: about as likely as any other byte.
        assert 0.5 < cell["figures"]["tasks"]["bd3_documents"]["bits_per_byte"] / math.log2(257) < 1.5
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.count("exact, unmasking") == 2
    assert "| chance | 25.0 |" in table
