"""Tokens a second of BD3-LM and AR with a cache, by batch and context: when block diffusion pays.

    python experiments/sampling_speed.py --out=experiments/results/samplers [--batches=1,16,64] [--lengths=64,256,2048]

Random weights, 'tiny' size (256 wide, 8 layers, 8 heads), GPT-2's vocabulary, nucleus 0.9. Caches have fixed shapes, so
a call costs the same wherever in the text it is: the best of a few device calls of 32 tokens is taken, after one to
warm up. Writes OUT/speed.md.
"""

import sys
import time

from absl import flags
from etils import epath

from bd3_jax import command_line, runtime

CASES = [
    ("ar", "autoregressive", {}),
    ("bd3lm,block_size=4", "first_hitting", {}),
    ("bd3lm,block_size=16", "first_hitting", {}),
    ("bd3lm,block_size=16", "confidence, 4 a call", dict(sampler="confidence", tokens_per_step=4)),
]
REPEATS = 3


def main(argv: list[str]) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string("out", None, "where the table goes", flag_values=values)
    flags.DEFINE_list("batches", ["1", "16", "64"], "sequences at a time", flag_values=values)
    flags.DEFINE_list("lengths", ["64", "256", "1024", "2048"], "context in tokens", flag_values=values)
    command_line.positional(argv, values, usage=__doc__)
    out = epath.Path(command_line.required(values, "out", "a folder"))
    out.mkdir(parents=True, exist_ok=True)
    runtime.start()
    lines = [
        "| model | sampler | context | batch | network calls per token | tokens/s |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for string, sampler, settings in CASES:
        for length in map(int, values.lengths):
            for batch in map(int, values.batches):
                calls, speed = measure(string, settings, length, batch)
                lines.append(f"| {string} | {sampler} | {length} | {batch} | {calls:.2f} | {speed:,.0f} |")
                print(lines[-1], flush=True)
                (out / "speed.md").write_text("\n".join(lines) + "\n")


def measure(string: str, settings: dict, length: int, batch: int) -> tuple[float, float]:
    """Network calls and seconds per token."""
    import jax

    from bd3_jax.config import from_config_dict
    from bd3_jax.configs import base
    from bd3_jax.language_model import LanguageModel
    from bd3_jax.sampling.drawing import Slots
    from bd3_jax.sampling.sampler import Sampler
    from bd3_jax.special_ids import SpecialIds

    config = base.get_config(string)
    config.model.update(length=length, width=256, num_layers=8, num_heads=8, cond_dim=64, scan_unroll=8)
    config.sampling.update(max_length=length * 100, min_entropy=0.0, **settings)
    resolved = from_config_dict(config)
    model = LanguageModel.from_config(resolved, SpecialIds(bos=50256, eos=50256, mask=50257, vocab_size=50258))
    params = jax.jit(model.network.init)(jax.random.key(0))
    sampler = Sampler.from_config(model, resolved.sampling)
    slots = Slots(sampler, params, sampler.canvas([[]])[0], batch)
    slots.begin({slot: slots.new(slot) for slot in range(batch)})
    slots.step()
    best, calls = float("inf"), 0.0
    for _ in range(REPEATS):
        before = [(drawn.length, drawn.nfe) for drawn in slots.drawing if drawn]
        began = time.perf_counter()
        slots.step()
        seconds = time.perf_counter() - began
        after = [(drawn.length, drawn.nfe) for drawn in slots.drawing if drawn]
        tokens = sum(new[0] - old[0] for old, new in zip(before, after, strict=True))
        calls = sum(new[1] - old[1] for old, new in zip(before, after, strict=True)) / tokens
        best = min(best, seconds / tokens)
    return calls, 1 / best


if __name__ == "__main__":
    sys.exit(command_line.exit_status(lambda: main(sys.argv[1:])))
