"""The pictures of these pages, drawn by the project's own functions whenever the pages are built.

Each function returns HTML with inline SVG, in the colours of the page around it (`style.css`), light or dark.
"""

import html

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from bd3_jax.config import EPS
from bd3_jax.diffusion import corruption
from bd3_jax.diffusion.schedules import SCHEDULES
from bd3_jax.models.attention import block_causal_mask, block_diffusion_mask
from bd3_jax.sampling.updates import FirstHitting

TOKENS = ["[BOS]", "Each", "block", "is", "drawn", "given", "all", "those", "that", "came", "before", "it"]
BLOCK_SIZE = 4
CELL, MARGIN = 14, 24
TOKEN_WIDTH, TOKEN_HEIGHT, LABEL_WIDTH = 58, 28, 56


def masks() -> str:
    """Of the networks that see one stream."""
    length = 8
    return _panels(
        _mask(block_causal_mask(length, 1), "AR: causal, B = 1", ["clean"]),
        _mask(block_causal_mask(length, 2), "BD3-LM, drawing without a cache, B = 2", ["clean"]),
        _mask(block_causal_mask(length, length), "MDLM, SEDD: all to all, B = L", ["noised"]),
    )


def two_streams() -> str:
    """Of BD3-LM in training, from one token a block to one block a row."""
    streams = ["noised", "clean"]
    return _panels(*[_mask(block_diffusion_mask(8, size), f"B = {size}", streams) for size in (1, 2, 4, 8)])


def _mask(mask: Bool[np.ndarray, "S S"], title: str, streams: list[str]) -> str:
    """Rows are queries, columns keys; a visible key has the colour of its stream."""
    size, each = len(mask), len(mask) // len(streams)
    body = []
    for row, column in np.ndindex(mask.shape):
        name = streams[column // each] if mask[row, column] else "unseen"
        place = f'x="{MARGIN + column * CELL}" y="{MARGIN + row * CELL}"'
        body.append(f'<rect class="{name}" {place} width="{CELL - 1}" height="{CELL - 1}"/>')
    for stream in range(len(streams)):
        name = {"noised": "xt", "clean": "x0"}[streams[stream]]
        middle = MARGIN + (stream + 0.5) * each * CELL
        body += [_text(middle, MARGIN - 8, name, "middle"), _text(MARGIN - 6, middle + 4, name, "end")]
    side = MARGIN + size * CELL
    return _panel(_svg(side, side, f"{title}: {int(mask.sum())} of {mask.size} pairs see each other", body), title)


def noised_rows() -> str:
    """The same text, four times noised: one time per block, stratified over all blocks."""
    rows, blocks = 4, len(TOKENS) // BLOCK_SIZE
    key_t, key_mask = jax.random.split(jax.random.key(0))
    times = corruption.draw_times(key_t, rows, blocks, EPS, 1.0)
    chance = SCHEDULES["loglinear"].move_chance(times)
    x0 = jnp.broadcast_to(jnp.arange(len(TOKENS)), (rows, len(TOKENS)))
    mask_id = len(TOKENS)
    xt = corruption.corrupt(x0, corruption.draw_mask(key_mask, chance, BLOCK_SIZE), mask_id, ignore_bos=True)
    body = []
    for row in range(rows):
        top = row * (TOKEN_HEIGHT + 26) + 20
        for block in range(blocks):
            left = LABEL_WIDTH + (block + 0.5) * BLOCK_SIZE * TOKEN_WIDTH
            body.append(_text(left, top - 6, f"t = {times[row, block]:.2f}", "middle"))
        body.append(_text(0, top + TOKEN_HEIGHT / 2 + 5, f"row {row + 1}"))
        for position, token in enumerate(np.asarray(xt[row])):
            body.append(_token(position, top, "noised" if token == mask_id else "clean"))
    height = rows * (TOKEN_HEIGHT + 26)
    return _panels(_svg(_row_width(), height, "A text, four times noised, with a time for each block", body), wide=True)


def denoising() -> str:
    """First-hitting, call by call: the order is drawn by the sampler, the words are given instead of drawn."""
    update, body, call, top = FirstHitting(), [], 0, 0
    given = np.arange(len(TOKENS)) == 0
    for block, key in enumerate(jax.random.split(jax.random.key(2), len(TOKENS) // BLOCK_SIZE)):
        start, end = block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE
        carry = update.init(key[None], jnp.asarray(~given[None, start:end]))
        while not given[start:end].all():
            masked = jnp.asarray(~given[None, start:end])
            new, call = start + int(update.positions(masked, carry)[0, 0]), call + 1
            given[new] = True
            body.append(_text(0, top + TOKEN_HEIGHT / 2 + 5, f"call {call}"))
            for position in range(end):
                kind = "new" if position == new else "clean" if given[position] else "noised"
                body.append(_token(position, top, kind))
            top += TOKEN_HEIGHT + 4
    label = f"{len(TOKENS)} tokens in {call} network calls"
    return _panels(_svg(_row_width(), top, label, body), wide=True)


def _row_width() -> int:
    return LABEL_WIDTH + len(TOKENS) * TOKEN_WIDTH


def _token(position: int, top: float, kind: str) -> str:
    """A box with the token in it, or empty where it is masked; a gap after every block."""
    left = LABEL_WIDTH + position * TOKEN_WIDTH + 3
    size = f'width="{TOKEN_WIDTH - (8 if (position + 1) % BLOCK_SIZE == 0 else 3)}" height="{TOKEN_HEIGHT}"'
    box = f'<rect class="{kind}" x="{left}" y="{top}" {size} rx="4"/>'
    if kind == "noised":
        return box
    return box + _text(left + TOKEN_WIDTH / 2 - 3, top + TOKEN_HEIGHT / 2 + 5, TOKENS[position], "middle", "word")


def schedules() -> str:
    """p(t), and how much a masked token weighs."""
    names = [name for name in SCHEDULES if name != "scaled_loglinear"]  # which differs from loglinear by 1e-3 t
    t = np.linspace(0.02, 1, 200, dtype=np.float32)
    chances = {name: SCHEDULES[name].move_chance(t) for name in names}
    weights = {name: -SCHEDULES[name].loss_scale(t) for name in names}
    keys = "".join(f'<span class="curve-{n}">{name}</span>' for n, name in enumerate(names))
    return (
        _panels(
            _panel(_chart(t, chances, 1), "p(t): the share of tokens that is masked"),
            _panel(_chart(t, weights, 8), "-s(t): the weight of a masked token"),
        )
        + f'<div class="key">{keys}</div>'
    )


def _chart(t: np.ndarray, curves: dict[str, np.ndarray], top: float) -> str:
    width, height, left, bottom = 330, 190, 24, 20
    body = [f'<path class="axis" d="M{left} 6V{height - bottom}H{width - 6}"/>']
    for share in (0, 0.5, 1):
        x, y = left + share * (width - left - 10), height - bottom - share * (height - bottom - 10)
        body += [_text(x, height - 4, f"{share:g}", "middle"), _text(left - 5, y + 4, f"{share * top:g}", "end")]
    for number, values in enumerate(curves.values()):
        shown = np.asarray(values) <= top
        x = left + t[shown] * (width - left - 10)
        y = height - bottom - np.asarray(values)[shown] / top * (height - bottom - 10)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        body.append(f'<polyline class="curve-{number}" points="{points}"/>')
    return _svg(width, height, f"over t from 0 to 1, up to {top:g}: {', '.join(curves)}", body)


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "label") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _svg(width: float, height: float, label: str, body: list[str]) -> str:
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg {size} role="img" aria-label="{html.escape(label)}">{"".join(body)}</svg>'


def _panel(svg: str, title: str) -> str:
    return f"<div>{svg}<p>{html.escape(title)}</p></div>"


def _panels(*panels: str, wide: bool = False) -> str:
    """Beside each other where there is room; `wide` ones scroll sideways where there is not."""
    return f'<div class="picture{" wide" if wide else ""}">{"".join(panels)}</div>'
