"""The HTML page of a run: what it shows, that it needs no network, and that a run's text stays text."""

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from etils import epath

from bd3_jax.config import Config
from bd3_jax.config_dict import from_config_dict
from bd3_jax.configs import base
from bd3_jax.errors import UserError
from bd3_jax.evaluation.report import _position_chart, _ticks, comparable, series, write_report
from bd3_jax.sampling.run import sample
from bd3_jax.training.loop import train
from tests.browser import needs_chromium, open_page

VOID = {"meta", "wbr"}


class Page(HTMLParser):
    """Collects tags, links and text, and checks that tags close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "a run"
    folder.mkdir()
    settings = from_config_dict(base.get_config("bd3lm,block_size=4"))
    (folder / "config.json").write_text(json.dumps(settings.to_dict()))
    metrics = [{"step": step, "train/loss": 7 - step / 100, "train/grad_norm": None} for step in range(0, 200, 10)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))
    sample = {"text": "<script>alert(1)</script> & more", "nfe": 3, "length": 9, "entropy": 1.25}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    return folder


def test_page_is_well_formed_offline_and_escaped(run: Path) -> None:
    page = Page(write_report(epath.Path(run)).read_text())
    assert "a run: bd3lm, block size 4" in page.text
    assert page.tags.count("svg") == 1  # a curve without a finite value is left out
    assert "script" not in page.tags
    assert "<script>alert(1)</script> & more" in page.text
    assert "entropy 1.25" in page.text
    assert not page.links


def test_large_numbers_have_no_exponent(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        for step, value in ((200, 20_000), (1_000_000, 123_456.7)):
            file.write(json.dumps({"step": step, "train/tokens_per_second": value}) + "\n")
    page = Page(write_report(epath.Path(run)).read_text())
    assert "Tokens per second, by step last 123,457" in page.text
    assert "75,000100,000125,000" in page.text
    assert "800,0001,000,000" in page.text
    assert "step1,000,000" in page.text
    assert "e+0" not in page.text


def test_search_and_positions_are_drawn(run: Path) -> None:
    candidates = [[0.001, 1.0, 4.0], [0.001, 0.5, 3.0], [0.25, 0.75, 1.5], [0.5, 1.0, 2.0]]
    record = {"step": 100, "eval/nll_by_position": [3.0, 2.5, None, 2.0], "search/candidates": candidates}
    record |= {"eval/estimator": "low_variance"}
    record |= {"search/low": 0.25, "search/high": 0.75, "search/seconds": 1.5}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    page = Page(write_report(epath.Path(run)).read_text())
    assert "Validation NLL, nats per token, by position in block last 2" in page.text
    assert "Variance at width 0.5, by lower bound last 2" in page.text
    assert "width 1," not in page.text  # one point is no line
    assert "U[0.25, 0.75] (chosen)1.5" in page.text
    assert page.text.count("(chosen)") == 1
    assert "eval/estimatorlow_variance" in page.text


def test_positions_that_are_recorded_together_stand_where_they_are() -> None:
    chart = _position_chart([{"eval/nll_by_position": [3.0, 2.5, 2.0, 1.0]}], block_size=64)
    assert ">60<" in chart


def test_a_search_with_a_variance_that_is_not_finite(run: Path) -> None:
    candidates = [[0.001, 1.0, 4.0], [0.001, 0.5, None], [0.25, 0.75, 1.5], [0.5, 1.0, 2.0]]
    record = {"step": 100, "search/candidates": candidates, "search/low": 0.25, "search/high": 0.75}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record | {"search/seconds": 1.5}) + "\n")
    page = Page(write_report(epath.Path(run)).read_text())
    assert "U[0.001, 0.5]not finite" in page.text
    assert "Variance at width 0.5, by lower bound last 2" in page.text


def test_lengths_are_drawn_where_they_differ(run: Path) -> None:
    assert "Lengths" not in Page(write_report(epath.Path(run)).read_text()).text
    kinds = [(40, "eos", 0), (300, "", 2), (120, "eos", 0), (80, "<entropy>", "?")]
    samples = [{"text": "x", "length": n, "stopped": why, "rejected": times} for n, why, times in kinds]
    (run / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    page = Page(write_report(epath.Path(run)).read_text())
    told = "median 100, longest 300 of 4 samples; 2 ended by eos; 1 ended by max_length; 1 ended by <entropy>; "
    assert told + "2 draws rejected." in page.text
    assert "Samples at least so long, %, by tokens last 25" in page.text


def test_a_page_is_replaced_when_it_is_complete(run: Path) -> None:
    """Whoever reads the old one reads on in it."""
    (run / "report.html").write_text("of before")
    with (run / "report.html").open() as before:
        write_report(epath.Path(run))
        assert before.read() == "of before"
    assert "a run: bd3lm" in (run / "report.html").read_text(encoding="utf-8")
    assert not list(run.glob("*.tmp"))


def test_half_written_last_line_is_left_out(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 200, "train/lo')
    assert "last 5.1" in Page(write_report(epath.Path(run)).read_text()).text


@pytest.mark.parametrize(
    ("name", "content"), [("metrics.jsonl", ""), ("config.json", "{}"), ("config.json", "[1]"), ("config.json", "{")]
)
def test_folder_that_is_no_run(run: Path, name: str, content: str) -> None:
    (run / name).write_text(content)
    with pytest.raises(UserError):
        write_report(epath.Path(run))
    assert not (run / "report.html").exists()


def test_other_evaluations_belong_to_another_curve() -> None:
    first = {"eval/split": "validation", "eval/sequences": 8, "eval/estimator": "exact", "eval/nll": 1.0}
    records = [{"step": 0, **first}, {"step": 1, "train/loss": 2}, {"step": 2, **first, "eval/split": "test"}]
    assert comparable(records) == records[:2]
    assert series(comparable(records), "eval/nll") == [(0, 1.0)]


@pytest.mark.parametrize("name", ["insert_special", "insert_eos", "weights", "sequences", "estimator", "split"])
def test_what_makes_an_evaluation_another(name: str) -> None:
    first = {"eval/split": "validation", "eval/insert_special": False, "eval/insert_eos": True}
    records = [{"step": 0, **first}, {"step": 1, **first, f"eval/{name}": "other"}, {"step": 2, **first}]
    assert comparable(records) == [records[0], records[2]]


def test_evaluations_that_do_not_say_their_weights_are_of_the_average() -> None:
    records = [{"step": n, "eval/split": "validation", **more} for n, more in enumerate(({}, {"eval/weights": "ema"}))]
    assert comparable(records) == records


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 1e6), (1e-9, 2e-9), (6.2, 6.9), (0, 2400), (4, 105)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    ticks = _ticks(low, high)
    assert 3 <= len(ticks) <= 6
    assert all(low - 1e-9 * (high - low) <= tick <= high + 1e-9 * (high - low) for tick in ticks)


@pytest.mark.parametrize("sample", [{"a": 1}, {"text": None}, {"text": 3}])
def test_samples_of_something_else_are_refused(run: Path, sample: dict) -> None:
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    with pytest.raises(UserError, match=r"samples\.jsonl has a record without text"):
        write_report(epath.Path(run))
    assert not (run / "report.html").exists()


SEEN = """
  const light = text => {
    const linear = c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
    const [r, g, b] = text.match(/[\\d.]+/g).map(c => linear(c / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = element => {
    for (; element; element = element.parentElement) {
      const color = getComputedStyle(element).backgroundColor;
      if (color !== 'rgba(0, 0, 0, 0)') return color;
    }
    return 'rgb(255, 255, 255)';
  };
  const contrast = element => {
    const style = getComputedStyle(element), color = element.closest('svg') ? style.fill : style.color;
    const [low, high] = [light(color), light(behind(element))].sort((a, b) => a - b);
    return (high + .05) / (low + .05);
  };
  const seen = frame => {
    const page = frame.contentDocument, window = frame.contentWindow;
    const all = [...page.body.querySelectorAll('*')];
    const texts = all.filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()));
    return {
      width: page.documentElement.scrollWidth,
      dark: window.matchMedia('(prefers-color-scheme: dark)').matches,
      headings: [...page.querySelectorAll('h1, h2')].map(e => e.textContent),
      charts: [...page.querySelectorAll('svg')].map(e => e.getAttribute('aria-label')),
      fetched: window.performance.getEntriesByType('resource').map(e => e.name),
      contrast: Math.min(...texts.map(contrast)),
      letters: Math.min(...texts.map(e => parseFloat(getComputedStyle(e).fontSize)
        * (e.closest('svg') ? e.closest('svg').getBoundingClientRect().width / 480 : 1))),
    };
  };
  addEventListener('load', () => {
    document.title = JSON.stringify([...document.querySelectorAll('iframe')].map(seen));
  });
"""


@pytest.fixture(scope="module")
def trained(tiny_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> epath.Path:
    """A run that has all that a report may show: a search, positions in blocks, samples of several lengths."""
    workdir = epath.Path(tmp_path_factory.mktemp("run") / "a_run_with_a_name_without_a_break_as_those_of_recipes_have")
    search = {"enabled": True, "num_batches": 1, "batch_size": 8, "widths": (0.5, 0.9)}
    settings = {"training.num_steps": 8, "eval.estimator": "low_variance", "noise.resample": True}
    settings |= {f"search.{name}": value for name, value in search.items()}
    config = tiny_config("bd3lm,block_size=4", **settings)
    train(config, workdir)
    sample(config, workdir)
    return workdir


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser(trained: epath.Path, tmp_path: Path, dark: bool) -> None:
    """Of a real run, narrow and wide, by day and by night: all is there, fits and can be read; nothing is fetched."""
    page = Path(write_report(trained))
    frames = "".join(f'<iframe src="{page.as_uri()}" width="{width}"></iframe>' for width in (400, 1400))
    head = "<!doctype html><title></title><style>:root { color-scheme: light dark; }</style>"
    (tmp_path / "frames.html").write_text(f"{head}{frames}<script>{SEEN}</script>")
    opened = open_page(tmp_path / "frames.html", f"--blink-settings=preferredColorScheme={0 if dark else 1}")
    assert not opened.console
    narrow, wide = json.loads(opened.title)
    for seen, width in ((narrow, 400), (wide, 1400)):
        assert seen["width"] <= width
        assert seen["dark"] == dark
        title = f"{trained.name}: bd3lm, block size 4, files"
        assert seen["headings"] == [title, "Search of the interval", "Samples", "Lengths", "Metrics", "Settings"]
        charts = " ".join(seen["charts"])
        for name in ("Training loss", "Validation perplexity", "Validation NLL", "Variance at width", "Samples at"):
            assert name in charts
        assert seen["fetched"] == []
        assert seen["contrast"] >= 4.5
        assert seen["letters"] >= 10
