"""`bd3 eval --watch`: evaluates what a run saves while it goes on, in a process or on a machine of its own."""

import time

import jax
from etils import epath

from bd3_jax.checkpoints import orbax
from bd3_jax.checkpoints.run_folder import read_config
from bd3_jax.config import Config
from bd3_jax.errors import UserError
from bd3_jax.evaluation.perplexity import evaluate
from bd3_jax.metrics import EVALUATIONS, Record, read_metrics, weights_of


def watch(config: Config, workdir: epath.Path, seconds: float = 30) -> None:
    """Evaluates every checkpoint that it finds, the earliest first, until none waits and the run's last step is done.

    Records go to WORKDIR/evaluations.jsonl; steps that stand there with these settings are left out. A checkpoint that
    the run removes before its turn, or meanwhile, is passed over.

    Args:
      config: settings of the run, and how to evaluate.
      workdir: the run.
      seconds: between looks for new ones.

    Raises:
      UserError: as `evaluate` does; or for several processes, of which some might still read a checkpoint that others
        find removed.
    """
    if (processes := jax.process_count()) > 1:
        raise UserError(f"--watch is given to {processes} processes; allowed: one, or bd3 eval --step=N in all")
    done = {record["step"] for record in read_metrics(workdir, EVALUATIONS) if _is_done_so(record, config)}
    # The last step is asked for anew, since a run may be continued with another number of steps.
    while (waiting := [s for s in orbax.steps(workdir) if s not in done]) or not _is_done(workdir, done):
        if not waiting:
            time.sleep(seconds)
            continue
        try:
            evaluate(config, workdir, waiting[0])
        except (OSError, ValueError, KeyError, UserError):
            if waiting[0] in orbax.steps(workdir):
                raise
            print(f"checkpoint {waiting[0]} of {workdir} was removed before it was evaluated")
        done.add(waiting[0])
    print(f"every checkpoint of {workdir} is evaluated")


def _is_done(workdir: epath.Path, evaluated: set[int]) -> bool:
    last = read_config(workdir).training.num_steps
    return any(step >= last for step in evaluated)


def _is_done_so(record: Record, config: Config) -> bool:
    """Whether it is an evaluation with these settings. What records of before do not say counts as the same."""
    e, data = config.eval, config.data
    plain = e.without_special == "always"
    wanted = {
        "split": e.split,
        "insert_special": data.insert_special and not plain,
        "insert_eos": data.insert_eos and not plain,
    }
    return (
        all(record.get(f"eval/{name}") == value for name, value in wanted.items())
        and record.get("eval/estimator") in ("exact", e.estimator)
        and weights_of(record) == e.weights
        and record.get("eval/seed", e.seed) == e.seed
        and record.get("eval/batch_size", e.batch_size) == e.batch_size
    )
