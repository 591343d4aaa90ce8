"""Trains, evaluates or samples a model; nothing but wiring.

bd3 train|eval|sample --config=FILE.py[:STRING] --workdir=DIR [--config.GROUP.NAME=VALUE ...]
python -m bd3_jax.main --mode=train|eval|sample (the same flags)

--config   settings, as in configs/quickstart.py:bd3lm,block_size=8; without it, those in DIR/config.json
--workdir  folder of the run: checkpoints, metrics, samples
--trace    (sample) also writes DIR/trace.html, which replays how the samples were drawn
--watch    (sample) shows the samples in the terminal as they fill up, one at a time
--config.GROUP.NAME=VALUE  overrides one setting; configs/base.py lists them with their meaning
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
    for name in ("trace", "watch"):
        flags.DEFINE_boolean(name, False, "of sample", flag_values=values)
    if mode is None:
        flags.DEFINE_enum("mode", None, MODES, "what to do", flag_values=values)
    config = command_line.parse(argv, values, usage=__doc__)
    where = command_line.required(values, "workdir", "a folder, as in --workdir=runs/quickstart")
    workdir = reachable(where, "--workdir")
    mode = mode or command_line.required(values, "mode", f"one of {', '.join(MODES)}")

    if mode != "sample" and (values.trace or values.watch):
        raise UserError(f"--{'trace' if values.trace else 'watch'} is for sample, found it with {mode}")

    # Imported here, so that a mistake is reported at once and before any device is taken.
    from bd3_jax import runtime

    runtime.start()
    if mode == "train":
        from bd3_jax.training.loop import train

        train(config, workdir)
    elif mode == "eval":
        from bd3_jax.evaluation.perplexity import evaluate

        evaluate(config, workdir)
    else:
        from bd3_jax.sampling.run import sample

        sample(config, workdir, trace=values.trace, watch=values.watch)


if __name__ == "__main__":
    sys.exit(main())
