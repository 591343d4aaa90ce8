"""`bd3 sample --trace`: one HTML file that replays how samples were drawn, call by call; needs no network."""

import dataclasses
import html
import json
from collections.abc import Sequence

from bd3_jax.data.tokenizers import TextStream, Tokenizer
from bd3_jax.sampling.block import Layout
from bd3_jax.sampling.drawing import Drawn


@dataclasses.dataclass(frozen=True)
class Piece:
    """A token, or the few that make up a character: its text, the network call that completed it, its confidence.

    call: 0 where it was given.
    block: number of the block in which its first token was drawn.
    """

    text: str
    call: int
    confidence: float
    block: int


@dataclasses.dataclass(frozen=True)
class Trace:
    """How a sample came about. A token that was taken back and drawn again appears where it was drawn for good."""

    index: int
    nfe: int
    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, drawn: Drawn, layout: Layout, tokenizer: Tokenizer) -> "Trace":
        pieces, first, stream = [], 1, TextStream(tokenizer)  # after the BOS
        for end, token in enumerate(drawn.tokens[1:].tolist(), 2):
            text = stream.add(token)
            if end == drawn.length:
                text = text or stream.rest()
            if not text:
                continue
            here = slice(first, end)
            confidence = float(drawn.confidence[here].min())
            pieces.append(Piece(text, int(drawn.drawn_at[here].max()), round(confidence, 4), layout.block_of(first)))
            first = end
        return cls(drawn.index, drawn.nfe, tuple(pieces))


@dataclasses.dataclass(frozen=True)
class Replay:
    """Traces that a notebook shows inline as the page that replays them."""

    title: str
    traces: tuple[Trace, ...] = dataclasses.field(repr=False)

    @property
    def html(self) -> str:
        """The page, to be written into a file."""
        return page(self.title, self.traces)

    def _repr_html_(self) -> str:
        # In a frame of its own neither the page's style nor its script meets those of the notebook.
        return f'<iframe srcdoc="{html.escape(self.html)}" style="width: 100%; height: 27rem; border: 0"></iframe>'


def page(title: str, traces: Sequence[Trace]) -> str:
    """The HTML page."""
    samples = [
        {"index": trace.index, "nfe": trace.nfe, "pieces": [dataclasses.astuple(piece) for piece in trace.pieces]}
        for trace in traces
    ]
    # Within a script nothing but a closing tag has a meaning of its own.
    data = json.dumps(samples).replace("<", "\\u003c")
    return _PAGE.replace("{title}", html.escape(title)).replace("{data}", data)


_PAGE = """<!doctype html>
<html lang=en><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root { color-scheme: light dark; --text: #1f2328; --soft: #656d76; --page: #fff; --card: #f6f8fa; --edge: #d0d7de;
  --accent: #2563eb; --sat: 75%; --light: 84%; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --soft: #9198a1; --page: #0d1117; --card: #161b22;
  --edge: #30363d; --accent: #79a8ff; --sat: 60%; --light: 24%; } }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 0 0 .8rem; overflow-wrap: anywhere; }
.controls { display: flex; flex-wrap: wrap; gap: .5rem .8rem; align-items: center; position: sticky; top: 0;
  background: var(--page); padding: .5rem 0; }
button, select { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--edge);
  border-radius: .4rem; padding: .25rem .7rem; min-height: 2.2rem; }
button { cursor: pointer; } #play { min-width: 5rem; }
#at { flex: 1 1 12rem; min-width: 8rem; accent-color: var(--accent); }
output { color: var(--soft); font-variant-numeric: tabular-nums; white-space: nowrap; }
#text { background: var(--card); border-radius: .5rem; padding: 1rem; margin: .6rem 0; min-height: 8rem;
  white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.75; }
#text span { border-radius: .25rem; padding: .1em 0; }
.given { font-weight: 600; } .hidden { display: none; } .masked { color: var(--soft); }
.drawn { background: hsl(var(--hue) var(--sat) var(--light)); }
.new { outline: 2px solid var(--accent); }
.legend { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; color: var(--soft); font-size: .9rem; }
.bar { width: 10rem; height: .8rem; border-radius: .3rem; background: linear-gradient(to right,
  hsl(0 var(--sat) var(--light)), hsl(70 var(--sat) var(--light)), hsl(140 var(--sat) var(--light))); }
</style></head>
<body>
<h1>{title}</h1>
<div class=controls>
  <label>Sample <select id=sample aria-label="Sample"></select></label>
  <button id=back aria-label="One call back">&#9664;&#xFE0E;</button>
  <button id=play>Play</button>
  <button id=step aria-label="One call on">&#9654;&#xFE0E;</button>
  <label>Speed <select id=speed>
    <option value=4>4 calls/s</option><option value=16 selected>16 calls/s</option>
    <option value=64>64 calls/s</option><option value=256>256 calls/s</option></select></label>
  <input id=at type=range min=0 value=0 aria-label="Network call">
  <output id=where></output>
</div>
<div id=text></div>
<div class=legend><span>confidence 0</span><span class=bar></span><span>1</span>
<span>&#183; <b>bold</b>: given &#183; <span class=masked>&#9617;</span>: still masked in the current block</span></div>
<script type="application/json" id=data>{data}</script>
<script>
const samples = JSON.parse(document.getElementById('data').textContent);
const byId = id => document.getElementById(id);
let current, spans, timer = null, last = 0, owed = 0;

function choose(n) {
  current = samples[n];
  byId('at').max = current.nfe;
  byId('text').replaceChildren(...current.pieces.map(([text, call, confidence]) => {
    const span = document.createElement('span');
    span.style.setProperty('--hue', Math.round(140 * confidence));
    span.title = call ? `call ${call}, confidence ${confidence.toFixed(3)}` : 'given';
    return span;
  }));
  spans = [...byId('text').children];
  show(0);
}

function show(call) {
  call = Math.max(0, Math.min(current.nfe, call));
  byId('at').value = call;
  // Not Math.max(...blocks): a browser limits the number of arguments.
  const blocks = of => current.pieces.filter(p => p[1] && of(p[1])).map(p => p[3]);
  const block = call >= current.nfe ? Infinity : call ? blocks(at => at <= call).reduce((a, b) => Math.max(a, b), 0)
    : blocks(at => at > 0).reduce((a, b) => Math.min(a, b), Infinity);
  current.pieces.forEach(([text, at, confidence, own], n) => {
    const there = at <= call, span = spans[n];
    span.textContent = there ? text : '\\u2591';
    span.className = there ? (at ? 'drawn' + (at === call ? ' new' : '') : own > block ? 'hidden' : 'given')
      : own > block ? 'hidden' : 'masked';
  });
  byId('where').value = `call ${call} of ${current.nfe}`;
  if (call >= current.nfe) pause();
}

function tick() {
  const now = performance.now();
  owed += (now - last) / 1000 * Number(byId('speed').value);
  last = now;
  const calls = Math.floor(owed);
  owed -= calls;
  if (calls) show(Number(byId('at').value) + calls);
}

function play() {
  if (Number(byId('at').value) >= current.nfe) show(0);
  byId('play').textContent = 'Pause';
  last = performance.now();
  owed = 0;
  timer = setInterval(tick, 16);
}

function pause() {
  clearInterval(timer);
  timer = null;
  byId('play').textContent = 'Play';
}

samples.forEach((sample, n) => byId('sample').add(new Option(`${sample.index} (${sample.nfe} calls)`, n)));
byId('sample').onchange = event => { pause(); choose(Number(event.target.value)); };
byId('play').onclick = () => timer === null ? play() : pause();
byId('step').onclick = () => { pause(); show(Number(byId('at').value) + 1); };
byId('back').onclick = () => { pause(); show(Number(byId('at').value) - 1); };
byId('at').oninput = event => { pause(); show(Number(event.target.value)); };
choose(0);
</script>
</body></html>
"""
