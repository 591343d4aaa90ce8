"""Streaming: rows as prepared ones, a position that is restored exactly, and what is refused."""

import dataclasses
import json

import grain
import numpy as np
import pytest

from bd3_jax.data import rows, streaming
from bd3_jax.data.pipeline import count_batches, eval_batches, open_data, open_dataset
from bd3_jax.data.prepare import prepare
from bd3_jax.data.streaming import open_stream, stream_batches
from bd3_jax.errors import UserError

LENGTH = 16


@pytest.fixture
def data(three_files, monkeypatch):
    """Three shards, tokenised a few documents at a time, shuffled in windows of 100 rows."""
    monkeypatch.setattr(streaming, "BATCH_CHARACTERS", 300)
    monkeypatch.setattr(streaming, "WINDOW", 100)
    return dataclasses.replace(three_files, mode="streaming", tokenizer="bytes")


def take(iterator, count):
    return np.stack([next(iterator) for _ in range(count)])


def prepared_rows(data, split="train"):
    """Rows of each shard, as `bd3 prepare` writes them."""
    prepare(data, LENGTH)
    dataset = open_dataset(data, LENGTH, split)
    return dataset.read(range(len(dataset)))


@pytest.mark.parametrize("insert_eos", [True, False])
@pytest.mark.parametrize("insert_special", [True, False])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_rows_are_the_prepared_ones(data, split, insert_special, insert_eos):
    data = dataclasses.replace(data, insert_special=insert_special, insert_eos=insert_eos)
    expected = prepared_rows(data, split)
    stream = open_data(data, LENGTH, split)
    batches = list(eval_batches(stream, 4, 0))
    assert [batch.shape for batch, _ in batches] == [(4, LENGTH)] * -(-len(expected) // 4)
    np.testing.assert_array_equal(np.concatenate([batch[is_real] for batch, is_real in batches]), expected)
    assert count_batches(stream, 4, 0) is None
    first = list(eval_batches(stream, 4, 2))
    assert len(first) == count_batches(stream, 4, 2) == 2
    np.testing.assert_array_equal(first[1][0], expected[4:8])


def test_every_epoch_has_every_row(data, monkeypatch):
    """Where epochs are whole windows, each holds every row once, in an order of its own."""
    expected = prepared_rows(data)
    count = len(expected)
    assert count % 9 == 0
    monkeypatch.setattr(streaming, "WINDOW", count // 9)
    epochs = take(stream_batches(open_stream(data, LENGTH, "train"), count, 7, 0, 1), 4)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == sorted(expected.tolist())
    assert len({epoch.tobytes() for epoch in [expected, *epochs]}) == 5


def test_the_order_follows_from_the_seed(data):
    stream = open_stream(data, LENGTH, "train")
    one, again, other = (take(stream_batches(stream, 4, seed, 0, 1), 30) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


def test_hosts_read_different_shards(data, tmp_path):
    """A shard for every letter."""
    for n, letter in enumerate("abc"):
        (tmp_path / "corpus" / f"{n}.jsonl").write_text("\n".join([json.dumps({"text": letter * 30})] * 60))
    stream = open_stream(dataclasses.replace(data, insert_eos=False), LENGTH, "train")
    batches = [take(stream_batches(stream, 5, 3, host, 3), 200) for host in range(3)]
    assert [batch.shape for batch in batches] == [(200, 1, LENGTH), (200, 2, LENGTH), (200, 2, LENGTH)]
    first = [set(batch[:10].ravel().tolist()) for batch in batches]
    assert sorted(map(tuple, first)) == [(ord("a"),), (ord("b"),), (ord("c"),)]
    assert len(set(batches[2].ravel().tolist())) > 1  # the next shard is another


@pytest.mark.parametrize("consumed", [0, 1, 3, 24, 25, 26, 130, 240])
def test_a_position_is_restored_exactly(data, tmp_path, consumed):
    """Through JSON, into an iterator of a new stream; positions inside and between chunks, windows, shards, epochs."""
    iterator = stream_batches(open_stream(data, LENGTH, "train"), 4, 5, 0, 2)
    for _ in range(consumed):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 40)
    restored = stream_batches(open_stream(data, LENGTH, "train"), 4, 5, 0, 2)
    next(restored)
    restored.set_state(state)
    np.testing.assert_array_equal(take(restored, 40), expected)


def test_chunks_do_not_matter(data, monkeypatch):
    small = take(stream_batches(open_stream(data, LENGTH, "train"), 4, 0, 0, 1), 50)
    monkeypatch.setattr(streaming, "BATCH_CHARACTERS", rows.BATCH_CHARACTERS)
    large = take(stream_batches(open_stream(data, LENGTH, "train"), 4, 0, 0, 1), 50)
    np.testing.assert_array_equal(small, large)


def test_other_files_or_another_tokenizer_are_refused(data, tmp_path):
    state = stream_batches(open_stream(data, LENGTH, "train"), 4, 5, 0, 1).get_state()
    other = stream_batches(open_stream(dataclasses.replace(data, tokenizer="text8"), LENGTH, "train"), 4, 5, 0, 1)
    with pytest.raises(UserError, match="the stream of files: its tokenizer changed since the checkpoint was saved"):
        other.set_state(state)
    (tmp_path / "corpus" / "4.txt").write_text("more")
    other = stream_batches(open_stream(data, LENGTH, "train"), 4, 5, 0, 1)
    with pytest.raises(UserError, match="its files changed"):
        other.set_state(state)


@pytest.mark.parametrize(
    ("change", "split", "message"),
    [
        ({"tokenizer": "bpe"}, "train", r"data\.tokenizer is 'bpe', which bd3 prepare trains; allowed .* as gpt2"),
        ({"tokenizer": ""}, "train", r"data\.tokenizer is 'bpe'"),
        ({"tokenizer": "none"}, "train", r"data\.tokenizer is 'none'; allowed"),
        ({"source": "nowhere"}, "train", r"data\.source is 'nowhere', which does not exist"),
        ({}, "test", r"corpus files has no split 'test'; allowed: train, validation"),
    ],
)
def test_mistakes(data, change, split, message):
    with pytest.raises(UserError, match=message):
        open_data(dataclasses.replace(data, **change), LENGTH, split)


def test_too_many_hosts(data):
    stream = open_stream(data, LENGTH, "train")
    with pytest.raises(
        UserError, match=r"has 3 input shards .* too few for 4 hosts; allowed: more files, or data.mode"
    ):
        stream_batches(stream, 8, 0, 0, 4)
    with pytest.raises(UserError, match=r"training\.batch_size is 2; allowed: 3 or more"):
        stream_batches(stream, 2, 0, 0, 3)


def test_too_little_text(data):
    stream = open_stream(data, 100_000, "train")
    with pytest.raises(UserError, match="split 'train' of the stream of files has too few tokens for a row"):
        next(stream_batches(stream, 1, 0, 0, 1))
    with pytest.raises(UserError, match="split 'validation' of the stream of files has too few tokens for a row"):
        next(eval_batches(open_stream(data, 100_000, "validation"), 1, 0))


def test_malformed_records_are_told(data, tmp_path, caplog):
    path = tmp_path / "corpus" / "1.jsonl"
    path.write_text(path.read_text() + '\n{"text": 3}\n')
    list(eval_batches(open_stream(data, LENGTH, "train"), 4, 0))
    assert [record.getMessage() for record in caplog.records] == [
        f"1 malformed records left out, the first: {path}, line 68: no text in the field 'text'"
    ]


def test_the_iterator_is_one_of_grain(data):
    """Which is what `grain.checkpoint` saves as JSON."""
    assert isinstance(stream_batches(open_stream(data, LENGTH, "train"), 4, 5, 0, 1), grain.DatasetIterator)
