"""How much less the low-variance estimator of the NELBO varies than Monte Carlo, at the same cost, on trained models.

    python experiments/estimator_variance.py
    python experiments/estimator_variance.py --workdirs=runs/quickstart,runs/mdlm

By default on the runs that interval_variance.py leaves. Some validation batches are estimated again and again by both
estimators, one pass of the network each: what varies is noise alone. `ratio` is that of the variances of a batch's
NLL, `at equal cost` that of variance times seconds. The means must agree. About nine minutes on two cores.
"""

import argparse
import dataclasses
import math
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np
from etils import epath
from recording import RESULTS, Recording
from tqdm import tqdm

from bd3_jax import runtime
from bd3_jax.checkpoints.run_folder import read_config
from bd3_jax.command_line import exit_status
from bd3_jax.config import Config
from bd3_jax.data.pipeline import eval_batches, open_dataset
from bd3_jax.errors import UserError
from bd3_jax.evaluation.perplexity import estimates, likelihood_program, open_run

ESTIMATORS = ("monte_carlo", "low_variance")
DEFAULT = ",".join(f"runs/interval_variance/block-{size}-steps-600" for size in (4, 8, 16))


def measure(config: Config, workdir: epath.Path, batches: int, draws: int) -> dict[str, object]:
    """NLLs in nats per token, their variance from draw to draw, seconds of a pass."""
    dataset = open_dataset(config.data, config.model.length, config.eval.split)
    step, lm, params, split = open_run(config, workdir, dataset)
    if len(estimates(lm, dataclasses.replace(config.eval, both_estimators=True))) == 1:
        raise UserError(
            f"--workdirs has {workdir}, which has one estimator; allowed: runs of mdlm, or bd3lm with B > 1"
        )
    counted = config.eval.batch_size * int(lm.counted(lm.length).sum())
    programs = {name: likelihood_program(lm, name, split) for name in ESTIMATORS}
    nlls: dict[str, list[list[float]]] = {name: [] for name in ESTIMATORS}
    seconds: dict[str, list[float]] = {name: [] for name in ESTIMATORS}
    if len(dataset) < batches * config.eval.batch_size:
        raise UserError(f"--batches is {batches}, which takes more than the {len(dataset)} rows of {workdir}'s split")
    rows = [batch for batch, _ in eval_batches(dataset, config.eval.batch_size, batches)]
    for index, batch in enumerate(tqdm(rows, "estimating", disable=None)):
        placed = jax.device_put(batch, split)
        for name, program in programs.items():
            nlls[name].append([])
            for draw in range(draws):
                key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.eval.seed), index), draw)
                began = time.perf_counter()
                losses = np.asarray(program(params, placed, key), np.float64)
                seconds[name].append(time.perf_counter() - began)
                nlls[name][-1].append(losses.sum() / counted)
    variances = {name: np.var(nlls[name], axis=1, ddof=1) for name in ESTIMATORS}  # of every batch
    ratios = lambda keep: np.mean(variances["monte_carlo"][keep]) / np.mean(variances["low_variance"][keep])
    everything = np.arange(len(rows))
    without_one = [ratios(everything != index) for index in everything]
    cost = {name: statistics.median(seconds[name]) for name in ESTIMATORS}
    return {
        "step": step,
        "tokens": counted * len(rows),
        "ratio": ratios(everything),
        "ratio_standard_error": math.sqrt(len(rows) - 1) * np.std(without_one),  # jackknife over batches
        "ratio_at_equal_cost": ratios(everything) * cost["monte_carlo"] / cost["low_variance"],
        "estimators": {
            name: {
                "nll": np.mean(nlls[name]),
                "standard_error": math.sqrt(np.mean(variances[name]) / draws / len(rows)),  # of the noise alone
                "variance": np.mean(variances[name]),
                "pass_seconds": cost[name],
            }
            for name in ESTIMATORS
        },
    }


def table(found: dict[str, dict]) -> str:
    heads = ["run", "NLL, Monte Carlo", "NLL, low variance", "variance", "variance", "ratio", "at equal cost"]
    lines = ["Of the NLL of a batch, nats per token, over draws of the noise for the same rows.", ""]
    lines += [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for name, figures in found.items():
        estimators = [figures["estimators"][each] for each in ESTIMATORS]
        cells = [f"{each['nll']:.4f} +- {each['standard_error']:.4f}" for each in estimators]
        cells += [f"{each['variance']:.3g}" for each in estimators]
        cells += [f"{figures['ratio']:.1f} +- {figures['ratio_standard_error']:.1f}"]
        cells += [f"{figures['ratio_at_equal_cost']:.1f}"]
        lines.append(f"| {name}, step {figures['step']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdirs", type=lambda text: text.split(","), default=DEFAULT.split(","))
    parser.add_argument("--batches", type=int, default=8, help="of config.eval.batch_size rows")
    parser.add_argument("--draws", type=int, default=32, help="of each batch by each estimator")
    parser.add_argument("--out", type=Path, default=RESULTS / "estimator_variance")
    own = parser.parse_args(argv)
    for name in ("batches", "draws"):
        if (value := getattr(own, name)) < 2:
            raise UserError(f"--{name} is {value}; allowed: 2 or more")
    runtime.start()
    recording, found = Recording(own.out), {}
    for name in own.workdirs:
        workdir = epath.Path(name)
        config = read_config(workdir)
        cell = {"workdir": name, "batches": own.batches, "draws": own.draws}
        found[name] = recording.cell(
            cell,
            config.to_dict(),
            lambda config=config, workdir=workdir: measure(config, workdir, own.batches, own.draws),
        )
        recording.write_table(table(found))


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
