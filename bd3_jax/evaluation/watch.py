"""`bd3 eval --watch`: evaluates what a run saves while it goes on, in a process or on a machine of its own."""

import time

from etils import epath

from bd3_jax.checkpoints import orbax
from bd3_jax.checkpoints.run_folder import read_config
from bd3_jax.config import Config
from bd3_jax.errors import UserError
from bd3_jax.evaluation.perplexity import evaluate
from bd3_jax.metrics import EVALUATIONS, read_metrics


def watch(config: Config, workdir: epath.Path, seconds: float = 30) -> None:
    """Evaluates every checkpoint that it finds, the earliest first, until that of the run's last step is done.

    Records go to WORKDIR/evaluations.jsonl; steps that stand there with this split are left out. A checkpoint that the
    run removes before its turn, or meanwhile, is passed over.

    Args:
      config: settings of the run, and how to evaluate.
      workdir: the run.
      seconds: between looks for new ones.

    Raises:
      UserError: as `evaluate` does.
    """
    records = read_metrics(workdir, EVALUATIONS)
    done = {record["step"] for record in records if record.get("eval/split") == config.eval.split}
    last = read_config(workdir).training.num_steps
    while last not in done:
        if not (waiting := [step for step in orbax.steps(workdir) if step not in done]):
            time.sleep(seconds)
            continue
        try:
            evaluate(config, workdir, waiting[0])
        except (OSError, ValueError, KeyError, UserError):
            if waiting[0] in orbax.steps(workdir):
                raise
            print(f"checkpoint {waiting[0]} of {workdir} was removed before it was evaluated")
        done.add(waiting[0])
