"""The settings of an earlier run, as it left them in WORKDIR/config.json. Used where --config is not given.

bd3 sample --workdir=runs/quickstart --config.sampling.nucleus=0.8
"""

from etils import epath
from ml_collections import ConfigDict

from bd3_jax.checkpoints.run_folder import read_settings


def get_config(workdir: str) -> ConfigDict:
    return ConfigDict(read_settings(epath.Path(workdir)))
