import dataclasses
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from bd3_jax.data.pipeline import eval_batches, open_dataset, open_eval_data, train_batches, without_special
from bd3_jax.data.prepare import prepare
from bd3_jax.errors import UserError


@pytest.fixture
def dataset(data, tmp_path):
    """150 rows; row n is the number n as text, so that a row tells its number."""
    folder = tmp_path / "numbers" / "train"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("".join(f"{n:015d}," for n in range(150)))
    data = dataclasses.replace(data, tokenizer="bytes", source=str(folder.parent), insert_eos=False)
    prepare(data, 16)
    return open_dataset(data, 16, "train")


def numbers(dataset, batch):
    return [int(dataset.tokenizer.decode(row)[:-1]) for row in batch]


def stream(dataset, batch_size, steps, seed=0, start_row=0, hosts=1):
    """Numbers of the rows that `hosts` hosts read together in `steps` steps."""
    readers = [train_batches(dataset, batch_size, seed, start_row, p, hosts) for p in range(hosts)]
    return [n for _ in range(steps) for reader in readers for n in numbers(dataset, next(reader))]


def test_an_epoch_holds_every_row_once_in_a_new_order(dataset):
    size = len(dataset)
    order = stream(dataset, batch_size=size, steps=3)
    epochs = [order[i * size : (i + 1) * size] for i in range(3)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, range(size)]}) == 4
    assert stream(dataset, size, 1, seed=1) not in epochs  # a seed is not the next epoch of the seed before
    assert stream(dataset, size, 1, seed=0) == epochs[0]


@pytest.mark.parametrize("hosts", [1, 2, 3, 8])
def test_hosts_read_the_rows_of_one(dataset, hosts):
    """Batches of 13 divide neither by the hosts nor into the epoch."""
    steps = len(dataset) // 13 + 5
    assert stream(dataset, 13, steps, hosts=hosts) == stream(dataset, 13, steps)


@pytest.mark.parametrize(("before", "after"), list(itertools.permutations([1, 2, 3, 8], 2)))
def test_resumed_on_other_hosts_nothing_is_lost_or_read_twice(dataset, before, after):
    steps = len(dataset) // 13 + 2
    whole = stream(dataset, 13, steps)
    for stop in (1, steps // 2, steps - 1):
        first = stream(dataset, 13, stop, hosts=before)
        rest = stream(dataset, 13, steps - stop, start_row=13 * stop, hosts=after)
        assert first + rest == whole


def test_resumed_with_another_batch_size(dataset):
    first = stream(dataset, 12, 5)
    assert first + stream(dataset, 20, 2, start_row=60) == stream(dataset, 10, 10)


def test_batches(dataset):
    batch = next(train_batches(dataset, 6, seed=0, start_row=0, process_index=1, process_count=2))
    assert batch.dtype == np.int32
    assert batch.shape == (3, 16)
    with pytest.raises(UserError, match=r"training\.batch_size is 2; allowed: 3 or more"):
        train_batches(dataset, 2, seed=0, start_row=0, process_index=0, process_count=3)


def test_a_batch_may_be_larger_than_the_data(dataset):
    size = len(dataset)
    read = stream(dataset, 2 * size + 1, 1)
    assert sorted(read[:size]) == sorted(read[size : 2 * size]) == list(range(size))


def test_evaluation_reads_in_order_and_marks_what_fills(dataset):
    size = len(dataset)
    batches = list(eval_batches(dataset, 7, num_batches=0))
    assert len(batches) == -(-size // 7)
    assert {(b.shape, b.dtype, real.shape, real.dtype) for b, real in batches} == {
        ((7, 16), np.dtype(np.int32), (7,), np.dtype(bool))
    }
    assert [n for b, real in batches for n in numbers(dataset, b[real])] == list(range(size))
    assert sum(real.sum() for _, real in batches) == size
    few = list(eval_batches(dataset, 7, num_batches=2))
    assert [n for b, _ in few for n in numbers(dataset, b)] == list(range(14))
    assert len(list(eval_batches(dataset, 7, num_batches=10**6))) == len(batches)


@pytest.mark.parametrize(
    ("change", "length", "split", "message"),
    [
        (
            {"directory": "nowhere"},
            16,
            "train",
            r"data\.directory is 'nowhere', where nothing is prepared; run: bd3 prepare",
        ),
        ({}, 16, "trian", r"has no split 'trian'; allowed: train, validation"),
        ({}, 8, "train", r"model\.length = 16, but it is 8"),
        ({"tokenizer": "bpe"}, 16, "train", r"data\.tokenizer = 'bytes', but it is 'bpe'"),
        ({"insert_eos": False}, 16, "train", r"data\.insert_eos = True, but it is False"),
        ({"insert_special": True}, 16, "train", r"data\.insert_special = False, but it is True"),
        ({"corpus": "wikipedia_summaries"}, 16, "train", r"data\.corpus = 'files', but it is 'wikipedia_summaries'"),
    ],
)
def test_settings_are_checked_against_the_manifest(data, change, length, split, message):
    data = dataclasses.replace(data, tokenizer="bytes")
    prepare(data, 16)
    with pytest.raises(UserError, match=message):
        open_dataset(dataclasses.replace(data, **change), length, split)
    open_dataset(dataclasses.replace(data, source="moved away"), 16, "train")


def test_a_damaged_folder_is_refused(data):
    data = dataclasses.replace(data, tokenizer="bytes")
    prepare(data, 16)
    path = Path(data.directory) / "tokenizer" / "tokenizer.json"
    original = path.read_text()
    path.write_text(original.replace('"fuse_unk": false', '"fuse_unk": true', 1))
    with pytest.raises(UserError, match="is not the tokenizer that"):
        open_dataset(data, 16, "train")
    path.write_text(original)
    manifest = Path(data.directory) / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"format": 99}))
    with pytest.raises(UserError, match=r"manifest\.json has format 99; allowed: 2 \(an earlier version .* prepare"):
        open_dataset(data, 16, "train")
    for damage in ("{", "[]", json.dumps(content | {"ids": {}}), json.dumps(content | {"more": 1})):
        manifest.write_text(damage)
        with pytest.raises(UserError, match=r"manifest\.json is damaged"):
            open_dataset(data, 16, "train")


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json"])
def test_a_folder_runs_no_code(data, tmp_path, monkeypatch, name):
    """TFDS would import the module of a class that is named in either file."""
    data = dataclasses.replace(data, tokenizer="bytes")
    prepare(data, 16)
    (tmp_path / "code" / "of_a_stranger").mkdir(parents=True)
    (tmp_path / "code" / "of_a_stranger" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "code")
    path = Path(data.directory) / name
    content = json.loads(path.read_text())
    features = content if name == "features.json" else content.setdefault("features", {"jsonFeature": {"json": "{}"}})
    features["pythonClassName"] = "of_a_stranger.Feature"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"rows is damaged \(.*\); prepare the corpus anew") as error:
        open_dataset(data, 16, "train")
    assert "of_a_stranger" not in sys.modules
    assert f"({name} " in str(error.value)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_rows_that_are_missing_or_cut_short_are_refused(data, damage):
    data = dataclasses.replace(data, tokenizer="bytes")
    prepare(data, 16)
    (path,) = Path(data.directory).glob("*-train.array_record-*")
    damage(path)
    with pytest.raises(UserError, match=r"rows is damaged.*prepare the corpus anew") as error:
        open_dataset(data, 16, "train")
    assert "\n" not in str(error.value)
    open_dataset(data, 16, "validation")
    (Path(data.directory) / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match=r"rows is damaged.*prepare the corpus anew"):
        open_dataset(data, 16, "validation")
    (Path(data.directory) / "dataset_info.json").unlink()
    with pytest.raises(UserError, match=r"rows is damaged.*prepare the corpus anew"):
        open_dataset(data, 16, "validation")


def test_rows_with_flipped_bits_are_refused_when_they_are_read(data):
    """As long as before, so that opening finds nothing; a batch of training is read in a thread of Grain's."""
    data = dataclasses.replace(data, tokenizer="bytes")
    prepare(data, 16)
    (path,) = Path(data.directory).glob("*-train.array_record-*")
    content = bytearray(path.read_bytes())
    for place in range(1000, len(content) - 70_000, 500):
        content[place] ^= 0xFF
    path.write_bytes(content)
    dataset = open_dataset(data, 16, "train")
    for read in (
        lambda: dataset.read(range(len(dataset))),
        lambda: next(train_batches(dataset, len(dataset), 0, 0, 0, 1)),
    ):
        with pytest.raises(UserError, match=r"data\.directory is '.*rows', whose rows cannot be read \(.*\); allowed"):
            read()


def test_a_split_without_rows(data, tmp_path, capsys):
    for split, text in (("train", "much " * 50), ("validation", "little")):
        (tmp_path / "two" / split).mkdir(parents=True)
        (tmp_path / "two" / split / "a.txt").write_text(text)
    data = dataclasses.replace(data, tokenizer="bytes", source=str(tmp_path / "two"))
    prepare(data, 16)
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert "split 'validation' has no rows, so training, which validates" in warning
    open_dataset(data, 16, "train")
    with pytest.raises(UserError, match=r"split 'validation' of .* has 7 tokens, too few for a row of 16"):
        open_dataset(data, 16, "validation")


@pytest.mark.parametrize(("special", "eos"), [(False, True), (True, True), (True, False)])
def test_rows_without_special_tokens_are_those_prepared_without(data, tmp_path, special, eos):
    data = dataclasses.replace(data, tokenizer="bytes", insert_special=special, insert_eos=eos)
    plain = dataclasses.replace(data, insert_special=False, insert_eos=False, directory=str(tmp_path / "plain"))
    for each in (data, plain):
        prepare(each, 16)
    rows, wanted = (open_dataset(each, 16, "validation") for each in (data, plain))
    found = without_special(rows, 0)
    assert len(wanted) - 1 <= len(found) <= len(wanted)  # what filled no row is not there to be cut anew
    np.testing.assert_array_equal(found.read(range(len(found))), wanted.read(range(len(found))))
    assert found.settings == dataclasses.replace(wanted.settings, source=found.settings.source)
    assert (rows.settings.insert_special, rows.settings.insert_eos) == (special, eos)
    few = without_special(rows, 5)
    np.testing.assert_array_equal(few.read(range(len(few))), wanted.read(range(5)))
    assert without_special(wanted, 5) is wanted


@pytest.mark.parametrize("mode", ["prepared", "streaming"])
def test_which_evaluations_go_without_special_tokens(tiny_config, mode):
    for when, plain in (("never", (False, False)), ("training", (True, False)), ("always", (True, True))):
        config = tiny_config("ar", **{"eval.without_special": when, "data.mode": mode})
        for in_training, without in zip((True, False), plain, strict=True):
            rows = open_eval_data(config, in_training)
            read = np.concatenate([batch for batch, _ in eval_batches(rows, 8, 0)])
            assert (rows.tokenizer.ids.eos in read) != without
            assert rows.settings.insert_eos != without
