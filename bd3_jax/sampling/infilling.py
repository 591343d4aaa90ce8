"""What is given of a sample: a prompt, or a text with gaps."""

import dataclasses
import operator
import re
from collections.abc import Callable, Sequence

from bd3_jax.config import SamplingConfig
from bd3_jax.errors import UserError

Given = list[int | None]
"""Token ids without BOS; None where a token is to be drawn."""

_GAP = re.compile(r" ?\[MASK(?:\*(\d{1,6}))?\]")


def parse(template: str, encode: Callable[[str], list[int]]) -> Given:
    """A text in which `[MASK]` is a gap of one token and `[MASK*5]` one of five.

    A space before a gap belongs to the gap: the tokens of most vocabularies begin with their space. The texts between
    gaps are tokenised each by itself.
    """
    given: Given = []
    end = 0
    for gap in _GAP.finditer(template):
        given += encode(template[end : gap.start()]) if gap.start() > end else []
        given += [None] * int(gap[1] or 1)
        end = gap.end()
    return given + (encode(template[end:]) if end < len(template) else [])


def resolve(
    c: SamplingConfig,
    encode: Callable[[str], list[int]],
    prompt: str | Sequence[int] = "",
    infill: str | Sequence[int | None] = "",
) -> tuple[SamplingConfig, Given]:
    """What is given, by one of the arguments or else in `c`, and the settings for it: what has gaps ends where it ends.

    Raises:
      UserError: there is both a prompt and a text with gaps, or no gap, or more tokens than `max_length`.
    """
    where = ""
    if not (len(prompt) or len(infill)):
        prompt, infill, where = c.prompt, c.infill, "config.sampling."
    if not len(infill):
        return c, _ids(encode(prompt) if isinstance(prompt, str) else prompt, "prompt") if len(prompt) else []
    if len(prompt):
        raise UserError(f"{where}prompt and {where}infill are both given; allowed: one of them")
    given = parse(infill, encode) if isinstance(infill, str) else _ids(infill, "infill")
    if None not in given:
        raise UserError(f"config.sampling.infill is {infill!r}; allowed: a text with gaps, as in 'The [MASK*3] of'")
    if len(given) + 1 > c.max_length:
        raise UserError(
            f"config.sampling.infill has {len(given) + 1} tokens with BOS; allowed: up to sampling.max_length = "
            f"{c.max_length}"
        )
    return dataclasses.replace(c, max_length=len(given) + 1), given


def _ids(tokens: Sequence[int | None], name: str) -> Given:
    gaps = name == "infill"
    try:
        return [None if gaps and token is None else operator.index(token) for token in tokens]  # type: ignore[arg-type]
    except TypeError:
        raise UserError(f"the {name} is {tokens!r:.80}; allowed: text, or token ids") from None
