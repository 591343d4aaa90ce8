"""The models that the paper compares, in miniature: one transformer, corpus, number of tokens and seed for all.

Trained by `likelihood.py`, and read by every script that says something of a trained model. A BD3-LM is an MDLM for the
first half of its steps, and goes on from there with blocks of its own and a search of its interval, as in section 6 of
the paper (whose first part is 85 % of the steps: in so few, the second would be too short). All read as many tokens.
"""

import argparse
import dataclasses

from etils import epath

from bd3_jax.checkpoints.orbax import latest_step
from bd3_jax.checkpoints.run_folder import read_config
from bd3_jax.config import Config
from bd3_jax.config_dict import from_config_dict
from bd3_jax.configs import quickstart
from bd3_jax.data.prepare import prepare
from bd3_jax.training.loop import train

STEPS = 6_000
SEEDS = (0, 1, 2)
# Name -> config string, in the paper's order of perplexity, the lowest first.
MODELS = {
    "AR": "ar",
    "BD3-LM B = 4": "bd3lm,block_size=4",
    "BD3-LM B = 8": "bd3lm,block_size=8",
    "BD3-LM B = 16": "bd3lm,block_size=16",
    "MDLM": "mdlm",
    "SEDD": "sedd",
}
FIRST_HALF = "first half"
RUNS = epath.Path("runs/small_models")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """--steps and --runs: which models a script reads."""
    parser.add_argument("--steps", type=int, default=STEPS, help="of the training of each model")
    parser.add_argument("--runs", type=epath.Path, default=RUNS, help="folder of all models")


def add_seeds(parser: argparse.ArgumentParser) -> None:
    """--seeds, for scripts that train."""
    numbers = lambda text: [int(number) for number in text.split(",")]
    parser.add_argument("--seeds", type=numbers, default=list(SEEDS), help="of the models, commas between them")


def settings(string: str, seed: int, steps: int = STEPS) -> Config:
    """1.5 million parameters, rows of 128 tokens that run on across documents, without BOS and EOS around them."""
    config = quickstart.get_config(string)
    config.seed = seed
    config.model.dropout = 0.1  # several epochs
    config.noise.update(low=1e-3, high=1.0, resample=config.objective == "bd3lm")
    config.training.update(num_steps=steps, eval_every=steps // 2, checkpoint_every=1000, keep_checkpoints=1)
    config.search.update(enabled=config.objective == "bd3lm", num_batches=4)
    return from_config_dict(config)


def workdir(name: str, seed: int | str, steps: int = STEPS, runs: epath.Path = RUNS) -> epath.Path:
    """Where `trained` leaves that model."""
    return runs / f"{name.lower().replace(' ', '').replace('=', '')}-seed-{seed}-steps-{steps}"


def config_of(name: str, seed: int, steps: int = STEPS, runs: epath.Path = RUNS) -> Config:
    """What `trained` trains last: of a BD3-LM the second half of the steps."""
    config = settings(MODELS[name], seed, steps)
    if config.objective != "bd3lm":
        return config
    second = settings(MODELS[name], seed, steps - steps // 2)
    return dataclasses.replace(second, init_from=str(workdir(FIRST_HALF, seed, steps, runs)))


def trained(name: str, seed: int, steps: int = STEPS, runs: epath.Path = RUNS) -> tuple[Config, epath.Path]:
    """Trains a model, unless it is there already; one that was interrupted goes on.

    Args:
      name: of `MODELS`.
      seed: of initialisation, order of the rows, noise and dropout.
      steps: of 8 rows.
      runs: the folder of all of them.

    Returns:
      its settings and its workdir.
    """
    config, place = config_of(name, seed, steps, runs), workdir(name, seed, steps, runs)
    if config.init_from:
        first_half(seed, steps, runs)
    train_on(config, place)
    return config, place


def first_half(seed: int, steps: int = STEPS, runs: epath.Path = RUNS) -> epath.Path:
    """Trains the MDLM from which BD3-LMs of that seed and number of steps go on; its workdir."""
    place = workdir(FIRST_HALF, seed, steps, runs)
    train_on(settings("mdlm", seed, steps // 2), place)
    return place


def finished(steps: int = STEPS, runs: epath.Path = RUNS) -> list[tuple[str, int, Config, epath.Path]]:
    """Name, seed, settings and workdir of every model in `runs` that has been trained to its end, by seed."""
    found = []
    for name in MODELS:
        for place in runs.glob(workdir(name, "*", steps, runs).name):
            if config := finished_config(place):
                found.append((name, config.seed, config, place))
    return sorted(found, key=lambda each: (each[1], list(MODELS).index(each[0])))


def finished_config(place: epath.Path) -> Config | None:
    """Settings of a model that has been trained to its end."""
    step = latest_step(place)
    if step is None or step != (config := read_config(place)).training.num_steps:
        return None
    return config


def of_seed(seed: int, steps: int = STEPS, runs: epath.Path = RUNS) -> dict[str, tuple[Config, epath.Path]]:
    """Name -> settings and workdir of the models of a seed that `finished` finds."""
    return {name: (config, place) for name, own, config, place in finished(steps, runs) if own == seed}


def train_on(config: Config, place: epath.Path) -> None:
    """Prepares the corpus and trains to the end, whatever of that is still to be done."""
    prepare(config.data, config.model.length)
    train(config, place)
