"""Speed of training, likelihood and sampling on this machine, as JSON and as a table.

    python experiments/benchmark.py --torch --out=experiments/results/benchmark
    python experiments/benchmark.py --modes=train --objectives=bd3lm --set=model.width=768 --set=model.dtype=bfloat16

Without --set, the network is the yardstick's: d = 256, 8 layers, 8 heads, L = 256, B = 16, batch 8. With --torch
(package torch) a plain PyTorch module runs beside ours, in turns, and ratios are printed: see torch_baseline.py. Times
are medians over rounds; ratios are medians of the ratios within a round, so that a slow minute counts against both.
The machine should be idle: PyTorch's threads wait for each other, and lose far more to other processes than XLA's. On
Linux both are faster in huge pages, where GLIBC_TUNABLES=glibc.malloc.hugetlb=1 is set.
The PyTorch module samples one sequence at a time, whatever --set=sampling.batch_size says of ours. FLOPs are those of
the matrix products, twice the multiplications; the output layer's are for the tokens that are masked on average. All
programs run on all devices.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from recording import Recording

from bd3_jax.command_line import exit_status
from bd3_jax.compiling.programs import product_flops
from bd3_jax.config import Config
from bd3_jax.config_dict import from_config_dict
from bd3_jax.configs import base
from bd3_jax.diffusion.likelihood import masked_share
from bd3_jax.errors import UserError
from bd3_jax.evaluation.perplexity import likelihood_program
from bd3_jax.language_model import LanguageModel
from bd3_jax.models.network import Params
from bd3_jax.sampling.block import Filled
from bd3_jax.sampling.sampler import Sampler, sequence_keys
from bd3_jax.sharding import batch_sharding, batch_shards, by_rows, make_mesh, param_shardings
from bd3_jax.special_ids import SpecialIds
from bd3_jax.training.update import make_program

OBJECTIVES, MODES = ("bd3lm", "mdlm", "sedd", "ar"), ("train", "eval", "sample")
BLOCK_SIZE = 16


@dataclasses.dataclass
class Program:
    """Something to time: `run(n)` does n steps and waits; one step is `tokens` tokens."""

    run: Callable[[int], None]
    tokens: int
    compile_seconds: float = 0.0
    flops: float | None = None
    memory: int | None = None
    temporaries: int | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
      objective: ar, mdlm, sedd or bd3lm.
      mode: train, eval or sample.
      vocab_size: V.
      tokens_per_second: median over rounds.
      step_seconds: median over rounds.
      compile_seconds: tracing, lowering and compiling, whatever the cache holds.
      memory: bytes that the compiler plans for arguments, results and temporaries.
      flops: of the matrix products of a step; None for sampling, whose length is not known before.
      peak_fraction: of the measured peak of plain matrix products.
      torch_tokens_per_second: of the yardstick, in the same rounds.
      ratio: ours over the yardstick's.
    """

    objective: str
    mode: str
    vocab_size: int
    tokens_per_second: float
    step_seconds: float
    compile_seconds: float
    memory: int | None
    flops: float | None
    peak_fraction: float | None
    torch_tokens_per_second: float | None
    ratio: float | None

    @classmethod
    def of(cls, figures: dict[str, Any]) -> "Result":
        """Out of a record, which may have more."""
        return cls(**{field.name: figures[field.name] for field in dataclasses.fields(cls)})


def configure(objective: str, overrides: list[str]) -> Config:
    """The yardstick's settings with GROUP.NAME=VALUE overrides."""
    config = base.get_config(f"bd3lm,block_size={BLOCK_SIZE}" if objective == "bd3lm" else objective)
    config.model.update(length=256, width=256, num_layers=8, num_heads=8, cond_dim=64)
    config.training.batch_size = config.eval.batch_size = 8
    config.sampling.update(batch_size=1, max_length=256)  # the authors' sampler draws one at a time
    for override in overrides:
        path, _, value = override.partition("=")
        *groups, name = path.split(".")
        node = config
        for group in groups:
            node = node.get(group)
        if node is None or name not in node:
            raise UserError(f"--set={override}: no such setting; allowed: GROUP.NAME=VALUE as in configs/base.py")
        node[name] = type(node[name])(json.loads(value) if not isinstance(node[name], str) else value)
    return from_config_dict(config)


def ours(config: Config, mode: str, vocab_size: int) -> Program:
    """The program that a run compiles, on all devices, with random rows."""
    return program_of(language_model(config, vocab_size), config, mode)


def language_model(config: Config, vocab_size: int) -> LanguageModel:
    ids = SpecialIds(bos=0, eos=0, mask=vocab_size - 1, vocab_size=vocab_size)
    return LanguageModel.from_config(config, ids, batch_shards(make_mesh(config.mesh)))


def program_of(model: LanguageModel, config: Config, mode: str) -> Program:
    """The same for a model that may be another one than that of the settings."""
    mesh, vocab_size = make_mesh(config.mesh), model.ids.vocab_size
    rng, length = np.random.default_rng(0), model.length
    began = time.perf_counter()
    if mode == "train":
        _, init, abstract, traced = make_program(model, config, mesh)
        compiled = traced.lower().compile()
        seconds = time.perf_counter() - began
        state = jax.jit(init, out_shardings=jax.tree.map(lambda array: array.sharding, abstract))()
        batch = config.training.batch_size
        split = batch_sharding(mesh, batch, "config.training.batch_size")
        rows = jax.device_put(rng.integers(0, vocab_size - 1, (batch, length)).astype(np.int32), split)

        def run(steps: int) -> None:
            nonlocal state
            for _ in range(steps):
                state, metrics = compiled(state, rows)
            jax.block_until_ready((state, metrics))

        tokens = rows.size
    else:
        params = jax.jit(model.network.init, out_shardings=param_shardings(mesh, model.network))(jax.random.key(0))
        if mode == "eval":
            batch = config.eval.batch_size
            split = batch_sharding(mesh, batch, "config.eval.batch_size")
            rows = jax.device_put(rng.integers(0, vocab_size - 1, (batch, length)).astype(np.int32), split)
            # The yardstick's noise: one time a block.
            args = (rows, jax.random.key(0))
            traced, tokens = likelihood_program(model, "monte_carlo", split).trace(params, *args), rows.size
        else:
            batch = config.sampling.batch_size
            split = batch_sharding(mesh, batch, "config.sampling.batch_size")
            sampler = Sampler.from_config(model, config.sampling)
            canvas = jax.device_put(sampler.canvas([[]] * batch), split)
            args = (jax.device_put(sequence_keys(0, np.arange(batch)), split), canvas)

            def sample(params: Params, keys: Array, canvas: Array) -> Filled:
                with by_rows(split):
                    return sampler(params, keys, canvas)

            traced, tokens = jax.jit(sample).trace(params, *args), canvas.size
        compiled = traced.lower().compile()
        seconds = time.perf_counter() - began

        def run(steps: int) -> None:
            for _ in range(steps):
                result = compiled(params, *args)
            jax.block_until_ready(result)

    stats = compiled.memory_analysis()
    memory = stats.argument_size_in_bytes + stats.temp_size_in_bytes
    memory += stats.output_size_in_bytes - stats.alias_size_in_bytes
    # The output layer is for masked tokens, of which there are more or fewer by chance: as many as are expected.
    share = 1.0 if model.is_exact else masked_share(config.noise)
    together = batch * model.noise_copies // config.training.microbatches if mode == "train" else batch
    flops = None if mode == "sample" else product_flops(traced.jaxpr, share * model.most_chunks(together))
    return Program(run, tokens, seconds, flops, memory, stats.temp_size_in_bytes)


def yardstick(config: Config, mode: str, vocab_size: int) -> Program | None:
    """The same in PyTorch; None where it has no such program (sampling of MDLM and SEDD)."""
    import torch
    import torch_baseline as plain

    m = config.model
    shape = plain.Shape(
        config.objective,
        config.block_size,
        m.length,
        m.width,
        m.num_layers,
        m.num_heads,
        m.cond_dim,
        m.dropout,
        vocab_size,
    )
    model = plain.Model(shape)
    if mode == "sample":
        if config.objective not in ("ar", "bd3lm"):
            return None
        length = config.sampling.max_length
        return Program(lambda steps: [plain.sample(model, 0, length) for _ in range(steps)] and None, length)
    batch = config.training.batch_size if mode == "train" else config.eval.batch_size
    rows = torch.randint(0, vocab_size - 1, (batch, m.length))
    if mode == "eval":
        return Program(lambda steps: [plain.likelihood(model, rows) for _ in range(steps)] and None, rows.numel())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0)
    return Program(
        lambda steps: [plain.train_step(model, optimizer, rows) for _ in range(steps)] and None, rows.numel()
    )


def timed(program: Program, steps: int) -> float:
    """Seconds a step."""
    began = time.perf_counter()
    program.run(steps)
    return (time.perf_counter() - began) / steps


def compare(objective: str, mode: str, vocab_size: int, peak: float, options: argparse.Namespace) -> Result:
    """Both programs in turns."""
    config = configure(objective, options.set)
    programs = [ours(config, mode, vocab_size)]
    if options.torch:
        programs += [found] if (found := yardstick(config, mode, vocab_size)) else []
    for program in programs:
        program.run(1)
    rounds = [[program.tokens / timed(program, options.steps) for program in programs] for _ in range(options.rounds)]
    mine, *theirs = (statistics.median(speeds) for speeds in zip(*rounds, strict=True))
    program = programs[0]
    step = program.tokens / mine
    return Result(
        objective=objective,
        mode=mode,
        vocab_size=vocab_size,
        tokens_per_second=mine,
        step_seconds=step,
        compile_seconds=program.compile_seconds,
        memory=program.memory,
        flops=program.flops,
        peak_fraction=program.flops / step / peak if program.flops else None,
        torch_tokens_per_second=theirs[0] if theirs else None,
        ratio=statistics.median(speeds[0] / speeds[1] for speeds in rounds) if theirs else None,
    )


def measured(
    vocab_size: int, mode: str, objective: str, peak: float, options: argparse.Namespace, recording: Recording | None
) -> Result:
    """Measures, or finds in the record what was measured before."""
    measure = lambda: dataclasses.asdict(compare(objective, mode, vocab_size, peak, options)) | {"matmul_peak": peak}
    if recording is None:
        figures = measure()
        print(json.dumps(figures), flush=True)
    else:
        asked = {"objective": objective, "mode": mode, "vocab_size": vocab_size, "torch": options.torch}
        figures = recording.cell(asked, configure(objective, options.set).to_dict(), measure)
    return Result.of(figures)


def matmul_peak(dtype: str) -> float:
    """FLOP/s of the best of several plain products over all devices of this process, one after another on each."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: a @ b).lower(x, x).compile()
    best = min(
        timed(Program(lambda n: jax.block_until_ready([product(x, x) for _ in range(n)]) and None, 1), 3)
        for _ in range(5)
    )
    return 2 * size**3 / best * jax.device_count()


def table(results: list[Result]) -> str:
    """Markdown."""
    heads = ["objective", "mode", "V", "tokens/s", "ms a step", "compile s", "memory GiB", "TFLOP", "of peak"]
    heads += ["torch tokens/s", "ratio"]
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    number = lambda value, form: "-" if value is None else format(value, form)
    for r in results:
        cells = [
            r.objective,
            r.mode,
            f"{r.vocab_size:,}",
            f"{r.tokens_per_second:,.0f}",
            f"{1e3 * r.step_seconds:,.0f}",
        ]
        cells += [f"{r.compile_seconds:.1f}", number(None if r.memory is None else r.memory / 2**30, ".2f")]
        cells += [number(None if r.flops is None else r.flops / 1e12, ".3f"), number(r.peak_fraction, ".0%")]
        cells += [number(r.torch_tokens_per_second, ",.0f"), number(r.ratio, ".2f")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", type=_choices(OBJECTIVES), default=list(OBJECTIVES))
    parser.add_argument("--modes", type=_choices(MODES), default=list(MODES))
    parser.add_argument(
        "--vocab_sizes", type=lambda text: [int(size) for size in text.split(",")], default=[50258, 258]
    )
    parser.add_argument("--steps", type=int, default=2, help="in a row, each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="GROUP.NAME=VALUE")
    parser.add_argument("--torch", action="store_true", help="run the PyTorch yardstick beside ours")
    parser.add_argument("--out", type=Path, help="record there; what is there is not measured again")
    options = parser.parse_args(argv)

    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    peak = matmul_peak(dtype)
    print(f"{jax.device_count()} {jax.devices()[0].device_kind}, plain {dtype} products {peak / 1e9:,.0f} GFLOP/s")
    recording, results = Recording(options.out) if options.out else None, []
    for cell in itertools.product(options.vocab_sizes, options.modes, options.objectives):
        results.append(measured(*cell, peak, options, recording))
        if recording is not None:
            recording.write_table(table([Result.of(cell["figures"]) for cell in recording.cells]))
    print(table(results))


def _choices(allowed: tuple[str, ...]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        unknown = set(text.split(",")) - set(allowed)
        if unknown:
            raise argparse.ArgumentTypeError(f"found {', '.join(sorted(unknown))}; allowed: {', '.join(allowed)}")
        return text.split(",")

    return parse


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
