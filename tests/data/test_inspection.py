import collections
import dataclasses
import json
import random
import statistics

import pytest

from bd3_jax.data.corpora import split_by_hash
from bd3_jax.data.inspection import describe_lengths, inspect, median
from bd3_jax.data.manifest import load_lengths
from bd3_jax.data.pipeline import open_dataset
from bd3_jax.data.prepare import prepare
from bd3_jax.errors import UserError


@pytest.mark.parametrize("size", range(1, 12))
def test_median_is_that_of_all_documents(size):
    draw = random.Random(size)
    lengths = [draw.randrange(6) for _ in range(size)]
    assert median(collections.Counter(lengths)) == statistics.median(lengths)


def test_histogram():
    assert describe_lengths("train", collections.Counter({0: 1, 1: 2, 2: 1, 3: 3, 9: 1})) == [
        "train: tokens per document without EOS: median 2.5, mean 2.8, maximum 9",
        "                 0 to 0           1  ##########",
        "                 1 to 1           2  ####################",
        "                 2 to 3           4  ########################################",
        "                 4 to 7           0",
        "                8 to 15           1  ##########",
    ]
    assert describe_lengths("test", collections.Counter()) == ["test: no documents"]


def test_what_is_shown(data, documents, monkeypatch, tmp_path):
    data = dataclasses.replace(data, tokenizer="bytes", insert_special=True)
    manifest = prepare(data, 20)
    shown = inspect(data.directory)
    assert manifest.describe() in shown
    assert manifest.fingerprint in shown
    train = [len(text.encode()) for text in documents if split_by_hash(text) == "train"]
    assert load_lengths(open_dataset(data, 20, "train").directory)["train"] == collections.Counter(train)
    assert f"median {statistics.median(train):g}, mean {statistics.mean(train):.1f}, maximum {max(train)}\n" in shown
    assert f"row 0 of train: '<|endoftext|>{documents[0][:5]}" in shown
    assert "row 1 of validation: '<|endoftext|>" in shown


def test_errors(data, tmp_path):
    with pytest.raises(UserError, match="nothing is prepared in 'nowhere'; allowed: a folder that bd3 prepare wrote"):
        inspect("nowhere")
    prepare(data, 16)
    (tmp_path / "rows" / "lengths.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match=r"lengths\.json is damaged"):
        inspect(tmp_path / "rows")
