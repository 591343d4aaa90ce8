import collections
import json

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from bd3_jax.data.tokenizers import Tokenizer, bytes_tokenizer, load_tokenizer, train_bpe
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


def test_special_ids(bpe):
    ids = bytes_tokenizer().ids
    assert (ids.bos, ids.eos, ids.mask, ids.vocab_size) == (256, 256, 257, 258)
    assert bpe.ids.bos == bpe.ids.eos == 0
    assert (bpe.ids.mask, bpe.ids.vocab_size) == (270, 271)  # the trained 270 and the mask


def test_a_mask_of_its_own_adds_no_token():
    ids = Tokenizer(_word_level(["[CLS]", "[MASK]", "a", "b"]), "test").ids
    assert (ids.bos, ids.eos, ids.mask, ids.vocab_size) == (0, 0, 1, 4)


def test_special_tokens_are_shown_or_skipped(bpe):
    ids = [bpe.ids.bos, *bpe.encode("low"), bpe.ids.mask, bpe.ids.eos]
    assert bpe.decode(ids) == "<|endoftext|>low[MASK]<|endoftext|>"
    assert bpe.decode(ids, skip_special=True) == "low"


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


def test_saved_and_loaded(bpe, tmp_path):
    bpe.save(tmp_path / "here")
    for path in (tmp_path / "here", str(tmp_path / "here" / "tokenizer.json")):
        loaded = load_tokenizer(path)
        assert (loaded.fingerprint, loaded.ids) == (bpe.fingerprint, bpe.ids)
        assert loaded.encode(TEXTS[3]) == bpe.encode(TEXTS[3])


def test_errors(tmp_path):
    with pytest.raises(UserError, match=r"data\.vocab_size is 256; allowed: 257 or more"):
        train_bpe(["a"], 256)
    with pytest.raises(UserError, match=r"data\.tokenizer is 'gtp2'; allowed: bpe, bytes"):
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
    with pytest.raises(UserError, match=r"reads the text '</s>' as the special token"):
        Tokenizer(_word_level(["<s>", "</s>", "a"]), "test")


def _word_level(vocabulary: list[str]) -> str:
    """A tokenizer of whole words; punctuation apart, except in `<s>`-like names where it does not split."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token="a"))
    brackets = any(word.startswith("[") for word in vocabulary)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer() if brackets else pre_tokenizers.WhitespaceSplit()
    return tokenizer.to_str()
