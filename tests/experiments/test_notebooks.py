"""docs/notebooks/: executed headless with small settings, their outputs beside the library in this process.

That needs a kernel, so `make test-notebooks` does it. Whether outputs are kept in the files is seen everywhere.
"""

import html
import json
import random
import re
from pathlib import Path

import pytest

from bd3_jax.metrics import read_metrics
from bd3_jax.pretrained import load_pretrained

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "notebooks"
MODEL = ROOT / "experiments" / "models" / "bd3lm-b8"
NAMES = ("sample", "train", "one_block")
NUMBER = r"(-?[\d,]+\.?\d*)"


class Executed:
    """The cells of a notebook, each found by a piece of its code."""

    def __init__(self, cells):
        self._cells = [cell for cell in cells if cell["cell_type"] == "code"]

    def outputs(self, code):
        (cell,) = [cell for cell in self._cells if code in "".join(cell["source"])]
        return cell["outputs"]

    def printed(self, code):
        streams = (output for output in self.outputs(code) if output["output_type"] == "stream")
        return "".join("".join(output["text"]) for output in streams if output["name"] == "stdout")

    def shown(self, code, kind):
        """What is displayed as `kind`, a MIME type."""
        (data,) = [output["data"][kind] for output in self.outputs(code) if kind in output.get("data", {})]
        return "".join(data)

    def figures(self, code):
        """The first two numbers after the first word of each line."""
        lines = re.findall(rf"^(\w+) +\D*{NUMBER}\D+{NUMBER}", self.printed(code), re.MULTILINE)
        return {name: tuple(float(value.replace(",", "")) for value in values) for name, *values in lines}


@pytest.fixture(scope="module")
def execute(script):
    pytest.importorskip("nbclient")
    return lambda name, **parameters: Executed(script("notebooks").execute(name, **parameters).cells)


def test_sample(execute):
    notebook = execute("sample", LENGTH=24, NUM_SAMPLES=2)
    model = load_pretrained(str(MODEL))
    assert "bd3lm, B = 8, L = 128, V = 2001\n1,541,329 parameters" in notebook.printed("load_pretrained(MODEL)")

    plain = notebook.printed("model.sample(num_samples=NUM_SAMPLES, max_length=LENGTH):")
    assert all(sample.text in plain for sample in model.sample(num_samples=2, max_length=24))
    page = html.unescape(notebook.shown("model.replay(", "text/html"))
    traces = json.loads(re.search(r'<script type="application/json" id=data>(.*?)</script>', page, re.DOTALL)[1])
    prompted = model.sample("The city of", num_samples=2, max_length=24)
    assert ["".join(piece[0] for piece in trace["pieces"]) for trace in traces] == [each.text for each in prompted]
    assert len(notebook.shown("plt.scatter", "image/png")) > 1000
    (streamed,) = model.sample("The river is", num_samples=1, max_length=24, seed=1)
    assert notebook.printed("bd3_jax.stream(") == streamed.text

    filled = notebook.printed("infill=")
    assert len(re.findall(r"^The [^[\n]+ was an American [^[\n]+ and writer\.$", filled, re.MULTILINE)) == 2
    likelihoods = notebook.figures("shuffled")
    assert likelihoods["sentences"][1] < likelihoods["shuffled"][1]
    assert likelihoods["sentences"][1] < likelihoods["README"][1]
    estimates = notebook.figures("for estimator in")
    (drawn, error), (steady, smaller) = estimates["monte_carlo"], estimates["low_variance"]
    assert abs(drawn - steady) < 5 * (error**2 + smaller**2) ** 0.5
    assert estimates["left_to_right"][0] == pytest.approx(likelihoods["README"][0], abs=0.006)  # two digits there
    assert estimates["left_to_right"][0] == pytest.approx(steady, rel=0.2)
    calls = notebook.figures("tokens_per_step")
    assert (calls["first_hitting"][0], calls["confidence"][0]) == (23, 6)
    assert calls["threshold"][0] <= 23


def test_train(execute, tmp_path):
    """On a text that is learnt at once: the order of four words."""
    (tmp_path / "mine").mkdir()
    rng = random.Random(0)
    for number in range(120):
        words = " ".join(" ".join(["red", "green", "blue", "white"]) for _ in range(rng.randrange(60, 80)))
        (tmp_path / "mine" / f"{number}.txt").write_text(words)
    notebook = execute("train", TEXT=[str(tmp_path / "mine")], FOLDER=str(tmp_path / "made"), STEPS=20)
    workdir = tmp_path / "made" / "run"

    assert notebook.printed("def passages").startswith("120 documents, ")
    records = read_metrics(workdir)
    perplexities = {record["step"]: record["eval/perplexity"] for record in records if "eval/perplexity" in record}
    assert list(perplexities) == [0, 5, 10, 15, 20, 25, 30, 35, 40]
    assert perplexities[40] < perplexities[20] < perplexities[0]
    assert "20,480 tokens, " in notebook.printed("flops_per_token(model)")
    for code in ("def curves", "settings.training.num_steps = 2 * STEPS"):
        assert len(notebook.shown(code, "image/png")) > 1000
    assert f"{workdir}: continues after step 20 of 40" in notebook.printed("settings.training.num_steps = 2 * STEPS")
    (sample,) = load_pretrained(str(workdir)).sample("def ", num_samples=1, seed=1)
    assert notebook.printed("longer.sample(") == f"40 steps\n{sample.text}\n"
    assert "Training loss, nats per token" in (workdir / "report.html").read_text()


def test_one_block(execute):
    notebook = execute("one_block", NUM_BLOCKS=3, NUM_DRAWS=60)
    x0, xt = masks_of(notebook.shown("draw_training(", "text/html"))
    printed = re.findall(r"t = [\d.]+, (\d) of 8 masked", notebook.printed("draw_training("))
    assert x0 == 0
    assert xt == sum(map(int, printed)) > 0
    for code in ("draw_times(jax", "block_diffusion_mask(L, B)", '"weight 1/t"', "plt.hist("):
        assert len(notebook.shown(code, "image/png")) > 1000
    before, changed, *after = re.findall(r"\d\.\d\d", notebook.printed("moved"))
    assert (before, changed) == ("0.00", "0.00")
    assert all(float(change) > 0.1 for change in after)
    total, by_hand = re.findall(r"\d+\.\d+", notebook.printed("subs_log_probs"))
    assert float(total) == pytest.approx(float(by_hand), abs=0.002)
    drawn = re.findall(rf"(\w+) +mean {NUMBER} \+- {NUMBER}, spread {NUMBER}", notebook.printed("plt.hist("))
    (name, *first), (_, *second) = drawn
    (mean, error, spread), (other, other_error, smaller) = (map(float, values) for values in (first, second))
    assert name == "monte_carlo"
    assert abs(mean - other) < 5 * (error**2 + other_error**2) ** 0.5
    assert smaller < spread
    # A mask fewer at every call, and the sampler's tokens at the end.
    given, *pictures = masks_of(notebook.shown("FirstHitting()", "text/html"))
    assert (given, pictures) == (0, [8, 7, 6, 5, 4, 3, 2, 1, 0])
    loop, sampled = (line.split(":", 1)[1].strip() for line in notebook.printed("(sample,)").splitlines())
    assert loop == sampled != ""


def masks_of(page):
    """The number of masks in each row of boxes."""
    return [row.count("&#9617;</span>") for row in re.findall(r"<div.*?</div>", page, re.DOTALL)]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_kept(name):
    """From one execution from top to bottom, with nothing of the machine in them."""
    path = FOLDER / f"{name}.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 1
    assert not re.search(r"(?<![\w./:>])/(home|root|work|tmp|Users)/", path.read_text(encoding="utf-8"))
    assert path.stat().st_size < 2**20
