"""Compiles one program, in a process of its own: `python -m bd3_jax.compiling.child`, which `run.py` starts.

Reads a request as JSON from standard input and writes a report, or {"error": ...} for a user's mistake, as one line of
JSON that begins with `MARK`.
"""

import json
import sys
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from bd3_jax.compiling import hlo, targets, traffic
from bd3_jax.compiling.advice import advice
from bd3_jax.compiling.programs import largest_values, trace
from bd3_jax.compiling.report import Report
from bd3_jax.config import Config
from bd3_jax.config_dict import from_config_dict
from bd3_jax.errors import UserError
from bd3_jax.sharding import slices_of

MARK = "bd3-compile-report "


def compile_program(config: Config, target: targets.Target, mode: str, vocab_size: int, topology: str) -> Report:
    """Traces, lowers and compiles; an out-of-memory error of the compiler is a verdict, any other is raised."""
    chip, devices = target.chip, target.devices()
    began = time.perf_counter()
    program = trace(config, mode, devices, chip.platform, vocab_size)
    lowered = program.traced.lower()
    lowered_at = time.perf_counter()
    memory, needed = {**program.beside, **program.held}, None
    cost: dict[str, Any] = {}
    moved_bytes = call_bytes = None
    text, message = "", ""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" not in message:
            raise
        needed = hlo.needed(message)
    else:
        stats, text = compiled.memory_analysis(), compiled.as_text() or ""
        if program.calls or chip.platform != "cpu":
            moved_bytes = traffic.moved(text, program.turns)
            call_bytes = moved_bytes / program.calls.number if program.calls else None
        memory["temporaries"] = stats.temp_size_in_bytes
        memory["batch and results"] = (
            stats.argument_size_in_bytes
            - sum(program.held.values())
            + stats.output_size_in_bytes
            - stats.alias_size_in_bytes
        )
        memory["program"] = stats.generated_code_size_in_bytes
        needed = sum(memory.values())
        if chip.platform != "cuda":  # whose compiler counts nothing
            cost = compiled.cost_analysis() or {}
    finished = time.perf_counter()
    fits = not message and needed is not None and needed <= chip.memory
    shards = len(devices) // config.mesh.tensor
    seconds = cost.get("optimal_seconds")
    return Report(
        topology=topology,
        mode=mode,
        chips=len(devices),
        rows=program.rows,
        fits=fits,
        memory=memory,
        needed=needed,
        available=chip.memory,
        program_flops=program.flops / len(devices),
        compiler_flops=cost.get("flops"),
        compiler_bytes=cost.get("bytes accessed"),
        moved_bytes=moved_bytes,
        compiler_seconds=seconds if seconds is not None and seconds > 0 else None,
        call_bytes=call_bytes,
        call_floor=program.calls.floor if program.calls else None,
        cycles=hlo.estimated_cycles(text, program.turns),
        collectives=hlo.collectives(text, len(devices), program.turns),
        kernels=hlo.kernels(text, program.turns),
        largest=hlo.largest_buffers(message)
        or hlo.largest_arrays(text)
        or largest_values(program.traced.jaxpr, program.rows, shards),
        advice=[] if fits else advice(config, mode, program.held, chip, len(devices), slices_of(devices)),
        lower_seconds=lowered_at - began,
        compile_seconds=finished - lowered_at,
    )


def main() -> None:
    request = json.load(sys.stdin)
    try:
        config = from_config_dict(ConfigDict(request["config"]))
        target = targets.parse(request["topology"])
        found = compile_program(config, target, request["mode"], request["vocab_size"], request["topology"]).record()
    except UserError as error:
        found = {"error": str(error)}
    print(MARK + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
