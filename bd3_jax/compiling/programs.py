"""The programs of train, eval and sample for a machine that is not at hand, traced from settings alone."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bd3_jax import sharding
from bd3_jax.compiling.hlo import Buffer
from bd3_jax.config import Config
from bd3_jax.data.corpora import get_corpus
from bd3_jax.diffusion.orders import ORDERS
from bd3_jax.errors import UserError
from bd3_jax.evaluation.perplexity import likelihood_program
from bd3_jax.language_model import LanguageModel
from bd3_jax.models.network import Frozen
from bd3_jax.sampling.sampler import Sampler
from bd3_jax.sampling.step_program import abstract_memory, abstract_weights, trace_step
from bd3_jax.special_ids import SpecialIds
from bd3_jax.training.update import make_program
from bd3_jax.training.validation import check_batches

# Tokenizer -> V with the mask, and the mask's id; neither text nor a tokenizer's file is needed to compile.
VOCABULARIES = {
    "gpt2": (50258, 50257),
    "bert-base-uncased": (30522, 103),
    "text8": (35, 4),
    "bytes": (258, 257),
}


class Calls(NamedTuple):
    """The network calls of a program that samples, each of which draws a token of every row.

    Attributes:
      number: in a run.
      repeated: of every block, after its first.
      floor: bytes that a chip has to move for one, whatever it keeps: weights and context once.
    """

    number: int
    repeated: int
    floor: int


class Program(NamedTuple):
    """A program for a machine.

    Attributes:
      traced: it, to be lowered.
      held: bytes of its arguments that one chip holds before it runs, by kind.
      rows: of its batch.
      flops: of its matrix products over all devices, see `product_flops`. Of train and eval the most: with the output
        layer at every position, though it is left out where nothing is masked. Of sample, see `turns`.
      beside: bytes by kind of what a chip holds all the same.
      turns: of the loops whose number of turns depends on what is drawn, as `flops` counts them. Of sample the network
        calls of a block after its first, where they are known, else one.
      calls: where it samples a token a call, with keys and values kept.
    """

    traced: jax.stages.Traced
    held: dict[str, int]
    rows: int
    flops: float
    beside: Mapping[str, int] = MappingProxyType({})
    turns: float = 1
    calls: Calls | None = None


def trace(config: Config, mode: str, devices: Sequence[jax.Device], platform: str, vocab_size: int) -> Program:
    """The program of `mode` (train, eval or sample) that a run with these settings compiles on these devices.

    That of `sample` is one step of `sampling.drawing.Slots`, some blocks of `config.sampling.batch_size` sequences.
    `vocab_size` is V, or 0 for that of `config.data.tokenizer`.

    Raises:
      UserError: settings that do not fit the devices, or a tokenizer whose size is not known.
    """
    if mode == "eval" and config.eval.estimator in ORDERS:
        raise UserError(
            f"config.eval.estimator is {config.eval.estimator}; allowed here: monte_carlo, low_variance, which take "
            "one pass (an exact order takes as many as a block has tokens, in about the same memory)"
        )
    mesh = sharding.make_mesh(config.mesh, devices)
    model = LanguageModel.from_config(config, special_ids(config, vocab_size), sharding.batch_shards(mesh))
    model = dataclasses.replace(model, network=dataclasses.replace(model.network, platform=platform))
    if mode == "train":
        check_batches(config, mesh)
        _, _, state, traced = make_program(model, config, mesh)
        kinds = {"parameters": state.params, "average (EMA)": state.ema, "optimiser": state.opt_state}
        rows = config.training.batch_size
        together = rows * model.noise_copies // config.training.microbatches
        turns = model.most_chunks(together)
        held = {name: _bytes(tree) for name, tree in kinds.items()}
        return Program(traced, held, rows, product_flops(traced.jaxpr, turns), turns=turns)
    shardings = sharding.param_shardings(mesh, model.network)
    params = sharding.abstract_arrays(model.network.abstract_params(), shardings)
    held = {"parameters": _bytes(params)}
    if mode == "eval":
        rows = config.eval.batch_size
        split = sharding.batch_sharding(mesh, rows, "config.eval.batch_size")
        batch = jax.ShapeDtypeStruct((rows, model.length), jnp.int32, sharding=split)
        key = jax.eval_shape(lambda: jax.random.key(0))
        traced = likelihood_program(model, config.eval.estimator, split).trace(params, batch, key)
        turns = model.most_chunks(rows)
        return Program(traced, held, rows, product_flops(traced.jaxpr, turns), turns=turns)
    rows = -(-config.sampling.batch_size // model.batch_shards) * model.batch_shards
    split = sharding.row_sharding(mesh)
    sampler = Sampler.from_config(model, config.sampling)
    weights, blocks, calls = abstract_weights(sampler, params), sampler.blocks_per_call, None
    context = _bytes(abstract_memory(sampler, weights, rows, split))
    traced = trace_step(sampler.program, weights, rows, blocks, split)
    if isinstance(weights, Frozen) and config.sampling.sampler in ("first_hitting", "autoregressive"):
        read = _bytes((weights.layers, weights.final, weights.output))  # but few rows of the embedding
        calls = Calls(blocks * model.block_size, model.block_size - 1, read + context)
    turns = calls.repeated if calls else 1
    kinds = {"weights for sampling": _bytes(weights), "context of samples": context}
    beside = held
    if not isinstance(weights, Frozen):  # the weights are the parameters themselves
        kinds, beside = {**held, "context of samples": context}, {}
    return Program(traced, kinds, rows, product_flops(traced.jaxpr, turns), beside, turns, calls)


def special_ids(config: Config, vocab_size: int) -> SpecialIds:
    """Ids of the size that matters: those of the corpus' tokenizer, or the last of `vocab_size` ids for the mask.

    Raises:
      UserError: a tokenizer that is not in `VOCABULARIES`, and no `vocab_size`.
    """
    name = config.data.tokenizer or get_corpus(config.data.corpus).tokenizer
    if not vocab_size and name == "bpe":
        vocab_size = config.data.vocab_size + 1
    if not vocab_size and name not in VOCABULARIES:
        raise UserError(
            f"the vocabulary of the tokenizer {name!r} is not known without reading it; allowed: "
            f"--vocab_size=V with the mask token, or a tokenizer of {', '.join(VOCABULARIES)}"
        )
    size, mask = (vocab_size, vocab_size - 1) if vocab_size else VOCABULARIES[name]
    return SpecialIds(bos=0, eos=0, mask=mask, vocab_size=size)


def _bytes(tree: Any) -> int:
    """On one chip."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def product_flops(jaxpr: Any, turns: float = 1) -> float:
    """Operations of the matrix products in a program over all devices, 2 for each multiplication and addition.

    A scan counts as often as it turns, a loop of unknown length `turns` times, of several branches the dearest. A
    Pallas kernel counts what it declares, or what its body does at every point of its grid.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        inner = [product_flops(found, turns) for value in params.values() for found in _jaxprs(value)]
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
        elif name == "scan":
            total += params["length"] * sum(inner)
        elif name == "while":
            total += turns * sum(inner)
        elif name == "cond":
            total += max(inner)
        elif name == "shard_map":
            total += params["mesh"].size * sum(inner)
        elif name == "pallas_call":
            declared = params.get("cost_estimate")
            total += declared.flops if declared else math.prod(params["grid_mapping"].grid) * sum(inner)
        else:
            total += sum(inner)
    return total


def _jaxprs(value: Any) -> list[Any]:
    if hasattr(value, "eqns"):
        return [value]
    if hasattr(value, "jaxpr"):
        return _jaxprs(value.jaxpr)
    return [found for item in value for found in _jaxprs(item)] if isinstance(value, tuple | list) else []


def largest_values(jaxpr: Any, rows: int, shards: int, count: int = 5) -> list[Buffer]:
    """The largest products, and the largest arrays that a scan keeps for each turn, as they are before any fusion.

    For a compiler that says only how much it lacks. Sizes are those on one chip: what has the `rows` of the batch
    among its dimensions is split into `shards`. Each shape is named once.
    """
    found: dict[str, Buffer] = {}

    def visit(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            for value in equation.params.values():
                for inner in _jaxprs(value):
                    visit(inner)
            name = equation.primitive.name
            if name not in ("dot_general", "scan"):
                continue
            # A scan returns what it carries first.
            for made in equation.outvars[equation.params["num_carry"] if name == "scan" else 0 :]:
                size = made.aval.size * made.aval.dtype.itemsize // (shards if rows in made.aval.shape else 1)
                shape = made.aval.str_short()
                operation = f"{equation.source_info.name_stack}/{name}".removeprefix("/")
                if shape not in found or found[shape].size < size:
                    found[shape] = Buffer(size, shape, operation)

    visit(jaxpr)
    return sorted(found.values(), key=lambda buffer: -buffer.size)[:count]
