"""lm_eval's harness on a trained model, offline: two tasks made of held-out documents, and their likelihood.

    pip install -e '.[eval]'
    python experiments/harness_tasks.py --workdir=runs/quickstart

Writes the tasks to --tasks, as YAML and JSONL files that the harness reads, from the documents of the validation split:

| task | question | chance |
| --- | --- | --- |
| bd3_continuation | which of four orders of eight words follows a document's first 32 words | 1/4 |
| bd3_cloze | the last of 32 words, if greedy decoding finds it (`acc`); its perplexity | the commonest |
| bd3_documents | the likelihood of whole documents, in rolling windows | |

and runs them with every estimator of the likelihood: four minutes on two cores. The same by hand:

    bd3 lm_eval --model bd3 --model_args pretrained=runs/quickstart,estimator=low_variance \
        --include_path data/harness --tasks bd3_continuation,bd3_cloze --batch_size 16
"""

import argparse
import collections
import json
import math
import os
import random
import sys
from pathlib import Path
from typing import Any

from etils import epath
from recording import RESULTS, Recording

from bd3_jax import runtime
from bd3_jax.checkpoints.run_folder import read_config
from bd3_jax.command_line import exit_status
from bd3_jax.config import DataConfig
from bd3_jax.data.pipeline import open_dataset

ESTIMATORS = ("low_variance", "monte_carlo", "left_to_right", "most_confident")
PASSAGE, CONTINUATION = 32, 8  # words
TASKS = {
    "bd3_continuation": """\
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: " "
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "bd3_cloze": """\
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: "{{' ' + word}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
""",
    "bd3_documents": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: bits_per_byte}
""",
}


def documents(data: DataConfig, length: int) -> list[str]:
    """Those of the validation split that begin and end in its rows."""
    dataset = open_dataset(data, length, "validation")
    tokens = dataset.read(range(len(dataset))).reshape(-1).tolist()
    texts, text = [], []
    for token in tokens:
        if token == dataset.tokenizer.ids.eos:
            texts.append(dataset.tokenizer.decode(text))
            text = []
        else:
            text.append(token)
    return texts


def questions(texts: list[str]) -> dict[str, list[dict[str, Any]]]:
    """The records of every task."""
    long = [words for words in (text.split() for text in texts) if len(words) >= PASSAGE + CONTINUATION]
    continuation, cloze = [], []
    for index, words in enumerate(long):
        context, answer = " ".join(words[:PASSAGE]), index % 4
        right = words[PASSAGE : PASSAGE + CONTINUATION]
        shuffle = random.Random(index)
        choices = [" ".join(shuffle.sample(right, CONTINUATION)) for _ in range(4)]
        choices[answer] = " ".join(right)
        continuation.append({"context": context, "choices": choices, "answer": answer})
        if words[PASSAGE - 1].isalpha():
            cloze.append({"context": " ".join(words[: PASSAGE - 1]), "word": words[PASSAGE - 1]})
    whole = [{"text": text} for text in texts if text.strip()]
    return {"bd3_continuation": continuation, "bd3_cloze": cloze, "bd3_documents": whole}


def write_tasks(records: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """A YAML and a JSONL file for each task."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in records.items():
        path = (folder / f"{name}.jsonl").absolute()
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = f"dataset_path: json\ndataset_kwargs:\n  data_files: {{test: {json.dumps(str(path))}}}\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{source}test_split: test\n{TASKS[name]}")


def chances(records: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Of an answer without a model: a random choice; for the cloze the word that is the answer most often."""
    words = collections.Counter(row["word"] for row in records["bd3_cloze"])
    return {"bd3_continuation": 0.25, "bd3_cloze": max(words.values()) / words.total()}


def measure(workdir: epath.Path, estimator: str, folder: Path, batch_size: int, limit: int) -> dict[str, Any]:
    """Figures of every task, by the harness."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # the tasks are files here
    import lm_eval
    from lm_eval.tasks import TaskManager

    import bd3_jax.harness  # noqa: F401  the model `bd3`

    results = lm_eval.simple_evaluate(
        model="bd3",
        model_args={"pretrained": str(workdir), "estimator": estimator},
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=batch_size,
        limit=limit,
        log_samples=False,
        bootstrap_iters=1000,
    )
    number = lambda value: value if isinstance(value, int | float) else None
    figures = {
        task: {name.split(",")[0]: number(value) for name, value in found.items() if "," in name}
        for task, found in results["results"].items()
    }
    counts = {task: count["effective"] for task, count in results["n-samples"].items()}
    return {"tasks": figures, "counts": counts, "model": results["config"]["bd3"]}


def table(found: dict[str, dict[str, Any]], chance: dict[str, float]) -> str:
    """Rows are estimators."""

    def cell(figures: dict[str, Any], name: str, scale: float = 1) -> str:
        error = figures.get(f"{name}_stderr")
        return f"{figures[name] * scale:.1f}" + (f" +- {error * scale:.1f}" if error is not None else "")

    counts = next(iter(found.values()))["counts"]
    lines = [
        "| likelihood | continuation, % | last word, % | perplexity of it | documents, nats per word | bits per byte |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for figures in found.values():
        first, second, third = (figures["tasks"][task] for task in TASKS)
        lines.append(
            f"| {figures['model']['likelihood']} | {cell(first, 'acc', 100)} | {cell(second, 'acc', 100)} | "
            f"{cell(second, 'perplexity')} | {math.log(third['word_perplexity']):.3f} | {third['bits_per_byte']:.3f} |"
        )
    first, second = (f"{100 * chance[task]:.1f}" for task in chance)
    lines += [f"| chance | {first} | {second} | | | |", ""]
    lines.append("; ".join(f"{task}: {count}" for task, count in counts.items()) + " questions or texts")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=epath.Path, default=epath.Path("runs/quickstart"))
    parser.add_argument("--tasks", type=Path, default=Path("data/harness"), help="where the tasks are written")
    parser.add_argument("--limit", type=int, default=100, help="of each task, its first so many")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--out", type=Path, default=RESULTS / "harness")
    own = parser.parse_args(argv)
    runtime.start()
    config = read_config(own.workdir)
    records = questions(documents(config.data, config.model.length))
    write_tasks(records, own.tasks)
    recording = Recording(own.out)
    found = {
        estimator: recording.cell(
            {"estimator": estimator, "limit": own.limit},
            config.to_dict(),
            lambda estimator=estimator: measure(own.workdir, estimator, own.tasks, own.batch_size, own.limit),
        )
        for estimator in ESTIMATORS
    }
    text = table(found, chances({task: rows[: own.limit] for task, rows in records.items()}))
    recording.write_table(text)
    print(text)


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
