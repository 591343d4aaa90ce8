"""Run by test_meshes.py with 8 devices: eight_devices_run.py WORKDIR trains and evaluates on one mesh after another."""

import dataclasses
import sys

import jax
from etils import epath

from bd3_jax.checkpoints.run_folder import read_config
from bd3_jax.config import Config, MeshConfig
from bd3_jax.evaluation.perplexity import evaluate
from bd3_jax.training.loop import train


def main(workdir: epath.Path) -> None:
    """As many steps as the folder's config.json says: half of them on 2x2x2, the others on 1x4x2."""
    assert jax.device_count() == 8
    config = read_config(workdir)
    half = dataclasses.replace(config.training, num_steps=config.training.num_steps // 2)
    train(dataclasses.replace(on(config, 2, 2, 2), training=half), workdir)
    train(on(config, 1, 4, 2), workdir)
    evaluate(on(config, 1, 4, 2), workdir)


def on(config: Config, *mesh: int) -> Config:
    return dataclasses.replace(config, mesh=MeshConfig(*mesh))


if __name__ == "__main__":
    main(epath.Path(sys.argv[1]))
