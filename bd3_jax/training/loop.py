"""Training, from top to bottom; the same code for one CPU and for a pod.

Where it starts from: the newest checkpoint in the workdir that can be read, else the weights of `config.init_from`
(with a fresh optimiser, warm-up, average and interval), else fresh parameters from the seed. A run that was interrupted
after any step continues with the same numbers as if it had not been. (Where it is what is measured after the last step
that was interrupted, that is made up for; but the interval that its search finds is recorded, and in no checkpoint.)
"""

import dataclasses
import functools
import signal
import sys
import time
from contextlib import closing, nullcontext
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Array
from tqdm import tqdm

from bd3_jax import sharding
from bd3_jax.checkpoints import run_folder
from bd3_jax.checkpoints.orbax import Checkpoints, latest_step, read_position, summarize
from bd3_jax.config import Config
from bd3_jax.data.manifest import FILE_NAME as MANIFEST
from bd3_jax.data.manifest import load_manifest
from bd3_jax.data.pipeline import Dataset, open_data, open_eval_data, train_batches
from bd3_jax.data.streaming import Stream, stream_batches
from bd3_jax.errors import UserError
from bd3_jax.folders import alone, require_writable, writing
from bd3_jax.language_model import LanguageModel
from bd3_jax.metrics import Record, read_metrics
from bd3_jax.training.initial import open_initial
from bd3_jax.training.logging import MetricLog, require_wandb
from bd3_jax.training.replay import STATUS, InFlight, Step, save_failed
from bd3_jax.training.signals import Stopped, StopSignals
from bd3_jax.training.speed import Clock, Profiler, flops_per_token
from bd3_jax.training.state import learning_rate, start_state
from bd3_jax.training.update import make_program
from bd3_jax.training.validation import Samples, Validator, check_batches, with_interval

# Updates that the host may be ahead of the device: enough to keep it busy, few enough to stop within a moment.
_IN_FLIGHT = 2
# What a record holds of its last step alone.
_LAST = ("train/learning_rate", "train/param_norm", "train/interval_low", "train/interval_high")


def train(config: Config, workdir: epath.Path) -> None:
    """Trains until `config.training.num_steps` updates are done, continuing what is in `workdir`.

    Writes settings, tokenizer, manifest, checkpoints, `metrics.jsonl` and TensorBoard events there. Validates before
    the first update, every `eval_every` and after the last one.

    Raises:
      UserError: settings that do not fit the devices, the data or the run in `workdir`; a folder that cannot be
        written, in which another process trains, or which holds other things.
      SystemExit: 130 after Ctrl-C, `sigterm_status` after SIGTERM; the step is finished and saved before. 3 after
        `max_skipped` steps in a row whose loss or gradient was not finite.
    """
    require_writable(workdir, "--workdir")
    busy = f"--workdir is {str(workdir)!r}, where another process is training; allowed: another folder, or later"
    with alone(workdir / ".lock", busy) if jax.process_index() == 0 else nullcontext():
        _train(config, workdir)


def _train(config: Config, workdir: epath.Path) -> None:
    training, num_steps, host = config.training, config.training.num_steps, jax.process_index()

    # ---------------------------------------------------------------------------------------------------- mesh
    mesh = sharding.make_mesh(config.mesh)
    batch_sharding = sharding.batch_sharding(mesh, training.batch_size, "config.training.batch_size")
    check_batches(config, mesh)
    part, parts = sharding.host_share(batch_sharding, training.batch_size)

    # ---------------------------------------------------------------------------------------------------- data
    dataset = open_data(config.data, config.model.length, "train")
    validation = open_eval_data(config, in_training=True)
    stream: Any = None  # where rows are streamed, an iterator that carries its own position
    if isinstance(dataset, Stream):
        stream = stream_batches(dataset, training.batch_size, config.seed, part, parts)
    newest = latest_step(workdir)
    if newest is not None:
        if isinstance(dataset, Dataset):
            _check_data(dataset, workdir)
        run_folder.check_continues(config, workdir)
        newest = summarize(workdir).step
        if stream is not None:
            _check_parts(parts, workdir, newest)
        if newest > num_steps or (newest == num_steps and _is_measured(config, workdir, newest)):
            _say(f"{workdir}: finished, {newest} steps are done; to train on, set --config.training.num_steps")
            return
        _tell_rate(config, workdir, newest)
    else:
        run_folder.check_begins(config, workdir)

    # --------------------------------------------------------------------------------------------------- model
    model = LanguageModel.from_config(config, dataset.tokenizer.ids, sharding.batch_shards(mesh))
    source = open_initial(config, dataset.tokenizer) if newest is None and config.init_from else None
    require_wandb(config)
    validate = Validator(model, config, mesh, validation)
    draw_samples = Samples(model, config, mesh, dataset.tokenizer) if training.sample_every else None

    # -------------------------------------------------------------------------------------------------- update
    program = make_program(model, config, mesh)
    shardings = jax.tree.map(lambda array: array.sharding, program.abstract)
    # Each parameter goes from the file to its shards, before anything is written.
    initial = None if source is None else source.load(model.network.abstract_params(), shardings.params)
    _say(f"compiling for {mesh.size} {jax.devices()[0].device_kind} device(s), mesh {dict(mesh.shape)}")
    update = program.update.lower().compile()

    # ------------------------------------------------------------------------------------------- state and log
    if host == 0:
        with writing(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            run_folder.write_config(config, workdir)
            dataset.tokenizer.save(workdir / "tokenizer")
            if isinstance(dataset, Dataset):
                dataset.manifest.save(workdir)
    validations: list[Record] = []  # the records of those that are done
    checkpoints = Checkpoints(workdir, training.keep_checkpoints, training.keep_every, training.keep_best, validations)
    start, rows, measured = 0, 0, -1  # steps done, rows consumed, the last step with all that is done after it
    unrecorded: list[dict[str, Array | float]] = []  # metrics of the steps since the last record
    if initial is not None:
        begin = functools.partial(start_state, program.optimizer, config)
        state = jax.jit(begin, donate_argnums=0, out_shardings=shardings)(initial)
        _say(f"{workdir}: starts from the weights of {config.init_from}")
    elif newest is None:
        state = jax.jit(program.init, out_shardings=shardings)()
    else:
        newest, state, position = checkpoints.restore(newest, program.abstract, stream)
        # A limit that was lowered since does not stop what was not stuck.
        skipped = np.int32(min(int(state.skipped), training.max_skipped - 1))
        state = dataclasses.replace(state, skipped=sharding.place(skipped, state.skipped.sharding))
        start, rows, measured = newest, position["rows"], position["measured"]
        unrecorded = position["unrecorded"]
        validations += [record for record in _validations(workdir) if record["step"] <= measured]
        _say(f"{workdir}: continues after step {start} of {num_steps}")
    log = MetricLog(workdir, config, start if newest is not None else -1, measured)

    # ------------------------------------------------------------------------------- what is done between steps
    def measure(step: int) -> None:
        """Validates, takes the best interval and draws samples, where they are due. Raises Stopped."""
        nonlocal state, measured
        last = step == num_steps
        if step % training.eval_every == 0 or last:
            found = validate(state, step, stop)
            validations.append({"step": step, **found.record()})
            log.write(step, found.record())
            if host == 0:
                bar.write(f"step {step}: {found.headline()}")
            if found.search and found.search.best:
                state = with_interval(state, found.search.best)
        if draw_samples and step and (step % training.sample_every == 0 or last):
            log.write(step, draw_samples(state, step, stop))
        measured = step

    def is_due(step: int) -> bool:
        """Whether anything is measured or saved after it."""
        every = (training.eval_every, training.sample_every, training.checkpoint_every)
        return step == num_steps or any(each and step % each == 0 for each in every)

    def save(step: int) -> None:
        values = [{name: float(value) for name, value in metrics.items()} for metrics in unrecorded]
        position = {"rows": rows, "measured": measured, "unrecorded": values, "parts": parts}
        log.upload()  # first, for the records say which checkpoints are the best
        checkpoints.save(step, state, position, stream)

    # ---------------------------------------------------------------------------------------------------- loop
    batches = stream
    if isinstance(dataset, Dataset):
        batches = train_batches(dataset, training.batch_size, config.seed, rows, part, parts)
    in_flight = InFlight(_IN_FLIGHT, training.max_skipped, int(state.skipped))
    clock = Clock(training.batch_size * model.length, flops_per_token(model))
    profiler = Profiler(workdir, start, config.profile_steps)
    step, failed, stopped = start, None, False
    # In a log file a line now and then is enough.
    often = 0.1 if sys.stderr.isatty() else 30
    bar = tqdm(
        desc="training",
        total=num_steps,
        initial=start,
        unit="step",
        mininterval=often,
        disable=host != 0,
    )
    with StopSignals() as stop, closing(checkpoints), closing(log), closing(batches), closing(profiler), bar:
        try:
            if measured < start:
                measure(start)
            for step in range(start + 1, num_steps + 1):
                began = time.perf_counter()
                local_rows = next(batches)
                waited = time.perf_counter() - began
                profiler.before(step)
                batch = sharding.global_batch(local_rows, training.batch_size, batch_sharding)
                state, metrics = update(state, batch)
                profiler.after(step, metrics)
                rows += training.batch_size
                unrecorded.append(metrics)
                failed = in_flight.add(Step(step, batch, metrics))
                if not failed and is_due(step):
                    # The host may be ahead, and of a run that has failed nothing is to be saved.
                    failed = in_flight.drain()
                if failed:
                    log.write(step, _summary(unrecorded))
                    break

                values = None
                if step % training.log_every == 0 or step == num_steps:
                    values, unrecorded = _summary(unrecorded), []
                clock.add(time.perf_counter() - began, waited)
                bar.update()
                if values is not None:
                    times = clock.record()
                    log.write(step, values | times)
                    speed = f"{times['train/tokens_per_second']:,.0f} tokens/s"
                    bar.set_postfix_str(f"loss {values['train/loss']:.3f}, {speed}", refresh=False)

                # Before saving, so that a checkpoint's metrics are complete up to its step.
                if stop.poll():
                    if failed := in_flight.drain():
                        break
                    raise Stopped
                measure(step)
                if step % training.checkpoint_every == 0 or step == num_steps:
                    save(step)
        except Stopped:
            stopped = True
            if step != newest:  # else it was stopped again in what is done after that step, which is saved as it is
                save(step)

    # ----------------------------------------------------------------------------------------------------- end
    if failed:
        save_failed(workdir, state, failed, config)
        _say(
            f"{workdir}: stopped at step {failed.number}, the last of {training.max_skipped} in a row whose loss or "
            f"gradient is not finite; bd3 replay --workdir={workdir} repeats it"
        )
        raise SystemExit(STATUS)
    if stopped:
        name = signal.Signals(stop.signal).name
        _say(
            f"{workdir}: stopped by {name} after step {step} of {num_steps}, which is saved; the same command continues"
        )
        raise SystemExit(training.sigterm_status if stop.signal == signal.SIGTERM else 128 + stop.signal)
    _say(f"{workdir}: finished, {num_steps} steps are done")


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text)


def _is_measured(config: Config, workdir: epath.Path, step: int) -> bool:
    """Whether all that is measured after the last step is done, or made up for, of which the records alone know."""
    position = read_position(workdir, step)
    if position is None or position["measured"] >= step:
        return True
    found = {name for record in read_metrics(workdir) if record["step"] == step for name in record}
    return "eval/split" in found and ("samples/text" in found or not config.training.sample_every)


def _validations(workdir: epath.Path) -> list[Record]:
    return [record for record in read_metrics(workdir) if "eval/split" in record]


def _summary(steps: list[dict[str, Array | float]]) -> dict[str, float]:
    """Of the steps since the last record: means over those that were not skipped, and how many were."""
    records = jax.device_get(steps)
    taken = [record for record in records if not record["train/skipped"]] or records
    values = {name: float(np.mean([record[name] for record in taken], dtype=np.float64)) for name in taken[0]}
    values |= {name: float(records[-1][name]) for name in _LAST}
    return values | {"train/skipped": float(sum(record["train/skipped"] for record in records))}


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


def _check_parts(parts: int, workdir: epath.Path, step: int) -> None:
    """Raises UserError where the hosts of a streamed run would not go on reading what each of them has read."""
    began_with = (read_position(workdir, step) or {}).get("parts", parts)
    if began_with != parts:
        raise UserError(
            f"the hosts read {parts} part(s) of every batch with this config.mesh, but {began_with} when {workdir} was "
            "saved, each with its own place in the stream; allowed: a mesh that splits rows over hosts as before"
        )


def _tell_rate(config: Config, workdir: epath.Path, step: int) -> None:
    """Says what another number of steps does to the learning rate of a run that is continued."""
    before, now = run_folder.read_config(workdir).training.num_steps, config.training.num_steps
    if config.optimizer.decay == "cosine" and now != before:
        was, rate = (float(learning_rate(config.optimizer, steps)(step)) for steps in (before, now))
        _say(
            f"{workdir}: the learning rate goes on at {rate:.3g} instead of {was:.3g}, "
            f"since its cosine now ends at step {now} instead of {before}"
        )
