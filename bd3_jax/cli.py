"""The command `bd3 VERB ARGS`; nothing but wiring."""

import difflib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from absl import flags
from etils import epath

from bd3_jax import command_line
from bd3_jax import main as entry
from bd3_jax.errors import UserError
from bd3_jax.folders import reachable


class Verb(NamedTuple):
    summary: str
    run: Callable[[Sequence[str]], None]  # takes what follows the verb


def prepare(argv: Sequence[str]) -> None:
    """Turns a corpus into rows of tokens.

    bd3 prepare --config=FILE.py[:STRING] [--config.data.NAME=VALUE ...] [--workers=N | --beam=OPTIONS] [--strict]

    --workers: processes; with 1, the default, one process tokenises in all cores
    --beam: on many machines, through Apache Beam; see docs/preparing_large_corpora.md for Dataflow, Flink and Spark
    --strict: a record without text is an error; else it is left out and counted
    """
    values = flags.FlagValues()
    flags.DEFINE_integer("workers", 1, "processes", flag_values=values)
    flags.DEFINE_string("beam", None, "Apache Beam's options", flag_values=values)
    flags.DEFINE_boolean("strict", False, "a record without text is an error", flag_values=values)
    config = command_line.parse(argv, values, usage=prepare.__doc__ or "")
    from bd3_jax.data.prepare import prepare as prepare_rows

    execute = None
    if values.beam is not None:
        from bd3_jax.data.beam import run_on_beam

        execute = partial(run_on_beam, options=values.beam)
    prepare_rows(config.data, config.model.length, values.workers, values.strict, execute)


def inspect(argv: Sequence[str]) -> None:
    """Shows what is in a prepared corpus: counts, lengths of documents, first rows.

    bd3 inspect DATA
    """
    folder = _one_folder(argv, inspect.__doc__ or "", example="bd3 inspect data/quickstart")
    from bd3_jax.data.inspection import inspect as describe

    print(describe(folder))


def report(argv: Sequence[str]) -> None:
    """Writes a run's curves, samples and settings as one page, WORKDIR/report.html.

    bd3 report WORKDIR
    """
    folder = _one_folder(argv, report.__doc__ or "", example="bd3 report runs/quickstart")
    from bd3_jax.evaluation.report import write_report

    print(f"report in {write_report(folder)}")


def judge(argv: Sequence[str]) -> None:
    """How likely another language model finds texts: generative perplexity, entropy, lengths, distinct n-grams.

    bd3 judge FILE.jsonl [--judge=gpt2-large] [--max_length=N]

    FILE.jsonl    samples.jsonl of a run, or any file with an object with a "text" a line
    --judge       a causal model of the library transformers: a name on the hub, a folder, a .gguf file
    --max_length  of the judge's tokens, BOS included; 0: all
    """
    values = flags.FlagValues()
    flags.DEFINE_string("judge", "gpt2-large", "a causal language model", flag_values=values)
    flags.DEFINE_integer("max_length", 0, "tokens", lower_bound=0, flag_values=values)
    paths = command_line.positional(argv, values, usage=judge.__doc__ or "")
    if len(paths) != 1:
        raise UserError(f"bd3 judge takes one file, as in bd3 judge runs/quickstart/samples.jsonl; found {len(paths)}")
    path = reachable(paths[0], "the file")
    from bd3_jax.evaluation import generative

    print(generative.table(generative.judge_file(path, values["judge"].value, values.max_length)))


def _one_folder(argv: Sequence[str], usage: str, example: str) -> epath.Path:
    if "--help" in argv or "-h" in argv:
        print(usage.strip())
        raise SystemExit(0)
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError(f"expected one folder, as in {example}; found {' '.join(argv) or 'none'}")
    return reachable(argv[0], "the folder")


def parity(argv: Sequence[str]) -> None:
    """Computes what the authors' implementation stored of its models, and compares.

    bd3 parity FOLDER... [--atol=2e-5] [--rtol=1e-5]

    A FOLDER holds a checkpoint and io.npz, or such folders; schedules.npz and ema.npz beside them are checked too.
    Every array must agree: |ours - stored| <= atol + rtol |stored|. Exits 1 if one does not, or is missing.
    """
    values = flags.FlagValues()
    flags.DEFINE_float("atol", 2e-5, "absolute tolerance", lower_bound=0, flag_values=values)
    flags.DEFINE_float("rtol", 1e-5, "relative tolerance", lower_bound=0, flag_values=values)
    folders = command_line.positional(argv, values, usage=parity.__doc__ or "")
    if not folders:
        raise UserError("bd3 parity takes folders, as in bd3 parity tests/golden")
    from bd3_jax import parity as checks

    found = checks.parity(folders, values["atol"].value, values["rtol"].value)
    print(checks.table(found))
    if any(check.problem for check in found):
        raise SystemExit(1)


def convert(argv: Sequence[str]) -> None:
    """Writes a checkpoint in the authors' layout, or in ours.

    bd3 convert SOURCE DEST [--weights=ema|raw] [--step=N] [--format=pytorch|bd3] [--tokenizer=NAME_OR_PATH]

    SOURCE  a workdir (its newest checkpoint, or that of --step), a folder or file of the authors' layout, or a hub id
    DEST    a folder that does not exist yet: model.safetensors and config.json (pytorch, on a local disk), or a workdir
            that eval and sample take and training starts from with --config.init_from=DEST (bd3); with a model card
    """
    values = flags.FlagValues()
    flags.DEFINE_enum("weights", "ema", ("ema", "raw"), "which weights of SOURCE", flag_values=values)
    flags.DEFINE_enum("format", "pytorch", ("pytorch", "bd3"), "layout of DEST", flag_values=values)
    flags.DEFINE_string("tokenizer", None, "what SOURCE was trained with, if it does not say", flag_values=values)
    flags.DEFINE_integer("step", None, "of the checkpoint of SOURCE", lower_bound=0, flag_values=values)
    paths = command_line.positional(argv, values, usage=convert.__doc__ or "")
    if len(paths) != 2:
        raise UserError(f"bd3 convert takes SOURCE and DEST, found {' '.join(paths) or 'nothing'}")
    from bd3_jax.convert import convert as write

    options = {name: values[name].value for name in ("weights", "format", "tokenizer", "step")}
    print(f"written to {write(*paths, **options)}")


def replay(argv: Sequence[str]) -> None:
    """Repeats the step at which a training stopped since loss or gradient were not finite (exit status 3).

    bd3 replay --workdir=DIR [--config.GROUP.NAME=VALUE ...]

    Prints key, interval, loss, gradient norm and which gradients are not finite. Exits 1 if it is not the same step.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    config = command_line.parse(argv, values, usage=replay.__doc__ or "")
    workdir = reachable(command_line.required(values, "workdir", "the folder of the run"), "--workdir")
    from bd3_jax import runtime
    from bd3_jax.training.replay import replay as repeat

    runtime.start()
    if not repeat(config, workdir):
        raise SystemExit(1)


def compile_program(argv: Sequence[str]) -> None:
    """Compiles the program of a run for a machine that is not at hand, and says whether it fits (exit 0, else 1).

    bd3 compile --config=FILE.py[:STRING] --topology=CHIP:SHAPE [--mode=train|eval|sample] [--search] [--json=FILE]

    --topology: v5e:16x16, v5p:2x2x1, v6e:2x4 (with the extra tpu), h100:8 (with the extra cuda), cpu:4 (this machine);
                2xv5e:16x16 for two slices
    --search: the largest batch a chip holds, for each rematerialisation policy
    --vocab_size: V with the mask, for tokenizers whose size is not known; neither data nor tokenizer is read
    --json: write the figures to this file too
    """
    values = flags.FlagValues()
    flags.DEFINE_string("topology", None, "machine to compile for", flag_values=values)
    flags.DEFINE_enum("mode", "train", entry.MODES, "which program", flag_values=values)
    flags.DEFINE_boolean("search", False, "find the largest batch that fits", flag_values=values)
    flags.DEFINE_integer("vocab_size", 0, "V with the mask", lower_bound=0, flag_values=values)
    flags.DEFINE_string("json", None, "file for the figures", flag_values=values)
    config = command_line.parse(argv, values, usage=compile_program.__doc__ or "")
    topology = command_line.required(values, "topology", "CHIP:SHAPE, as in --topology=v5e:16x16")
    from bd3_jax.compiling.run import main as compile_and_tell

    if not compile_and_tell(config, topology, values.mode, values.vocab_size, values.search, values["json"].value):
        raise SystemExit(1)


def lm_eval(argv: Sequence[str]) -> None:
    """Runs lm_eval's harness, its own command line, with our models in it under the name bd3 (extra eval).

    bd3 lm_eval --model bd3 --model_args pretrained=SOURCE[,NAME=VALUE...] --tasks TASK... [ARGS]

    SOURCE     a workdir, a folder or file of the authors' layout, or a hub id
    NAME       estimator: low_variance, monte_carlo, left_to_right, most_confident; draws: of the noise for each text;
               seed; objective, block_size, tokenizer, revision, weights, step: as in bd3_jax.load_pretrained
    ARGS       of lm_eval run, as --include_path, --batch_size, --output_path; bd3 lm_eval run --help tells all
    """
    if not argv or argv[0] in ("--help", "-h"):
        print((lm_eval.__doc__ or "").strip())
        raise SystemExit(0)
    from bd3_jax import runtime

    try:
        from bd3_jax import harness
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise UserError(f"bd3 lm_eval needs {package}: pip install 'bd3_jax[eval]'") from None
    runtime.start()
    harness.main(argv)


VERBS = {
    "prepare": Verb("turn a corpus into rows of tokens", prepare),
    "inspect": Verb("what is in a prepared corpus", inspect),
    "train": Verb("train a model, or train it on", partial(entry.run, mode="train")),
    "eval": Verb("likelihood and perplexity of a checkpoint on a prepared split", partial(entry.run, mode="eval")),
    "sample": Verb("generate text from a checkpoint", partial(entry.run, mode="sample")),
    "lm_eval": Verb("tasks of lm_eval's harness", lm_eval),
    "judge": Verb("generative perplexity of samples, by another language model", judge),
    "convert": Verb("write a checkpoint in the authors' layout, or in ours", convert),
    "parity": Verb("compare with numbers stored by the authors' implementation", parity),
    "compile": Verb("whether a run fits a machine that is not at hand, and what it costs", compile_program),
    "replay": Verb("repeat the step at which a training found its numbers not finite", replay),
    "report": Verb("a run's curves, samples and settings as one HTML page", report),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs argv (without the program's name; sys.argv by default) and returns the exit status."""
    return command_line.exit_status(lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("--help", "-h"):
        print("usage: bd3 VERB ARGS (bd3 VERB --help tells which)\n")
        print("\n".join(f"  {name:9} {verb.summary}" for name, verb in VERBS.items()))
        return
    name, *rest = argv
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(VERBS)}"
        raise UserError(f"unknown verb {name!r}; {hint}")
    VERBS[name].run(rest)


if __name__ == "__main__":
    sys.exit(main())
