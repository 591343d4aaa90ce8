"""Memory of a training step for each of 8 simulated devices, as compiled, by how the mesh splits it.

python experiments/sharding_memory.py > experiments/results/sharding_memory.md

Nothing of that size is allocated: only shapes are compiled, for the CPU.
"""

import dataclasses
import os
import sys

DEVICES = 8
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
os.environ["JAX_PLATFORMS"] = "cpu"

from bd3_jax.config import MeshConfig, from_config_dict  # noqa: E402
from bd3_jax.configs import lm1b  # noqa: E402
from bd3_jax.language_model import LanguageModel  # noqa: E402
from bd3_jax.sharding import batch_shards, make_mesh  # noqa: E402
from bd3_jax.special_ids import SpecialIds  # noqa: E402
from bd3_jax.training.update import make_program  # noqa: E402

MESHES = ((8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 8, 1))
STRING, BATCH = "bd3lm,block_size=16", 64
VOCAB_SIZE = 30522  # of bert-base-uncased


def main() -> int:
    settings = lm1b.get_config(STRING)
    settings.training.batch_size = BATCH
    config = from_config_dict(settings)
    ids = SpecialIds(bos=101, eos=101, mask=103, vocab_size=VOCAB_SIZE)
    print(f"# Memory of a step on {DEVICES} simulated devices\n")
    print(f"`configs/lm1b.py:{STRING}`, {BATCH} rows, float32, compiled for the CPU; MiB a device.\n")
    print("| data x fsdp x tensor | state and batch | temporary | together |\n| --- | --- | --- | --- |")
    for shape in MESHES:
        mesh = make_mesh(MeshConfig(*shape))
        model = LanguageModel.from_config(config, ids, batch_shards(mesh))
        program = make_program(model, dataclasses.replace(config, mesh=MeshConfig(*shape)), mesh)
        memory = program.update.lower().compile().memory_analysis()
        held, temporary = memory.argument_size_in_bytes / 2**20, memory.temp_size_in_bytes / 2**20
        print(f"| {'x'.join(map(str, shape))} | {held:,.0f} | {temporary:,.0f} | {held + temporary:,.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
