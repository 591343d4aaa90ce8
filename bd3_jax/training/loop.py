"""Training, from top to bottom; the same code for one CPU and for a pod.

Where it starts from: the newest checkpoint in the workdir that can be read, else the weights of `config.init_from`
(with a fresh optimiser, warm-up, average and interval), else fresh parameters from the seed. A run that was interrupted
after any step continues with the same numbers as if it had not been.
"""

import collections
import dataclasses
import functools
import signal
import sys
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jaxtyping import Array, Float, Int, PRNGKeyArray
from tqdm import tqdm

from bd3_jax import sharding
from bd3_jax.checkpoints import run_folder
from bd3_jax.checkpoints.orbax import Checkpoints, latest_step, summarize
from bd3_jax.checkpoints.source import read_config
from bd3_jax.config import Config
from bd3_jax.data.manifest import FILE_NAME as MANIFEST
from bd3_jax.data.manifest import load_manifest
from bd3_jax.data.pipeline import Dataset, open_data, train_batches
from bd3_jax.data.streaming import Stream, stream_batches
from bd3_jax.errors import UserError
from bd3_jax.evaluation.perplexity import evaluate_params
from bd3_jax.folders import alone, require_writable, writing
from bd3_jax.language_model import LanguageModel
from bd3_jax.training.initial import open_initial
from bd3_jax.training.logging import MetricLog
from bd3_jax.training.state import (
    TrainState,
    init_state,
    learning_rate,
    make_optimizer,
    shard_state,
    start_state,
    update_ema,
)

# Streams of random numbers that follow from the seed.
_INIT, _TRAIN = 0, 1
# Updates that the host may be ahead of the device: enough to keep it busy, few enough to stop within a moment.
_IN_FLIGHT = 2

Metrics = dict[str, Float[Array, ""]]


def train(config: Config, workdir: epath.Path) -> None:
    """Trains until `config.training.num_steps` updates are done, continuing what is in `workdir`.

    Writes settings, tokenizer, manifest, checkpoints, `metrics.jsonl` and TensorBoard events there. Validates before
    the first update, every `eval_every` and after the last one.

    Raises:
      UserError: settings that do not fit the devices, the data or the run in `workdir`; a folder that cannot be
        written, in which another process trains, or which holds other things.
      SystemExit: 130 after Ctrl-C, 143 after SIGTERM; the step is finished and saved before.
    """
    require_writable(workdir, "--workdir")
    busy = f"--workdir is {str(workdir)!r}, where another process is training; allowed: another folder, or later"
    with alone(workdir / ".lock", busy) if jax.process_index() == 0 else nullcontext():
        _train(config, workdir)


def _train(config: Config, workdir: epath.Path) -> None:
    training, num_steps = config.training, config.training.num_steps

    # ---------------------------------------------------------------------------------------------------- mesh
    mesh = sharding.make_mesh(config.mesh)
    batch_sharding = sharding.batch_sharding(mesh, training.batch_size, "config.training.batch_size")
    eval_sharding = sharding.batch_sharding(mesh, config.eval.batch_size, "config.eval.batch_size")

    # ---------------------------------------------------------------------------------------------------- data
    dataset = open_data(config.data, config.model.length, "train")
    validation = open_data(config.data, config.model.length, config.eval.split)
    host, hosts = jax.process_index(), jax.process_count()
    stream: Any = None  # where rows are streamed, an iterator that carries its own position
    if isinstance(dataset, Stream):
        stream = stream_batches(dataset, training.batch_size, config.seed, host, hosts)
    newest = latest_step(workdir)
    if newest is not None:
        if isinstance(dataset, Dataset):
            _check_data(dataset, workdir)
        run_folder.check_continues(config, workdir)
        newest = summarize(workdir).step
        if newest >= num_steps:
            print(f"{workdir}: finished, {newest} steps are done; to train on, set --config.training.num_steps")
            return
        _tell_rate(config, workdir, newest)
    else:
        run_folder.check_begins(config, workdir)

    # --------------------------------------------------------------------------------------------------- model
    model = LanguageModel.from_config(config, dataset.tokenizer.ids, sharding.batch_shards(mesh))
    source = open_initial(config, dataset.tokenizer) if newest is None and config.init_from else None

    # --------------------------------------------------------------------------------------------------- state
    optimizer = make_optimizer(config.optimizer, num_steps)
    rate = learning_rate(config.optimizer, num_steps)
    init, abstract, traced = trace_update(model, optimizer, config, mesh)
    shardings = jax.tree.map(lambda array: array.sharding, abstract)
    # Each parameter goes from the file to its shards, before anything is written.
    initial = None if source is None else source.load(model.network.abstract_params(), shardings.params)

    # -------------------------------------------------------------------------------------------------- update
    print(f"compiling for {mesh.size} {jax.devices()[0].device_kind} device(s), mesh {dict(mesh.shape)}")
    update = traced.lower().compile()

    # ---------------------------------------------------------------------------------------------- checkpoint
    if host == 0:
        with writing(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            run_folder.write_config(config, workdir)
            dataset.tokenizer.save(workdir / "tokenizer")
            if isinstance(dataset, Dataset):
                dataset.manifest.save(workdir)
    checkpoints = Checkpoints(workdir, training.keep_checkpoints)
    unrecorded: list[dict[str, Array | float]] = []  # metrics of the steps since the last record
    if initial is not None:
        begin = jax.jit(functools.partial(start_state, optimizer, config), donate_argnums=0, out_shardings=shardings)
        state, start, rows = begin(initial), 0, 0
        print(f"{workdir}: starts from the weights of {config.init_from}")
    elif newest is None:
        state, start, rows = jax.jit(init, out_shardings=shardings)(), 0, 0
    else:
        newest, state, position = checkpoints.restore(newest, abstract, stream)
        start, rows, unrecorded = newest, position["rows"], position["unrecorded"]
        print(f"{workdir}: continues after step {start} of {num_steps}")

    def save(step: int) -> None:
        values = [{name: float(value) for name, value in metrics.items()} for metrics in unrecorded]
        checkpoints.save(step, state, {"rows": rows, "unrecorded": values}, stream)

    # ---------------------------------------------------------------------------------------------- validation
    log = MetricLog(workdir, keep=start if newest is not None else -1)

    def validate(step: int) -> None:
        result = evaluate_params(
            model, state.ema, validation, config.eval, config.eval.num_batches, sharding=eval_sharding
        )
        log.write(step, result.record())
        bar.write(
            f"step {step}: {config.eval.split} perplexity {result.perplexity:.2f} ({result.nll:.4f} nats per token)"
        )

    # ---------------------------------------------------------------------------------------------------- loop
    batches = stream
    if isinstance(dataset, Dataset):
        batches = train_batches(dataset, training.batch_size, config.seed, rows, host, hosts)
    in_flight: collections.deque[Metrics] = collections.deque()
    # In a log file a line now and then is enough.
    often = 0.1 if sys.stderr.isatty() else 30
    bar = tqdm(desc="training", total=num_steps, initial=start, unit="step", mininterval=often, disable=host != 0)
    with _StopSignals() as stop, closing(checkpoints), closing(log), closing(batches), bar:
        if newest is None:
            validate(0)
        seconds, timed_steps = 0.0, 0
        for step in range(start + 1, num_steps + 1):
            began = time.perf_counter()
            batch = sharding.global_batch(next(batches), training.batch_size, batch_sharding)
            state, metrics = update(state, batch)
            rows += training.batch_size
            unrecorded.append(metrics)
            in_flight.append(metrics)
            if len(in_flight) > _IN_FLIGHT:
                jax.block_until_ready(in_flight.popleft())
            last = step == num_steps or stop.signal != 0

            values = None
            if step % training.log_every == 0 or step == num_steps:
                values = _means(unrecorded) | {"train/learning_rate": float(rate(step - 1))}
                unrecorded = []
            seconds, timed_steps = seconds + time.perf_counter() - began, timed_steps + 1
            bar.update()
            if values is not None:
                speed = timed_steps * training.batch_size * model.length / seconds
                seconds, timed_steps = 0.0, 0
                log.write(step, values | {"train/tokens_per_second": speed})
                bar.set_postfix_str(f"loss {values['train/loss']:.3f}, {speed:,.0f} tokens/s", refresh=False)

            # Before saving, so that a checkpoint's metrics are complete up to its step.
            if step % training.eval_every == 0 or step == num_steps:
                validate(step)
            if step % training.checkpoint_every == 0 or last:
                save(step)
            if last:
                break

    if step < num_steps:
        name = signal.Signals(stop.signal).name
        print(
            f"{workdir}: stopped by {name} after step {step} of {num_steps}, which is saved; the same command continues"
        )
        raise SystemExit(128 + stop.signal)
    print(f"{workdir}: finished, {num_steps} steps are done")


def trace_update(
    model: LanguageModel, optimizer: optax.GradientTransformation, config: Config, mesh: jax.sharding.Mesh
) -> tuple[Callable[[], TrainState], TrainState, jax.stages.Traced]:
    """How the first state is made, the abstract state with its shardings, and the update for that mesh.

    Nothing is allocated, and the devices of the mesh need not be there. The update takes the state, whose buffers it
    reuses, and token rows `[batch_size, L]`; see `make_update`.
    """
    init = functools.partial(init_state, model.network, optimizer, config, _stream(config.seed, _INIT))
    abstract = shard_state(mesh, model.network, optimizer, jax.eval_shape(init))
    shardings = jax.tree.map(lambda array: array.sharding, abstract)
    batch_size = config.training.batch_size
    batch_sharding = sharding.batch_sharding(mesh, batch_size, "config.training.batch_size")
    rows = jax.ShapeDtypeStruct((batch_size, model.length), jnp.int32, sharding=batch_sharding)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    update = jax.jit(make_update(model, optimizer, config), donate_argnums=0, out_shardings=(shardings, everywhere))
    return init, abstract, update.trace(abstract, rows)


def make_update(
    model: LanguageModel, optimizer: optax.GradientTransformation, config: Config
) -> Callable[[TrainState, Int[Array, "b L"]], tuple[TrainState, Metrics]]:
    """(state, rows) -> (state after one more update, train/loss in nats per token and train/grad_norm, unclipped)."""

    def update(state: TrainState, x0: Int[Array, "b L"]) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(_stream(config.seed, _TRAIN), state.step)
        loss_and_grads = jax.value_and_grad(model.training_loss, has_aux=True)
        (loss, _), grads = loss_and_grads(state.params, x0, key, state.low, state.high)
        changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params, step = optax.apply_updates(state.params, changes), state.step + 1
        ema = update_ema(state.ema, params, step, config.optimizer.ema_decay)
        state = dataclasses.replace(state, step=step, params=params, ema=ema, opt_state=opt_state)
        return state, {"train/loss": loss, "train/grad_norm": optax.tree.norm(grads)}

    return update


def _stream(seed: int, purpose: int) -> PRNGKeyArray:
    return jax.random.fold_in(jax.random.key(seed), purpose)


def _means(records: list[dict[str, Array | float]]) -> dict[str, float]:
    values = jax.device_get(records)
    return {name: float(np.mean([record[name] for record in values], dtype=np.float64)) for name in values[0]}


def _check_data(dataset: Dataset, workdir: epath.Path) -> None:
    """Raises UserError where the rows are not those that the run in `workdir` has been reading."""
    if not (workdir / MANIFEST).exists():
        raise UserError(
            f"{workdir} has a checkpoint but no manifest.json, for it was not trained on prepared rows: it can be "
            f"evaluated, not continued with them; a new run may start from it with --config.init_from={workdir}"
        )
    began_with, found = load_manifest(workdir), dataset.manifest
    for name, old, new in (
        ("tokenizer", began_with.fingerprint, found.fingerprint),
        ("training split", began_with.splits["train"], found.splits["train"]),
        ("text of the training split", began_with.sha256["train"], found.sha256["train"]),
    ):
        if old != new:
            raise UserError(
                f"the {name} in {dataset.directory} is not the one that {workdir} began with: found {new}, wanted {old}"
            )


def _tell_rate(config: Config, workdir: epath.Path, step: int) -> None:
    """Says what another number of steps does to the learning rate of a run that is continued."""
    before, now = read_config(workdir).training.num_steps, config.training.num_steps
    if config.optimizer.decay == "cosine" and now != before:
        was, rate = (float(learning_rate(config.optimizer, steps)(step)) for steps in (before, now))
        print(
            f"{workdir}: the learning rate goes on at {rate:.3g} instead of {was:.3g}, "
            f"since its cosine now ends at step {now} instead of {before}"
        )


class _StopSignals:
    """While open, SIGTERM and the first Ctrl-C only note themselves in `signal`; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.signal = 0  # none

    def __enter__(self) -> "_StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT == self.signal:
            raise KeyboardInterrupt
        self.signal = number
