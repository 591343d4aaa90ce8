"""The harness of lm_eval on any checkpoint of ours or of the authors: its model `bd3` (extra `eval`).

    bd3 lm_eval --model bd3 --model_args pretrained=runs/bd3,estimator=low_variance --tasks TASK --batch_size 16

| request | answer |
| --- | --- |
| `loglikelihood` | log p(continuation given BOS and context), or a lower bound: see `LanguageModel.conditional` |
| `loglikelihood_rolling` | the same of a whole text after BOS |
| `generate_until` | a sample that begins with the context, from our samplers |

Longer than the training context L: of a context that does not fit the last tokens are kept. A text or continuation of L
tokens or more is scored in the harness' own rolling windows: L - 1 tokens after one token of context, one window after
the other, and the last with as much context as there is room for.
"""

import json
import sys
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from bd3_jax.errors import UserError
from bd3_jax.evaluation.conditional import Row, score
from bd3_jax.evaluation.result import describe
from bd3_jax.pretrained import Pretrained, load_pretrained
from bd3_jax.sampling.drawing import Drawn, draw
from bd3_jax.sampling.sampler import Sampler

MAX_TOKENS = 256
"""That `generate_until` draws where the task does not say."""

GENERATION = (
    "sampler", "num_steps", "tokens_per_step", "threshold", "entropy_bound", "remasking", "nucleus", "top_k",
    "kv_cache", "seed",
)  # fmt: skip
"""Fields of `config.sampling` that a task or --gen_kwargs may set, beside the harness' own names."""


def main(argv: Sequence[str]) -> None:
    """Runs the harness' own command line."""
    sys.argv = ["lm_eval", *argv]
    cli_evaluate()


@register_model("bd3")
class HarnessModel(TemplateLM):
    """A model of ours, as the harness wants it."""

    def __init__(
        self,
        pretrained: str = "",
        estimator: str = "",
        draws: int = 16,
        seed: int = 0,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        **loading: Any,
    ):
        """All but the batch size comes from --model_args.

        Args:
          pretrained: what `bd3_jax.load_pretrained` takes.
          estimator: of likelihoods, as `config.eval.estimator`: low_variance, monte_carlo (a bound, estimated);
            left_to_right, most_confident (exact for this order). Empty: low_variance, or monte_carlo for models that
            have no other. It is not used where the model's likelihood is exact.
          draws: of the noise for every text, which are averaged.
          seed: of these draws. They depend on it and on the context: the choices of a question have the same noise.
          batch_size: texts at a time, each with all its draws; or samples.
          device: not used: JAX chooses (JAX_PLATFORMS).
          max_batch_size: not used.
          **loading: objective, block_size, tokenizer, revision, weights and step for `load_pretrained`.

        Raises:
          UserError: an argument that is unknown or impossible, or nothing to load.
        """
        super().__init__()
        names = ("objective", "block_size", "tokenizer", "revision", "weights", "step")
        if unknown := sorted(loading.keys() - names):
            own = ("pretrained", "estimator", "draws", "seed")
            raise UserError(f"unknown argument {unknown[0]!r} in --model_args; allowed: {', '.join((*own, *names))}")
        if not pretrained:
            raise UserError("--model_args lacks pretrained=SOURCE: a workdir, a folder or file, or a hub id")
        self._draws = _positive("draws in --model_args", draws)
        batch_size = _positive("--batch_size", batch_size)
        self.model: Pretrained = load_pretrained(str(pretrained), **loading)
        self.text = self.model.text_tokenizer()
        self._eval = self.model.evaluation(
            estimator=estimator or _usual_estimator(self.model), seed=seed, batch_size=batch_size
        )
        print(f"bd3: {json.dumps(self.get_model_info()['bd3'])}")

    def get_model_info(self) -> dict[str, Any]:
        """What the harness adds to the settings in its results."""
        model, c = self.model, self._eval
        estimator = "exact" if model.model.is_exact else c.estimator
        drawn = {"draws": self._draws, "seed": c.seed} if estimator in ("low_variance", "monte_carlo") else {}
        own = {"source": model.source, "step": model.step, "objective": model.objective}
        likelihood = {"likelihood": describe(estimator), **drawn}
        return {"bd3": {**own, "block_size": model.block_size, "length": model.model.length, **likelihood}}

    @property
    def eot_token_id(self) -> int:
        return self.text.ids.eos

    @property
    def prefix_token_id(self) -> int:
        return self.text.ids.bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.text.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        texts = []
        for _, context, continuation in requests:
            given = context if context == [self.prefix_token_id] else [self.prefix_token_id, *context]
            texts.append((given, continuation, _checksum(given)))
        return self._score(texts, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        texts = [self.text.encode(request.args[0]) for request in requests]
        begin = [self.prefix_token_id]
        return [found for found, _ in self._score([(begin, text, _checksum(text)) for text in texts], disable_tqdm)]

    def _score(self, texts: list[tuple[list[int], list[int], int]], silent: bool) -> list[tuple[float, bool]]:
        """Of (given, free, noise), in windows where they are too long; a text is greedy if all its windows are."""
        windows = [self._windows(given, free) for given, free, _ in texts]
        rows = [
            Row(*window, (noise + number) % 2**32)
            for (_, _, noise), own in zip(texts, windows, strict=True)
            for number, window in enumerate(own)
        ]
        scores = iter(score(self.model.model, self.model.params, rows, self._eval, self._draws, progress=not silent))
        found = [[next(scores) for _ in own] for own in windows]
        return [(sum(each.log_likelihood for each in own), all(each.is_greedy for each in own)) for own in found]

    def _windows(self, given: list[int], free: list[int]) -> list[tuple[list[int], list[int]]]:
        length = self.model.model.length
        if len(free) < length:
            return [(given[-(length - len(free)) :], free)]
        return [make_disjoint_window(pair) for pair in get_rolling_token_windows(free, given[-1], length - 1, 1)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first stop string, EOS, or `max_gen_toks` tokens.

        `do_sample=False` or `temperature=0` (the harness' default) takes the likeliest token always: for masked models
        with the sampler `confidence` if none is named. With `do_sample=True`, what is left out is as in the model's
        `config.sampling`. Request i of those with the same arguments is sample i of the seed.

        Raises:
          UserError: an argument that is unknown, or that the model cannot serve.
        """
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="generating", unit=" texts", disable=disable_tqdm) as bar:
            for asked, indices in groups.items():
                stops, tokens, settings = self._asked(json.loads(asked))
                prompts = [self.text.encode(requests[index].args[0]) for index in indices]
                for index, text in zip(indices, self._generate(prompts, stops, tokens, settings), strict=True):
                    texts[index] = text
                    bar.update()
        return texts

    def _asked(self, asked: dict[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
        """Stop strings, how many tokens, and fields of `config.sampling`."""
        asked = dict(normalize_gen_kwargs(asked, MAX_TOKENS))
        stops = [str(stop) for stop in asked.pop("until") if stop] + [self.text.decode([self.eot_token_id])]
        tokens = _positive("max_gen_toks", asked.pop("max_gen_toks"))
        sample, ours = asked.pop("do_sample"), {"temperature": "temperature", "top_p": "nucleus"}
        settings = {name: float(asked.pop(theirs)) for theirs, name in ours.items() if theirs in asked}
        if unknown := sorted(asked.keys() - GENERATION):
            own = ("until", "max_gen_toks", "do_sample", "temperature", "top_p")
            raise UserError(f"unknown argument {unknown[0]!r} of generation; allowed: {', '.join((*own, *GENERATION))}")
        if sample and settings.get("temperature") != 0:
            return stops, tokens, asked | settings
        if self.model.objective == "sedd":
            raise UserError("sedd has no greedy sampler; allowed: --gen_kwargs do_sample=true,temperature=1")
        masked = {} if self.model.objective == "ar" else {"sampler": "confidence", "tokens_per_step": 1}
        return stops, tokens, {**masked, **asked, "temperature": 1.0, "nucleus": 1.0, "top_k": 1}

    def _generate(self, prompts: list[list[int]], stops: list[str], tokens: int, settings: dict[str, Any]) -> list[str]:
        length = self.model.model.length
        # SEDD draws within the training context; the others slide on, after a prompt that fits into it.
        room = length - tokens if self.model.objective == "sedd" else length
        if room < 1:
            raise UserError(f"max_gen_toks is {tokens}; allowed: up to {length - 1}, since sedd cannot go beyond L")
        prompts = [prompt[max(0, len(prompt) - (room - 1)) :] for prompt in prompts]
        limits = [len(prompt) + 1 + tokens for prompt in prompts]
        c = self.model.sampling(**settings, max_length=max(limits), variable_length=False, min_entropy=0.0)
        sampler = Sampler.from_config(self.model.model, c)

        def new(drawn: Drawn) -> str | None:
            begin = len(prompts[drawn.index]) + 1
            text = self.text.decode(drawn.tokens[begin:].tolist())
            cut = min((text.find(stop) for stop in stops if stop in text), default=None)
            return None if cut is None and drawn.length < drawn.limit else text[:cut]

        rows = sampler.canvas(prompts)
        ended = draw(
            sampler, self.model.params, rows, len(rows), min(len(rows), self._eval.batch_size),
            ends=lambda drawn: new(drawn) is not None, limits=limits,
        )  # fmt: skip
        return [new(drawn) or "" for drawn in ended]


def _usual_estimator(model: Pretrained) -> str:
    """The better one of those that a model has."""
    masked = model.objective in ("mdlm", "bd3lm") and not model.model.network.time_conditioned
    return "low_variance" if masked and model.model.noise.schedule != "scaled_loglinear" else "monte_carlo"


def _checksum(tokens: Sequence[int]) -> int:
    return zlib.crc32(np.asarray(tokens, np.int32).tobytes())


def _positive(name: str, value: Any) -> int:
    if not str(value).isdecimal() or int(value) < 1:
        raise UserError(f"{name} is {value!r}; allowed: 1 or more")
    return int(value)
