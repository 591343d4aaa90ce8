"""Weights that a new run starts from, `config.init_from`: whether they fit."""

from bd3_jax.checkpoints.source import Source, open_source
from bd3_jax.config import Config
from bd3_jax.data.tokenizers import Tokenizer, load_tokenizer
from bd3_jax.errors import UserError

_ADALN = "sigma_map.*, blocks.*.adaLN_modulation.*, output_layer.adaLN_modulation.*"


def open_initial(config: Config, tokenizer: Tokenizer) -> Source:
    """Opens the averaged weights of `config.init_from` and compares them with what `config` trains.

    Objective and block size may change, as in the paper's recipe (pre-training at B = L, then a smaller B: Block
    Diffusion, section 6), and so may the length; not from or to an autoregressive model.

    Raises:
      UserError: naming the first setting that does not fit.
    """
    source = open_source(config.init_from)
    found, name = source.architecture, f"config.init_from = {config.init_from}"
    if found.adaln != (config.objective != "ar"):
        lack = f"has the adaLN tensors {_ADALN}, which ar lacks" if found.adaln else f"lacks the adaLN tensors {_ADALN}"
        raise UserError(
            f"config.objective is {config.objective}, but {name} is of objective {found.objective} and {lack}"
        )
    sizes = {"width": found.width, "num_layers": found.num_layers, "num_heads": found.num_heads}
    if found.adaln:
        sizes["cond_dim"] = found.cond_dim
    for setting, size in sizes.items():
        if getattr(config.model, setting) != size:
            raise UserError(f"config.model.{setting} is {getattr(config.model, setting)}, but {name} has {size}")
    if tokenizer.ids.vocab_size != found.vocab_size:
        given = f"config.data.tokenizer gives V = {tokenizer.ids.vocab_size} with the mask"
        raise UserError(f"{given}, but {name} has {found.vocab_size}")
    if source.tokenizer is not None and load_tokenizer(source.tokenizer).fingerprint != tokenizer.fingerprint:
        raise UserError(f"config.data.tokenizer is not the one of {name}, whose token ids mean something else")
    return source
