"""The documentation as it is built, in an environment of its own: `make test-docs` makes it."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.browser import needs_chromium, open_page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("sphinx") is None, reason="needs the extra docs"),
]
ROOT = Path(__file__).parents[2]


def build(source, out):
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet"]
    paths = ["--conf-dir", ROOT / "docs", "--doctree-dir", out.parent / "doctrees", source, out]
    return subprocess.run([*command, *paths], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built without a warning."""
    out = tmp_path_factory.mktemp("docs") / "html"
    ended = build(ROOT / "docs", out)
    assert (ended.returncode, ended.stderr) == (0, "")
    return out


def test_every_module_is_in_the_reference(site):
    text = "".join(path.read_text() for path in (site / "api").glob("*.html"))
    for path in (ROOT / "bd3_jax").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        assert f'id="module-{".".join(parts).removesuffix(".__init__")}"' in text


def test_docstrings_are_shown_as_they_are_meant(site):
    """A drawing, a table, a field with its type and what the class says of it, a link between functions."""
    text = (site / "api" / "bd3_jax.models.html").read_text()
    assert "1 1 0 0 | 0 0 0 0      a noised query" in re.sub(r"<.*?>", "", text)
    text = (site / "api" / "bd3_jax.diffusion.html").read_text()
    assert re.search(r"<td>.*AR.*</td>\s*<td>.*log_probs_without_mask", text)
    assert 'href="#bd3_jax.diffusion.likelihood.draw_training"' in text
    text = re.sub(r"<.*?>", "", (site / "api" / "bd3_jax.sampling.html").read_text())
    assert re.search(r"min_entropy\W+nats; a lower entropy of the last 256 tokens ends", text)
    assert "min_entropy: float" in text
    assert "Float[Array, 'b n d']" in text


def test_nothing_is_fetched_from_elsewhere(site):
    for path in site.rglob("*.html"):
        assert not re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(?:https?:)?//[^"]*"', path.read_text())
    for path in site.rglob("*.css"):
        assert not re.findall(r"""(?:url\(|@import)\s*["']?(?:https?:)?//""", path.read_text())


def test_formulas_and_pictures_are_in_the_page(site):
    text = (site / "tutorial.html").read_text()
    assert text.count("<math ") > 20
    assert not re.search(r"\\(frac|mathbb|sum|log)\b", text)
    pictures = re.findall(r"<svg .*?</svg>", text, re.DOTALL)
    (mask,) = (picture for picture in pictures if 'aria-label="B = 2:' in picture)
    # N = 4 blocks of 2: each sees its own noised one; clean ones before it; and a clean block the clean ones up to it.
    assert mask.count('class="noised"') == 4 * 2**2
    assert mask.count('class="clean"') == (6 + 10) * 2**2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{source}`tests/test_main.py::test_gone`", "the checkout has no tests/test_main.py::test_gone"),
        ("{source}`tests/gone.py`", "the checkout has no tests/gone.py"),
        ("{any}`bd3_jax.models.attention.gone`", "reference target not found: bd3_jax.models.attention.gone"),
        ("[there](gone.md)", "gone.md"),
    ],
)
def test_what_is_gone_is_a_warning(tmp_path, text, told):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "index.md").write_text(f"# Title\n\n{text}\n")
    ended = build(tmp_path / "source", tmp_path / "html")
    assert ended.returncode == 1
    assert told in ended.stderr


@needs_chromium
@pytest.mark.parametrize("width", [360, 1200])
def test_no_page_is_wider_than_the_window(site, tmp_path, width):
    names = ["index", "tutorial", "faq", "preparing_large_corpora", "settings", "api/bd3_jax.diffusion", "api/bd3_jax"]
    frames = "".join(f'<iframe src="{(site / name).as_uri()}.html" width="{width}"></iframe>' for name in names)
    script = """
      addEventListener('load', () => {
        const widths = [...document.querySelectorAll('iframe')].map(f => f.contentDocument.documentElement.scrollWidth);
        document.title = widths.join(' ');
      });
    """
    (tmp_path / "frames.html").write_text(f"<!doctype html><title></title>{frames}<script>{script}</script>")
    found = [int(part) for part in open_page(tmp_path / "frames.html").title.split()]
    assert len(found) == len(names)
    assert max(found) <= width
