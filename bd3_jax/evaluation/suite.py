"""`bd3 eval --suite=zeroshot`: perplexity on other corpora than the one of training (Block Diffusion, table 5)."""

import dataclasses
from typing import Any

import jax
from etils import epath

from bd3_jax.config import Config
from bd3_jax.data.manifest import is_prepared, load_manifest
from bd3_jax.data.pipeline import open_dataset
from bd3_jax.errors import UserError
from bd3_jax.evaluation.perplexity import check_tokenizer, evaluate_params, open_run
from bd3_jax.evaluation.result import Result, describe
from bd3_jax.folders import require_writable
from bd3_jax.metrics import EVALUATIONS, append_metrics

# Corpus, its name in the paper, the split that is evaluated, and what the paper found for the models of `PUBLISHED`.
ZEROSHOT = (
    ("ptb", "PTB", "validation"),
    ("wikitext103", "WikiText", "validation"),
    ("lm1b", "LM1B", "test"),
    ("lambada", "LAMBADA", "test"),
    ("ag_news", "AG News", "test"),
    ("pubmed_papers", "PubMed", "validation"),
    ("arxiv_papers", "arXiv", "validation"),
)
# (objective, block size; 0: the only one) -> perplexities in that order, of models trained on OWT without EOS.
PUBLISHED = {
    ("ar", 0): (81.07, 25.32, 51.14, 52.13, 52.11, 48.59, 41.22),
    ("sedd", 0): (96.33, 35.98, 68.14, 48.93, 67.82, 45.39, 40.03),
    ("mdlm", 0): (90.96, 33.22, 64.94, 48.29, 62.78, 43.13, 37.89),
    ("bd3lm", 4): (96.81, 31.31, 60.88, 50.03, 61.67, 42.52, 39.20),
}


def evaluate_suite(
    config: Config, workdir: epath.Path, folder: epath.Path, step: int | None = None
) -> dict[str, Result]:
    """Evaluates a checkpoint of a run on every prepared corpus of `ZEROSHOT`; prints and records the table.

    Rows have BOS and EOS around them and nothing between documents, as in the paper; BOS is given, and not counted, to
    every model. Rows are taken as they are, whatever `eval.without_special` says, and by `eval.estimator` alone. The
    tokenizer is the run's. With TOKENIZER the name of a published one, or WORKDIR/tokenizer where it was trained, a
    corpus is prepared by

        bd3 prepare --config=CONFIG --config.data.corpus=ptb --config.data.directory=data/zeroshot/ptb \
            --config.data.tokenizer=TOKENIZER --config.data.insert_special=True --config.data.insert_eos=False

    Args:
      config: settings of the run, and how to evaluate.
      workdir: the run.
      folder: holds one prepared folder for each corpus, of its name.
      step: of the checkpoint; the newest by default.

    Returns:
      results by corpus.

    Raises:
      UserError: none is prepared, or one with other settings.
    """
    prepared = [corpus for corpus, *_ in ZEROSHOT if is_prepared(folder / corpus)]
    if not prepared:
        raise UserError(f"--suite_data is {str(folder)!r}; allowed: a folder with one of {_names()} prepared in it")
    require_writable(workdir, "--workdir")
    rows = {}
    for corpus, _, split in ZEROSHOT:
        if corpus in prepared:
            made = load_manifest(folder / corpus).settings
            data = dataclasses.replace(
                config.data, mode="prepared", corpus=corpus, source="", field="", directory=str(folder / corpus),
                tokenizer=made.tokenizer, vocab_size=made.vocab_size or config.data.vocab_size,
                insert_special=True, insert_eos=False,
            )  # fmt: skip
            rows[corpus] = open_dataset(data, config.model.length, split)
            check_tokenizer(rows[corpus], workdir)  # by what is in it: another name does not matter
    run, first = open_run(config, workdir, rows[prepared[0]], step), jax.process_index() == 0
    lm = dataclasses.replace(run.lm, noise=dataclasses.replace(run.lm.noise, ignore_bos=True))
    results = {
        corpus: evaluate_params(lm, run.params, dataset, config.eval, sharding=run.split, progress=first)
        for corpus, dataset in rows.items()
    }
    if first:
        print(table(config, workdir.name, results))
        how, names = next(iter(results.values())), ("estimator", "weights", "seed", "batch_size")
        record: dict[str, Any] = {"step": run.step, **{f"zeroshot/{name}": getattr(how, name) for name in names}}
        for corpus, result in results.items():
            for name in ("nll", "standard_error", "perplexity", "tokens"):
                record[f"zeroshot/{corpus}/{name}"] = getattr(result, name)
        append_metrics(workdir, record, EVALUATIONS)
    return results


def table(config: Config, name: str, results: dict[str, Result]) -> str:
    """Ours, with their standard errors in a row; then what the paper has of that model, as a table of its own."""
    found = [results.get(corpus) for corpus, *_ in ZEROSHOT]
    titles = ["", *(title for _, title, _ in ZEROSHOT)]
    ours = [
        titles,
        [name, *(f"{result.perplexity:.2f}" if result else "-" for result in found)],
        ["standard error", *(f"{result.perplexity_standard_error:.2f}" if result else "-" for result in found)],
    ]
    kind = f"perplexity ({describe(next((result.estimator for result in found if result), 'exact'))})"
    missing = [corpus for corpus, *_ in ZEROSHOT if corpus not in results]
    notes = [f"{kind}; rows of {config.model.length} tokens with BOS and EOS, nothing between documents"]
    if missing:
        notes.append(f"not prepared: {', '.join(missing)}")
    block_size = config.block_size if config.objective == "bd3lm" else 0
    model = f"{config.objective}, B = {block_size}" if block_size else config.objective
    paper = PUBLISHED.get((config.objective, block_size))
    published = [f"published (table 5): {'a model trained on OpenWebText' if paper else f'none for {model}'}"]
    if paper:
        published = ["", *published, *_lines([titles, [model, *(f"{value:.2f}" for value in paper)]])]
    return "\n".join([*_lines(ours), *notes, *published])


def _lines(rows: list[list[str]]) -> list[str]:
    return ["  ".join([f"{row[0]:<20.20}", *(f"{cell:>9}" for cell in row[1:])]).rstrip() for row in rows]


def _names() -> str:
    return ", ".join(corpus for corpus, *_ in ZEROSHOT)
