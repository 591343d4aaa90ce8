"""The replay: what is in the page, and the page in a browser."""

import json
import re

import numpy as np
import pytest

from bd3_jax.data.tokenizers import bytes_tokenizer
from bd3_jax.sampling.block import Layout
from bd3_jax.sampling.drawing import Drawn
from bd3_jax.sampling.trace import Piece, Trace, page
from tests.browser import needs_chromium, open_page

TOKENIZER = bytes_tokenizer()
LAYOUT = Layout(size=4, stride=4, num_blocks=4)


def drawn_from(text, calls, length=None):
    tokens = np.asarray([256, *text.encode()], np.int32)
    calls = np.asarray([0, *calls], np.int32)
    confidence = np.where(calls > 0, calls / 10, 0).astype(np.float32)
    return Drawn(3, tokens, len(tokens), 2, length or len(tokens), 0, 0.0, calls, confidence, nfe=int(calls.max()))


def test_pieces():
    trace = Trace.of(drawn_from("ab\u00e9<", [0, 2, 3, 1, 4]), LAYOUT, TOKENIZER)
    # An e with an accent has two bytes: it is there when both are, with the lesser of their confidences.
    assert trace == Trace(
        3, 4, (Piece("a", 0, 0.0, 0), Piece("b", 2, 0.2, 0), Piece("\u00e9", 3, 0.1, 0), Piece("<", 4, 0.4, 1))
    )
    assert Trace.of(drawn_from("abc", [1, 2, 3], length=3), LAYOUT, TOKENIZER).pieces[-1].text == "b"


def test_words_are_apart_and_their_pieces_are_not(word_pieces):
    tokens, calls = np.array([0, 3, 4, 5, 6], np.int32), np.array([0, 0, 2, 1, 3], np.int32)
    drawn = Drawn(0, tokens, 5, 2, 5, 0, 0.0, calls, np.where(calls, 0.5, 0), nfe=3)
    pieces = Trace.of(drawn, LAYOUT, word_pieces).pieces
    assert [(piece.text, piece.call) for piece in pieces] == [("red", 0), (" walk", 2), ("ing", 1), (".", 3)]


def test_bytes_that_are_no_character():
    """Together with what follows, so that the pieces are the text; an unfinished one at the end is shown as such."""
    drawn = drawn_from("xyzab\u00e9", [1, 2, 3, 4, 5, 6, 7], length=7)
    drawn.row[2:4] = 0xC3
    pieces = Trace.of(drawn, LAYOUT, TOKENIZER).pieces
    assert [(piece.text, piece.call) for piece in pieces] == [("x", 1), ("\ufffd\ufffda", 4), ("b", 5), ("\ufffd", 6)]


def test_blocks_that_overlap():
    """MDLM beyond its context of 8: each window draws 4 new tokens."""
    trace = Trace.of(drawn_from("abcdefghijkl", [1] * 12), Layout(size=8, stride=4, num_blocks=3), TOKENIZER)
    assert [piece.block for piece in trace.pieces] == [0] * 7 + [1] * 4 + [2]


def test_text_cannot_break_out_of_the_page():
    trace = Trace.of(drawn_from("</script><b>", [1] * 12), LAYOUT, TOKENIZER)
    html = page("a <title>", [trace])
    assert "<title>a &lt;title&gt;</title>" in html
    data = re.search(r'<script type="application/json" id=data>(.*?)</script>', html, re.DOTALL)[1]
    assert "".join(piece[0] for piece in json.loads(data)[0]["pieces"]) == "</script><b>"
    assert not re.search(r"(src|href)=|https?://|url\(", html)


@pytest.mark.slow
@needs_chromium
def test_in_a_browser(tmp_path):
    """Opened in Chromium, stepped through and played: the text that is visible after each call."""
    html = page("replay", [Trace.of(drawn_from("abcdefgh", [0, 0, 0, 2, 1, 4, 3, 5]), LAYOUT, TOKENIZER)])
    script = """
      const visible = () => [...document.querySelectorAll('#text span')].filter(s => s.className !== 'hidden')
        .map(s => s.textContent).join('');
      const seen = [visible()];
      for (let n = 0; n < 5; n++) { document.getElementById('step').click(); seen.push(visible()); }
      document.getElementById('back').click(); seen.push(visible());
      document.getElementById('speed').value = '256';
      document.getElementById('play').click();
      const wait = () => {  // frames may come late on a busy machine
        if (document.getElementById('play').textContent !== 'Play') return setTimeout(wait, 20);
        seen.push(visible());
        document.title = JSON.stringify(seen);
      };
      wait();
    """
    file = tmp_path / "trace.html"
    file.write_text(html.replace("choose(0);\n</script>", f"choose(0);\n{script}</script>"))
    seen = json.loads(open_page(file).title.replace("\u2591", "_"))
    assert seen == [
        "abc____", "abc_e__", "abcde__", "abcde_g", "abcdefg", "abcdefgh",  # step by step
        "abcdefg", "abcdefgh",  # back, then played to the end
    ]  # fmt: skip
