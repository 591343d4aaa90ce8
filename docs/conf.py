"""Sphinx: pages in Markdown, the reference from docstrings, formulas as MathML, pictures drawn while building.

`make docs` builds build/docs, which needs no network to be read.
"""

import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))
typing.GENERATING_DOCUMENTATION = "bd3_jax"  # type: ignore[attr-defined]  # jaxtyping then prints short types

import pictures  # noqa: E402

project = "bd3_jax"
copyright = "The bd3_jax authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
default_role = "py:obj"
smartquotes = False  # `--flag` is no dash
autodoc_default_options = {"members": True, "undoc-members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
html_theme = "furo"
html_title = "bd3_jax"
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_math_renderer = "mathml"
html_show_sphinx = False
html_copy_source = False
pygments_style, pygments_dark_style = "default", "github-dark"


def write_reference(app: Sphinx) -> None:
    """docs/api/: a page for every package with all its modules, so that a new module is there by itself."""
    package = ROOT / "bd3_jax"
    wanted = {}
    for folder in [package, *sorted(path.parent for path in package.glob("*/__init__.py"))]:
        name = ".".join(folder.relative_to(ROOT).parts)
        modules = [f"{name}.{path.stem}" for path in sorted(folder.glob("*.py")) if path.stem != "__init__"]
        lines = [_heading(name, "="), f".. automodule:: {name}"]
        for module in modules:
            lines += [_heading(module.removeprefix("bd3_jax."), "-"), f".. automodule:: {module}"]
        wanted[f"{name}.rst"] = "\n\n".join(lines) + "\n"
    (HERE / "api").mkdir(exist_ok=True)
    for path in (HERE / "api").iterdir():
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        path = HERE / "api" / name
        if not path.exists() or path.read_text() != text:  # what has not changed need not be built again
            path.write_text(text)


def _heading(text: str, line: str) -> str:
    return f"{text}\n{line * len(text)}"


def to_rest(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are Markdown with Google's sections; their tables and drawings become reStructuredText.

    Drawings are paragraphs with a line of 0s and 1s, those indented by four, and all but the first of a usage. In a
    class, `field: text` becomes a list of its fields.
    """
    paragraphs = [paragraph.split("\n") for paragraph in re.split(r"\n\s*\n", "\n".join(lines).rstrip())]
    if name.startswith(("bd3_jax.cli.", "bd3_jax.main")):
        paragraphs[1:] = [[f"    {line}" for line in paragraph] for paragraph in paragraphs[1:]]
    if what == "class":
        paragraphs = [_with_fields(paragraph, obj) for paragraph in paragraphs]
    lines[:] = [line for paragraph in filter(None, paragraphs) for line in [*_paragraph(paragraph), ""]]


def _with_fields(lines: list[str], obj: Any) -> list[str]:
    """A field list in place of a paragraph's `field: text` lines, under the heading `Attributes:` or not."""
    found: list[str] = []
    for line in lines:
        word, colon, text = line.strip().partition(":")
        if colon and word in getattr(obj, "__annotations__", {}):
            found += [""] if found and not found[-1].startswith((":", " ")) else []
            found.append(f":ivar {word}: {text.strip()}")
        elif found and found[-1].startswith((":", " ")):
            found.append(f"    {line.strip()}")
        else:
            found.append(line)
    return found[2:] if found[:2] == ["Attributes:", ""] else found


def _paragraph(lines: list[str]) -> Iterator[str]:
    if len(lines) > 1 and lines[1].startswith("|") and set(lines[1]) <= set("|-: "):
        yield from [".. list-table::", "   :header-rows: 1", ""]
        for row in [lines[0], *lines[2:]]:
            cells = [_escaped(cell.strip()) for cell in row[1:-1].split(" | ")]
            yield from [f"   {'*' if n == 0 else ' '} - {cell}" for n, cell in enumerate(cells)]
    elif all(line.startswith("    ") for line in lines) or any(re.match("[01]( [01])+", line) for line in lines):
        yield from ["::", "", *[f"    {line}" for line in lines]]
    else:
        yield from map(_escaped, lines)


def _escaped(line: str) -> str:
    """Bars, outside of code, are no substitutions."""
    return "`".join(part if n % 2 else part.replace("|", "\\|") for n, part in enumerate(line.split("`")))


class Picture(SphinxDirective):
    """What a function of `pictures` draws, with the content as its caption."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        drawn = nodes.raw("", getattr(pictures, self.arguments[0])(), format="html")
        caption, _ = self.state.inline_text(" ".join(self.content), self.lineno)
        return [nodes.figure("", drawn, nodes.caption("", "", *caption))]


class Source(SphinxRole):
    """A file of the checkout, or one of its tests, as in `tests/FILE.py::test_name`: a warning where it is gone."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        path, _, name = self.text.partition("::")
        if not (ROOT / path).exists() or (name and f"def {name}(" not in (ROOT / path).read_text()):
            logging.getLogger(__name__).warning("the checkout has no %s", self.text, location=self.get_location())
        return [nodes.literal("", self.text)], []


def visit_inline_formula(translator: Any, node: nodes.math) -> None:
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def visit_formula(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="formula">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (visit_inline_formula, None), (visit_formula, None))
    app.add_directive("picture", Picture)
    app.add_role("source", Source())
    app.connect("builder-inited", write_reference)
    app.connect("autodoc-process-docstring", to_rest, priority=400)  # before napoleon
