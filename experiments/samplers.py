"""The samplers side by side on one model: network calls, generative perplexity, entropy and speed, as a table.

    python experiments/samplers.py --workdir=runs/quickstart --out=experiments/results/samplers
    python experiments/samplers.py --out=experiments/results/samplers --judge=FILE.gguf   # where the extra torch is

The first command draws and writes OUT/NAME.jsonl for each sampler and for held-out text; the second scores the texts
that are there. Both write OUT/table.md from what is known. A judge is a causal model, see `bd3 judge --help`.
"""

import json
import sys
from typing import Any

from absl import flags
from etils import epath

from bd3_jax import command_line
from bd3_jax.errors import UserError
from bd3_jax.metrics import read_records

HELD_OUT = "held_out"
SAMPLERS: dict[str, dict[str, Any]] = {
    "first_hitting": dict(sampler="first_hitting"),
    "first_hitting, P = 1": dict(sampler="first_hitting", nucleus=1.0),
    "first_hitting, no cache": dict(sampler="first_hitting", kv_cache=False),
    "ancestral, T = B": dict(sampler="ancestral", num_steps=8),
    "ancestral, T = 1000": dict(sampler="ancestral", num_steps=1000),
    "confidence, 1 a call": dict(sampler="confidence", tokens_per_step=1),
    "confidence, 2 a call": dict(sampler="confidence", tokens_per_step=2),
    "confidence, 4 a call": dict(sampler="confidence", tokens_per_step=4),
    "threshold 0.9": dict(sampler="threshold", threshold=0.9),
    "threshold 0.3": dict(sampler="threshold", threshold=0.3),
    "entropy_bounded 0.1": dict(sampler="entropy_bounded", entropy_bound=0.1),
    "entropy_bounded 4": dict(sampler="entropy_bounded", entropy_bound=4.0),
    "remasking, T = 2B": dict(sampler="remasking", num_steps=16),
}


def main(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "a run to draw from", flag_values=values)
    flags.DEFINE_string("out", None, "where the samples and the table go", flag_values=values)
    flags.DEFINE_string("judge", None, "a causal language model", flag_values=values)
    flags.DEFINE_integer("num_samples", 16, "texts for each sampler", lower_bound=1, flag_values=values)
    unexpected = command_line.positional(argv, values, usage=__doc__)
    if unexpected:
        raise UserError(f"unexpected argument {unexpected[0]!r}")
    out = epath.Path(command_line.required(values, "out", "a folder"))
    out.mkdir(parents=True, exist_ok=True)
    if values.workdir:
        draw(values.workdir, out, values.num_samples)
    if values.judge:
        judge(out, values.judge)
    (out / "table.md").write_text(table(out))
    print(table(out))


def draw(workdir: str, out: epath.Path, num_samples: int) -> None:
    import bd3_jax
    from bd3_jax.data.pipeline import open_dataset

    model = bd3_jax.load_pretrained(workdir)
    length = model.model_config.length
    for name, settings in SAMPLERS.items():
        # A first run compiles what is not compiled yet, and warms up.
        model.sample(num_samples=num_samples, batch_size=num_samples, max_length=length, seed=1, **settings)
        samples = model.sample(num_samples=num_samples, batch_size=num_samples, max_length=length, **settings)
        tokens = sum(len(sample.tokens) for sample in samples) / sum(sample.seconds for sample in samples)
        mean = lambda field, samples=samples: sum(getattr(each, field) for each in samples) / len(samples)
        figures = dict(
            nfe=mean("nfe"), cache_calls=mean("cache_calls"), entropy=mean("entropy"), distinct_2=mean("distinct_2")
        )
        write(out, name, [sample.text for sample in samples], figures | dict(tokens_per_second=tokens))
        print(f"{name}: {figures}, {tokens:.0f} tokens/s", flush=True)
    rows = open_dataset(model.config.data, length, "validation").read(range(num_samples))
    write(out, HELD_OUT, [model.text_tokenizer().decode(row[1:].tolist()) for row in rows], {})


def write(out: epath.Path, name: str, texts: list[str | None], figures: dict[str, float]) -> None:
    lines = [{"name": name, **figures, "text": text} for text in texts]
    (out / f"{file_name(name)}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def judge(out: epath.Path, name: str) -> None:
    import dataclasses

    from bd3_jax.evaluation.generative import TransformersJudge, score

    model = TransformersJudge(name)
    scores = {}
    for path in sorted(out.glob("*.jsonl")):
        records = read_records(path)
        texts = [f"{model.bos}{record['text']}" for record in records]
        scores[records[0]["name"]] = dataclasses.asdict(score(texts, model)[1])
        print(records[0]["name"], scores[records[0]["name"]], flush=True)
    (out / "scores.json").write_text(json.dumps({"judge": epath.Path(name).name, "of": scores}, indent=1) + "\n")


def table(out: epath.Path) -> str:
    path = out / "scores.json"
    scores = json.loads(path.read_text()) if path.exists() else {"judge": "none yet", "of": {}}
    lines = [
        f"Generative perplexity: mean over texts, and pooled, by {scores['judge']}.",
        "",
        "| sampler | NFE | cache calls | perplexity | pooled | entropy | distinct-2 | tokens/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in [*SAMPLERS, HELD_OUT]:
        records = read_records(out / f"{file_name(name)}.jsonl")
        if not records:
            continue
        found, judged = records[0], scores["of"].get(name, {})
        cells = [
            *(number(found.get(key), 1) for key in ("nfe", "cache_calls")),
            *(number(judged.get(key), 1) for key in ("mean_perplexity", "pooled_perplexity")),
            *(number(found.get(key), 3) for key in ("entropy", "distinct_2")),
            number(found.get("tokens_per_second"), 0),
        ]
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


if __name__ == "__main__":
    sys.exit(command_line.exit_status(lambda: main(sys.argv[1:])))
