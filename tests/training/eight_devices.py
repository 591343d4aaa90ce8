"""Run by test_meshes.py with 8 devices: eight_devices.py FOLDER STEPS MESH... prints what each mesh computes, as JSON.

A mesh of fewer devices than there are takes the first of them.
"""

import dataclasses
import json
import re
import sys

import jax
import numpy as np
import optax
from etils import epath

from bd3_jax import sharding
from bd3_jax.checkpoints.run_folder import read_config
from bd3_jax.compiling import hlo
from bd3_jax.config import MeshConfig
from bd3_jax.data.pipeline import open_dataset, train_batches
from bd3_jax.language_model import LanguageModel
from bd3_jax.training.update import make_program


def main(folder: epath.Path, steps: int, meshes: list[str]) -> None:
    config = read_config(folder)
    dataset = open_dataset(config.data, config.model.length, "train")
    print(json.dumps({name: run(config, dataset, steps, name) for name in meshes}))


def run(config, dataset, steps, name):
    shape = MeshConfig(*(int(size) for size in name.split("x")))
    mesh = sharding.make_mesh(shape, jax.devices()[: shape.data * shape.fsdp * shape.tensor])
    model = LanguageModel.from_config(config, dataset.tokenizer.ids, sharding.batch_shards(mesh))
    program = make_program(model, config, mesh)
    shardings = jax.tree.map(lambda array: array.sharding, program.abstract)
    state = jax.jit(program.init, out_shardings=shardings)()
    # The output layer starts at 0 and would hide the gradients behind it.
    noise = lambda path, p: p + 0.02 * np.random.default_rng(p.size).normal(size=p.shape).astype(np.float32)
    noisy = jax.device_put(jax.tree_util.tree_map_with_path(noise, jax.device_get(state.params)), shardings.params)
    state = dataclasses.replace(state, params=noisy)

    rows = sharding.batch_sharding(mesh, config.training.batch_size, "batch")
    batches = train_batches(dataset, config.training.batch_size, config.seed, 0, 0, 1)
    global_batch = lambda: sharding.global_batch(next(batches), config.training.batch_size, rows)
    batch = global_batch()
    held = {"batch": shard(batch), "step": shard(state.step)}
    trees = {"params": state.params, "ema": state.ema} | {m: optax.tree.get(state.opt_state, m) for m in ("mu", "nu")}
    for part, tree in trees.items():
        held |= {f"{part}/qkv": shard(tree["blocks"]["qkv"]), f"{part}/output": shard(tree["output"]["kernel"])}

    update, losses = program.update.lower().compile(), []
    memory, text = update.memory_analysis(), update.as_text()
    for step in range(steps):
        state, metrics = update(state, batch)
        losses.append(float(metrics["train/loss"]))
        batch = global_batch()
        if step == 0:  # nothing was clipped, so the first moment is (1 - beta1) times the gradient
            moments, _ = jax.tree_util.tree_flatten_with_path(optax.tree.get(state.opt_state, "mu"))
            scale = 1 / (1 - config.optimizer.beta1)
            grads = {jax.tree_util.keystr(path): (np.ravel(m) * scale).tolist() for path, m in moments}
    bytes_held = {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes}
    return {
        "grads": grads, "losses": losses, "held": held, "memory": bytes_held,
        "collectives": sum(c.count for c in hlo.collectives(text, mesh.size, 1)), "in_chunks": in_chunks(text),
    }  # fmt: skip


def in_chunks(text):
    """Collectives within the loops over chunks of positions; those alone turn a number of times that is not known."""
    lines, _ = hlo.computations(text)
    loops = [line for body in lines.values() for line in body if " while(" in line and hlo.trips(line, lines) is None]
    assert loops
    inside, pending = [], [hlo.called(line, "body") for line in loops]
    while pending:
        for line in lines[pending.pop()]:
            inside += re.findall(r" (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(", line)
            pending += re.findall(r"(?:body|condition|to_apply|calls)=%?([\w.-]+)", line)
    return inside


def shard(array):
    """Shape of what one device holds."""
    return list(array.addressable_shards[0].data.shape)


if __name__ == "__main__":
    main(epath.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
