"""Generative perplexity: how likely another language model finds texts (Block Diffusion, section 6.2)."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Int

from bd3_jax.data.tokenizers import END_OF_TEXT, load_tokenizer
from bd3_jax.data.tokenizers import FILE_NAME as TOKENIZER_FILE
from bd3_jax.errors import UserError
from bd3_jax.folders import append_text, write_text
from bd3_jax.metrics import read_records, to_json
from bd3_jax.sampling import statistics

WINDOW, STRIDE = 1024, 512


class Judge(Protocol):
    """A causal language model with its tokenizer. `ends` are ids that end a document: they are not scored."""

    ends: frozenset[int]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, in which special tokens that are spelled out count as such; none is added."""

    def losses(self, tokens: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n-1"]:
        """-log p(tokens[i + 1] | tokens[: i + 1]), nats, of at most 1024 tokens."""


@dataclasses.dataclass(frozen=True)
class Score:
    """Of one text.

    Attributes:
      nll: nats per scored token; nan where none is.
      perplexity: exp(nll).
      length: tokens that count: all but the first and those that end a document.
      entropy: of the distribution of all its tokens, nats.
    """

    nll: float
    perplexity: float
    length: int
    entropy: float


@dataclasses.dataclass(frozen=True)
class Summary:
    """Of many texts.

    Attributes:
      mean_perplexity: the mean of the texts' perplexities, as published.
      pooled_perplexity: exp of all losses over all scored tokens.
      entropy: mean over texts, nats.
      median_length: of the texts.
      max_length: of the texts.
      distinct_1, distinct_2, distinct_3: different n-grams of all texts, divided by all n-grams.
    """

    mean_perplexity: float
    pooled_perplexity: float
    entropy: float
    median_length: float
    max_length: int
    distinct_1: float
    distinct_2: float
    distinct_3: float


def score(
    texts: Sequence[str], judge: Judge, max_length: int = 0, tell: Callable[[Score], None] = lambda score: None
) -> tuple[list[Score], Summary]:
    """Tokenises texts anew and scores them, each cut after `max_length` tokens (0: not at all).

    A text begins with the token that the first one is predicted from, BOS as a rule; it is never scored. `tell` is
    called with every score as it is found.

    Raises:
      UserError: there is nothing to score.
    """
    scores, rows = [], []
    for text in texts:
        tokens = np.asarray(judge.encode(text)[: max_length or None], np.int64)
        scored = np.asarray([token not in judge.ends for token in tokens[1:].tolist()], bool)
        losses = windowed_losses(judge.losses, tokens)
        scores.append(_score(tokens, losses, scored))
        tell(scores[-1])
        rows.append(tokens.tolist())
    lengths = [each.length for each in scores]
    if not any(lengths):
        raise UserError("the texts hold nothing to score: no token after the first but the end of documents")
    total = sum(each.nll * each.length for each in scores if each.length)
    return scores, Summary(
        mean_perplexity=float(np.mean([each.perplexity for each in scores if each.length])),
        pooled_perplexity=math.exp(total / sum(lengths)),
        entropy=float(np.mean([each.entropy for each in scores])),
        median_length=float(np.median(lengths)), max_length=max(lengths),
        **{f"distinct_{n}": statistics.distinct(rows, n) for n in (1, 2, 3)},
    )  # fmt: skip


def _score(tokens: Int[np.ndarray, "n"], losses: Float[np.ndarray, "m"], scored: Bool[np.ndarray, "m"]) -> Score:
    count = int(scored.sum())
    nll = float(losses[scored].mean()) if count else math.nan
    return Score(nll, math.exp(nll) if count else math.nan, count, statistics.entropy(tokens))


def windowed_losses(
    losses: Callable[[Int[np.ndarray, "n"]], Float[np.ndarray, "n-1"]], tokens: Int[np.ndarray, "n"]
) -> Float[np.ndarray, "n-1"]:
    """Losses of all tokens but the first: windows of 1024, stride 512, of later ones the last 512 places only."""
    found = np.zeros(max(len(tokens) - 1, 0))
    for start in range(0, max(len(tokens) - WINDOW + STRIDE, 1), STRIDE):
        window = tokens[start : start + WINDOW]
        if len(window) < 2:
            break
        new = 0 if start == 0 else WINDOW - STRIDE - 1
        found[start + new : start + len(window) - 1] = losses(window)[new:]
    return found


class TransformersJudge:
    """A model of the `transformers` library: a name on the hub, a folder, or a GGUF file; float32.

    Attributes:
      bos: what texts are to begin with: its BOS, or its EOS where it has none.
    """

    def __init__(self, name: str):
        """Raises UserError where the packages are missing, or there is no such model, or it has neither BOS nor EOS."""
        try:
            import torch
            import transformers
        except ImportError as error:
            raise UserError(f"generative perplexity needs {error.name}: pip install 'bd3_jax[torch]'") from None
        self._torch = torch
        path = Path(name)
        where = (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (name, {})
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(where[0], **where[1])
            model = transformers.AutoModelForCausalLM.from_pretrained(where[0], dtype=torch.float32, **where[1])
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"--judge={name} cannot be loaded: {' '.join(str(error).split())[:300]}") from None
        self._model: Any = model.eval()
        bos, eos = self._tokenizer.bos_token, self._tokenizer.eos_token
        if not (bos or eos):
            raise UserError(f"--judge={name} has neither a BOS nor an EOS token; allowed: a model that has one")
        self.bos, self._eos = bos or eos, eos or bos
        self.ends = frozenset(self._tokenizer.encode(self._eos, add_special_tokens=False))

    def encode(self, text: str) -> list[int]:
        """See `Judge`; our <|endoftext|> counts as the judge's EOS, but for a BOS of that name before the text."""
        begin = self.bos if text.startswith(self.bos) else ""
        text = begin + text.removeprefix(begin).replace(END_OF_TEXT, self._eos)
        return self._tokenizer.encode(text, add_special_tokens=False)

    def losses(self, tokens: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n-1"]:
        ids = self._torch.from_numpy(tokens)[None]
        with self._torch.inference_mode():
            logits = self._model(ids).logits[0, :-1]
            return self._torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").double().numpy()


def judge_file(path: epath.Path, name: str, max_length: int) -> Summary:
    """Scores the texts of a JSONL file, and writes FILE-scores.jsonl beside it, one object a line as each is found.

    Each text is read with the judge's BOS before it, and with its EOS where the text has its own: that of the
    tokenizer/ beside the file, in the folder of a run, or else <|endoftext|>.

    Returns:
      what is found of all texts together.

    Raises:
      UserError: the file holds no texts, or the judge cannot be had.
    """
    records = read_records(path)
    texts: list[Any] = [record.get("text") for record in records]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{path} is no file of samples: every line must be an object with a text")
    judge, end = TransformersJudge(name), _end_of_text(path.parent / "tokenizer")
    out = path.with_name(f"{path.stem}-scores.jsonl")
    write_text(out, "")
    return score(
        [f"{judge.bos}{text.replace(end, END_OF_TEXT)}" for text in texts],
        judge,
        max_length,
        tell=lambda each: append_text(out, to_json({"judge": name, **dataclasses.asdict(each)}) + "\n"),
    )[1]


def _end_of_text(folder: epath.Path) -> str:
    """How a tokenizer spells its EOS; without one, the usual."""
    if not (folder / TOKENIZER_FILE).exists():
        return END_OF_TEXT
    tokenizer = load_tokenizer(folder)
    return tokenizer.decode([tokenizer.ids.eos])


def table(summary: Summary) -> str:
    rows = [(field.name.replace("_", " "), getattr(summary, field.name)) for field in dataclasses.fields(summary)]
    return "\n".join(f"{name:18} {value:,.4g}" for name, value in rows)
