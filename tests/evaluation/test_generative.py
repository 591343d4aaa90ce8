"""Generative perplexity against a computation by hand: on a made-up judge, and on a tiny GPT-2 where torch is."""

import json
import math
import re
import sys
import types

import numpy as np
import pytest
from etils import epath

from bd3_jax import cli
from bd3_jax.data.tokenizers import text8_tokenizer
from bd3_jax.errors import UserError
from bd3_jax.evaluation import generative
from bd3_jax.evaluation.generative import STRIDE, WINDOW, TransformersJudge, judge_file, score, windowed_losses


class Letters:
    """Ids are letters, z ends a document; the loss of a token is the distance to the one before."""

    ends = frozenset({25})

    def encode(self, text):
        return [ord(letter) - ord("a") for letter in text]

    def losses(self, tokens):
        return np.abs(np.diff(tokens)).astype(float)


def test_by_hand():
    scores, summary = score(["zaceze", "aaab"], Letters())
    # z | a: 25, c: 2, e: 2, (z), e: 21 -- and -- a | a: 0, a: 0, b: 1.
    assert [each.length for each in scores] == [4, 3]
    assert scores[0].nll == pytest.approx((25 + 2 + 2 + 21) / 4)
    assert scores[1].perplexity == pytest.approx(math.exp(1 / 3))
    assert scores[1].entropy == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert summary.mean_perplexity == pytest.approx((math.exp(12.5) + math.exp(1 / 3)) / 2)
    assert summary.pooled_perplexity == pytest.approx(math.exp(51 / 7))
    assert (summary.median_length, summary.max_length) == (3.5, 4)
    assert summary.distinct_1 == pytest.approx(len(set("zaceb")) / 10)
    assert score(["zaceze"], Letters(), max_length=3)[0][0].length == 2
    with pytest.raises(UserError, match="nothing to score"):
        score(["z", "azz"], Letters())


@pytest.mark.parametrize("length", [0, 1, 2, 1000, 1024, 1025, 1536, 1537, 3000])
def test_windows(length):
    """Every token is scored once; the context it is scored with is as long as windows and stride make it."""
    tokens = np.arange(length)
    contexts = windowed_losses(lambda window: window[1:] - window[0], tokens)
    place = np.arange(1, length)
    first = np.maximum(0, (place - STRIDE) // STRIDE * STRIDE)
    np.testing.assert_array_equal(contexts, place - np.where(place < WINDOW, 0, first))


def tiny_judge(folder, **special):
    """A random GPT-2 of 32 dimensions over bytes and <|endoftext|>, or what else the special tokens are."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from bd3_jax.data.tokenizers import bytes_tokenizer

    bytes_tokenizer().save(folder)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special)
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=len(fast), n_embd=32, n_layer=2, n_head=2, n_positions=1024)
    model = transformers.GPT2LMHeadModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_gpt2(tmp_path_factory):
    return tiny_judge(tmp_path_factory.mktemp("judge"), bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def test_a_tiny_gpt2(tiny_gpt2):
    import torch
    import transformers

    text = "<|endoftext|>" + "What is seen, is seen. " * 60 + "<|endoftext|>Néw"
    (found,), summary = score([text], TransformersJudge(str(tiny_gpt2)))
    bytes_ = [256, *("What is seen, is seen. " * 60).encode(), 256, *"Néw".encode()]
    model = transformers.GPT2LMHeadModel.from_pretrained(tiny_gpt2).eval()

    def by_hand(start, stop, first):
        with torch.no_grad():
            log_probs = torch.log_softmax(model(torch.tensor([bytes_[start:stop]])).logits[0].double(), -1)
        return [-log_probs[i - start - 1, bytes_[i]].item() for i in range(first, stop) if bytes_[i] != 256]

    losses = by_hand(0, 1024, 1) + by_hand(512, len(bytes_), 1024)
    assert len(bytes_) == 1 + 1380 + 1 + 4
    assert found.length == len(losses) == 1384
    assert found.nll == pytest.approx(np.mean(losses), rel=1e-5)
    assert summary.pooled_perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)


def test_bd3_judge(tiny_gpt2, tmp_path, capsys):
    file = tmp_path / "samples.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("One.", "Another one.<|endoftext|>")))
    assert cli.main(["judge", str(file), f"--judge={tiny_gpt2}"]) == 0
    assert "mean perplexity" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "samples-scores.jsonl").read_text().splitlines()]
    assert [line["length"] for line in lines] == [4, 12]


class Codes:
    """In place of a model that is loaded: ids are bytes but for EOS, which is BOS, and all tokens are alike likely."""

    bos, ends = "<|endoftext|>", frozenset({256})

    def __init__(self, name):
        pass

    def encode(self, text):
        first, *others = text.split(self.bos)
        return [*first.encode(), *(code for each in others for code in (256, *each.encode()))]

    def losses(self, tokens):
        if tokens[-1] == ord("!"):
            raise KeyboardInterrupt
        return np.ones(len(tokens) - 1)


def written(folder):
    return [json.loads(line) for line in (folder / "samples-scores.jsonl").read_text().splitlines()]


def test_eos_as_the_run_spells_it(tmp_path, monkeypatch):
    monkeypatch.setattr(generative, "TransformersJudge", Codes)
    ours = text8_tokenizer()
    end = ours.decode([ours.ids.eos])
    assert end != "<|endoftext|>"
    file = epath.Path(tmp_path / "samples.jsonl")
    file.write_text(json.dumps({"text": f"one{end}two"}) + "\n")
    assert judge_file(file, "codes", 0).max_length == 6 + len(end)
    ours.save(epath.Path(tmp_path / "tokenizer"))
    assert judge_file(file, "codes", 0).max_length == 6


def test_scores_are_written_as_they_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(generative, "TransformersJudge", Codes)
    file = epath.Path(tmp_path / "samples.jsonl")
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one", "", "!")))
    with pytest.raises(KeyboardInterrupt):
        judge_file(file, "codes", 0)
    assert [(line["length"], line["nll"]) for line in written(tmp_path)] == [(3, 1.0), (0, None)]


@pytest.mark.parametrize(
    ("special", "begins", "ends"),
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, 257, 258),
        ({"eos_token": "</s>"}, 257, 257),
        ({"bos_token": "<s>"}, 257, 257),
        ({"bos_token": "<|endoftext|>", "eos_token": "</s>"}, 256, 257),
    ],
)
def test_a_judge_with_other_special_tokens(tmp_path, special, begins, ends):
    judge = TransformersJudge(str(tiny_judge(tmp_path, **special)))
    assert judge.encode(f"{judge.bos}ab<|endoftext|>c") == [begins, *b"ab", ends, *b"c"]
    assert judge.ends == {ends}


def test_a_bos_that_is_spelled_like_our_eos(monkeypatch):
    """Stand-ins for both libraries; the pieces of a text in place of ids."""
    tokenizer = types.SimpleNamespace(
        bos_token="<|endoftext|>", eos_token="</s>", encode=lambda text, **_: re.findall(r"<[^>]*>|.", text)
    )
    model = types.SimpleNamespace(eval=lambda: None)
    loading = lambda found: types.SimpleNamespace(from_pretrained=lambda *_, **__: found)
    library = types.SimpleNamespace(AutoTokenizer=loading(tokenizer), AutoModelForCausalLM=loading(model))
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(float32=None))
    monkeypatch.setitem(sys.modules, "transformers", library)
    judge = TransformersJudge("any")
    assert judge.encode(f"{judge.bos}a<|endoftext|>b") == ["<|endoftext|>", "a", "</s>", "b"]
    assert judge.ends == {"</s>"}


def test_a_judge_without_special_tokens(tmp_path):
    with pytest.raises(UserError, match="has neither a BOS nor an EOS token"):
        TransformersJudge(str(tiny_judge(tmp_path)))


def test_what_cannot_be_judged(tmp_path, monkeypatch):
    empty = epath.Path(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="is no file of samples"):
        judge_file(empty, "gpt2-large", 0)
    empty.write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="every line must be an object with a text"):
        judge_file(empty, "gpt2-large", 0)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"needs torch: pip install 'bd3_jax\[torch\]'"):
        generative.TransformersJudge("gpt2-large")
