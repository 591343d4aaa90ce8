"""Trains, evaluates or samples a model.

bd3 train|eval|sample --config=FILE.py[:STRING] --workdir=DIR [--config.GROUP.NAME=VALUE ...]
python -m bd3_jax.main --mode=train|eval|sample (the same flags)

bd3 eval --watch               evaluates every checkpoint that the run saves, until its last; in one process
bd3 eval --suite=zeroshot      evaluates on every corpus of the paper's table 5 that is prepared as
                               --suite_data/CORPUS; prints the published figures below, in a table of their own

--config   settings, as in configs/quickstart.py:bd3lm,block_size=8; without it, those in DIR/config.json
--workdir  folder of the run: checkpoints, metrics, samples
--step     (eval, sample) of the checkpoint; without it, the newest
--trace    (sample) also writes DIR/trace.html, which replays how the samples were drawn
--watch    (sample) shows the samples in the terminal as they fill up, one at a time
--config.GROUP.NAME=VALUE  overrides one setting; configs/base.py lists them with their meaning

On several hosts the same command runs on each. They find each other on TPU and under Slurm; elsewhere by
--coordinator=HOST:PORT of process 0, --num_processes and --process_id (or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES
and JAX_PROCESS_ID in the environment). A process that is not heard of for --heartbeat_timeout seconds ends the run.
"""

import sys
from collections.abc import Sequence

from absl import flags

from bd3_jax import command_line
from bd3_jax.errors import UserError
from bd3_jax.folders import reachable

MODES = ("train", "eval", "sample")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs argv (without the program's name; sys.argv by default) and returns the exit status."""
    return command_line.exit_status(lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str], mode: str | None = None) -> None:
    """Runs `mode`, or the mode that --mode names where none is given."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    if mode is None:
        flags.DEFINE_enum("mode", None, MODES, "what to do", flag_values=values)
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "how many there are", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("process_id", None, "which one this is", lower_bound=0, flag_values=values)
    flags.DEFINE_integer("heartbeat_timeout", 100, "seconds", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("step", None, "of the checkpoint", lower_bound=0, flag_values=values)
    flags.DEFINE_boolean("trace", False, "write a replay of the samples", flag_values=values)
    flags.DEFINE_boolean("watch", False, "evaluate every checkpoint, or show samples as they fill", flag_values=values)
    flags.DEFINE_enum("suite", None, ("zeroshot",), "corpora to evaluate on", flag_values=values)
    flags.DEFINE_string("suite_data", "data/zeroshot", "folder with a prepared folder a corpus", flag_values=values)
    config = command_line.parse(argv, values, usage=__doc__)
    where = command_line.required(values, "workdir", "a folder, as in --workdir=runs/quickstart")
    workdir = reachable(where, "--workdir")
    mode = mode or command_line.required(values, "mode", f"one of {', '.join(MODES)}")

    step, traced, watched, suite = (values[name].value for name in ("step", "trace", "watch", "suite"))
    both = ("eval", "sample")
    for name, allowed in (("step", both), ("trace", ("sample",)), ("watch", both), ("suite", ("eval",))):
        if values[name].value != values[name].default and mode not in allowed:
            raise UserError(f"--{name} is for {' and '.join(allowed)}, not for {mode}")
    if mode == "eval" and watched and (suite or step is not None):
        raise UserError(f"--watch and --{'suite' if suite else 'step'} are both given; allowed: one of them")

    # Imported here, so that a mistake is reported at once and before any device is taken.
    from bd3_jax import runtime

    names = ("coordinator", "num_processes", "process_id", "heartbeat_timeout")
    runtime.start(runtime.Processes.of(*(values[name].value for name in names)))
    with runtime.alongside_others():
        if mode == "train":
            from bd3_jax.training.loop import train

            train(config, workdir)
        elif mode == "sample":
            from bd3_jax.sampling.run import sample

            sample(config, workdir, step, trace=traced, watch=watched)
        elif watched:
            from bd3_jax.evaluation.watch import watch

            watch(config, workdir)
        elif suite:
            from bd3_jax.evaluation.suite import evaluate_suite

            evaluate_suite(config, workdir, reachable(values["suite_data"].value, "--suite_data"), step)
        else:
            from bd3_jax.evaluation.perplexity import evaluate

            evaluate(config, workdir, step)


if __name__ == "__main__":
    sys.exit(main())
