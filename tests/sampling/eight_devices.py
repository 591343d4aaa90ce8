"""Run by test_run.py with 8 devices: eight_devices.py WORKDIR MESH... draws on each mesh, and prints tokens as JSON."""

import json
import sys

from etils import epath

from bd3_jax.config_dict import from_config_dict
from bd3_jax.configs import workdir as run_settings
from bd3_jax.sampling.run import sample


def main(workdir: epath.Path, meshes: list[str]) -> None:
    tokens = {}
    for mesh in meshes:
        settings = run_settings.get_config(str(workdir))
        settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor = map(int, mesh.split("x"))
        tokens[mesh] = [drawn["tokens"] for drawn in sample(from_config_dict(settings), workdir)]
    print(json.dumps(tokens))


if __name__ == "__main__":
    main(epath.Path(sys.argv[1]), sys.argv[2:])
