"""`bd3 report WORKDIR`: a run as one HTML page with its curves, samples and settings; needs no network to be read."""

import html
import json
import math
import platform
import statistics
from collections import Counter
from importlib import metadata
from typing import Any

from etils import epath

from bd3_jax.checkpoints.run_folder import read_config
from bd3_jax.config import Config
from bd3_jax.errors import UserError
from bd3_jax.folders import write_text
from bd3_jax.metrics import kind, read_all, read_records

Series = list[tuple[float, float]]

_STYLE = """
:root { color-scheme: light dark; --line: #2563eb; --grid: #8884; --text: #1f2328; --soft: #656d76;
  --page: #fff; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --line: #79a8ff; --text: #e6edf3; --soft: #9198a1; --page: #0d1117;
  --card: #161b22; } }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
figure, pre, blockquote { margin: 0; padding: .8rem; background: var(--card); border-radius: .5rem; }
pre { overflow-x: auto; } figcaption { font-weight: 600; margin-bottom: .3rem; }
figcaption .soft { font-weight: 400; white-space: nowrap; }
svg { width: 100%; height: auto; display: block; overflow: visible; }
svg text { fill: var(--soft); font-size: 11px; } @media (max-width: 34rem) { svg text { font-size: 15px; } }
blockquote { margin-bottom: .8rem; white-space: pre-wrap;
  overflow-wrap: anywhere; } blockquote footer { color: var(--soft); font-size: .85rem; margin-top: .5rem; }
table { border-collapse: collapse; margin: 1rem 0 1.5rem; }
td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: bottom; font-weight: 400;
  overflow-wrap: anywhere; }
td + td, th + th { padding-right: 0; text-align: right; font-variant-numeric: tabular-nums; }
td + td { white-space: nowrap; }
.chosen td { font-weight: 600; } .soft { color: var(--soft); }
"""


def write_report(workdir: epath.Path) -> epath.Path:
    """Writes WORKDIR/report.html from the run's files and returns its path.

    Raises:
      UserError: when the folder does not hold the files of a run, or cannot be written.
    """
    metrics = read_all(workdir)
    if not metrics:
        raise UserError(
            f"{workdir} is not a run to report on: found no records in {workdir / 'metrics.jsonl'}; bd3 train or bd3 "
            "eval makes some"
        )
    config = read_config(workdir)
    samples = read_records(workdir / "samples.jsonl")
    if not all(isinstance(sample.get("text"), str) for sample in samples):
        raise UserError(f"{workdir / 'samples.jsonl'} has a record without text, so bd3 sample did not write it")
    samples = samples or [{"text": text} for text in _last(metrics, "samples/text") or []]
    page = _page(workdir.resolve().name, config, metrics, samples)
    path = workdir / "report.html"
    write_text(path, page)
    return path


def series(metrics: list[dict[str, Any]], name: str) -> Series:
    """(step, value) of every record that has the metric and a finite value."""
    pairs = [(record["step"], record[name]) for record in metrics if name in record]
    return [(step, value) for step, value in pairs if isinstance(value, int | float) and math.isfinite(value)]


def comparable(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the evaluations of another kind than the first: they belong to another curve."""
    evaluations = [record for record in metrics if "eval/split" in record]
    return [record for record in metrics if "eval/split" not in record or kind(record) == kind(evaluations[0])]


def _page(name: str, config: Config, metrics: list[dict[str, Any]], samples: list[dict[str, Any]]) -> str:
    block = f", block size {config.block_size}" if config.objective == "bd3lm" else ""
    title = f"{name}: {config.objective}{block}, {config.data.corpus}"
    charts = [
        _chart("Training loss, nats per token", series(metrics, "train/loss")),
        _chart("Validation perplexity", series(comparable(metrics), "eval/perplexity")),
        _chart("Gradient norm", series(metrics, "train/grad_norm")),
        _chart("Parameter norm", series(metrics, "train/param_norm")),
        _chart("Learning rate", series(metrics, "train/learning_rate")),
        _chart("Tokens per second", series(metrics, "train/tokens_per_second")),
        _chart("Model FLOP utilisation", series(metrics, "train/mfu")),
        _chart("Steps skipped, not finite", [point for point in series(metrics, "train/skipped") if point[1]]),
        _position_chart(comparable(metrics), config.block_size),
    ]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<div class="charts">{"".join(charts)}</div>',
        _search(metrics),
        "<h2>Samples</h2>",
        "".join(_sample(sample) for sample in samples[-8:]) or '<p class="soft">None yet: bd3 sample draws some.</p>',
        _lengths(samples),
        f"<h2>Metrics</h2>{_last_values(metrics)}",
        f"<h2>Settings</h2><pre>{html.escape(json.dumps(config.to_dict(), indent=2))}</pre>",
        f'<p class="soft">{html.escape(_environment())}</p>',
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join(parts)
    head += f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
    return f"<!doctype html>\n<html lang=en><head>{head}</head>\n<body>\n{body}\n</body></html>\n"


def _last_values(metrics: list[dict[str, Any]]) -> str:
    kinds = (int, float, str)  # an evaluation says in words of what it is, and how it was estimated
    last = {name: value for record in metrics for name, value in record.items() if type(value) in kinds}
    rows = "".join(
        f"<tr><td>{_breakable(name)}</td><td>{_full(value)}</td></tr>" for name, value in sorted(last.items())
    )
    return f"<table><tr><th class=soft>metric</th><th class=soft>last value</th></tr>{rows}</table>"


def _breakable(name: str) -> str:
    """May go on in the next line after a slash or an underscore."""
    return html.escape(name).replace("/", "/<wbr>").replace("_", "_<wbr>")


def _sample(sample: dict[str, Any]) -> str:
    facts = {key: sample[key] for key in ("nfe", "length", "entropy") if type(sample.get(key)) in (int, float)}
    footer = ", ".join(f"{key} {value:.4g}" for key, value in facts.items())
    return f"<blockquote>{html.escape(sample['text'])}<footer>{footer}</footer></blockquote>"


def _lengths(samples: list[dict[str, Any]]) -> str:
    """How long the samples are, where they differ, and how they ended."""
    lengths = sorted(sample["length"] for sample in samples if type(sample.get("length")) is int)
    if len(set(lengths)) < 2:
        return ""
    ended = Counter(str(sample.get("stopped") or "max_length") for sample in samples)
    rejected = sum(n for sample in samples if type(n := sample.get("rejected")) is int)
    facts = [f"median {statistics.median(lengths):g}, longest {lengths[-1]} of {len(lengths)} samples"]
    facts += [f"{count} ended by {reason}" for reason, count in ended.most_common()]
    facts += [f"{rejected} draws rejected"] if rejected else []
    # The share of samples at least so long: no bins to choose.
    longer: Series = [(length, 100 * (1 - n / len(lengths))) for n, length in enumerate(lengths)]
    chart = _chart("Samples at least so long, %", longer, "tokens")
    return f'<h2>Lengths</h2><p class="soft">{html.escape("; ".join(facts))}.</p><div class="charts">{chart}</div>'


def _environment() -> str:
    packages = ("bd3_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain")
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in packages)
    return f"Written on {platform.platform()}, Python {platform.python_version()}; {versions}."


def _last(metrics: list[dict[str, Any]], name: str) -> Any:
    """The last value of a metric; None where no record has it."""
    return next((record[name] for record in reversed(metrics) if name in record), None)


def _position_chart(metrics: list[dict[str, Any]], block_size: int) -> str:
    """NLL at each position in a block, or up to it of so many as are recorded together; in the last validation."""
    values = _last(metrics, "eval/nll_by_position") or []
    together = block_size / max(len(values), 1)
    points: Series = [(place * together, value) for place, value in enumerate(values, 1) if value is not None]
    return _chart("Validation NLL, nats per token", points, "position in block") if len(points) > 1 else ""


def _search(metrics: list[dict[str, Any]]) -> str:
    """The last search of the interval: a chart for each width, and a table; and what was chosen before."""
    rows: list[tuple[float, float, float | None]] = _last(metrics, "search/candidates") or []
    if not rows:
        return ""
    chosen = [_last(metrics, "search/low"), _last(metrics, "search/high")]
    widths = sorted({round(high - low, 2) for low, high, _ in rows})
    lines = [(f"Variance at width {width:g}", _finite(rows, width)) for width in widths]
    charts = [_chart(title, points, "lower bound") for title, points in lines if len(points) > 1]
    charts += [_chart(f"Chosen {name} bound", series(metrics, f"search/{name}")) for name in ("low", "high")]
    cells = "".join(
        f"<tr{' class=chosen' if [low, high] == chosen else ''}>"
        f"<td>U[{low:g}, {high:g}]{' (chosen)' if [low, high] == chosen else ''}</td>"
        f"<td>{'not finite' if value is None else f'{value:,.6g}'}</td></tr>"
        for low, high, value in rows
    )
    heads = "<tr><th class=soft>interval</th><th class=soft>variance of a block's mean loss</th></tr>"
    seconds = _last(metrics, "search/seconds")
    return (
        f'<h2>Search of the interval</h2><p class="soft">The last of them took {seconds:.1f} s.</p>'
        f'<div class="charts">{"".join(charts)}</div><table>{heads}{cells}</table>'
    )


def _finite(rows: list[tuple[float, float, float | None]], width: float) -> Series:
    """(lower bound, variance) of the candidates of a width that have one."""
    return [(low, value) for low, high, value in rows if value is not None and round(high - low, 2) == width]


def _chart(title: str, points: Series, axis: str = "step") -> str:
    """A line chart as SVG; the vertical axis holds the data, not zero."""
    if not points:
        return ""
    width, height, left, right, top, bottom = 480, 240, 60, 12, 10, 24
    steps, values = [p[0] for p in points], [p[1] for p in points]
    low, high = _padded(min(values), max(values))
    first, last = min(steps), max(steps) if max(steps) > min(steps) else min(steps) + 1

    def place(step: float, value: float) -> tuple[float, float]:
        x = left + (step - first) / (last - first) * (width - left - right)
        return x, top + (high - value) / (high - low) * (height - top - bottom)

    grid = []
    for value in _ticks(low, high):
        _, y = place(first, value)
        grid.append(f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--grid)"/>')
        grid.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:,.10g}</text>')
    for step in _ticks(first, last):
        x, _ = place(step, low)
        grid.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="middle">{step:,.10g}</text>')
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    line = f'<polyline points="{path}" fill="none" stroke="var(--line)" stroke-width="1.8"/>'
    x, y = place(*points[-1])
    dot = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="var(--line)"/>'
    caption = f"{html.escape(title)}, by {axis} <span class=soft>last {_short(values[-1])}</span>"
    label = f"{html.escape(title)} by {axis}"
    svg = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(grid)}{line}{dot}</svg>'
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"


def _full(value: float | str) -> str:
    if isinstance(value, str):
        return html.escape(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """Two to six round numbers in [low, high]."""
    raw = (high - low) / 5
    magnitude = 10 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
