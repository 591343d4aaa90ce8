"""Lengths of documents, against the documents themselves."""

import json
import statistics
from pathlib import Path

from bd3_jax.data.tokenizers import load_tokenizer


def test_lengths_of_the_training_set(script, tiny_config):
    config, lengths = tiny_config("ar"), script("lengths")
    tokenizer = load_tokenizer(config.data.tokenizer)
    lines = (Path(config.data.source) / "train" / "documents.jsonl").read_text().splitlines()
    wanted = [len(tokenizer.encode(json.loads(line)["text"])) for line in lines]
    found = lengths.figures(lengths.of_training_set(config))
    # The last row is dropped, and the last document with it.
    assert found["lengths"] == wanted[: len(found["lengths"])]
    assert len(found["lengths"]) >= len(wanted) - 1
    assert found["median"] == statistics.median(found["lengths"])
    assert found["maximum"] == max(found["lengths"])
