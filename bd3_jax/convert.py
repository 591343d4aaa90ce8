"""Checkpoints into the authors' layout and into ours: `bd3 convert SOURCE DEST`. Nothing that exists is overwritten."""

import os
from typing import Literal

import jax
from etils import epath

from bd3_jax.checkpoints import orbax, run_folder
from bd3_jax.checkpoints.published import write_published
from bd3_jax.checkpoints.source import Weights
from bd3_jax.data.tokenizers import Tokenizer
from bd3_jax.errors import UserError
from bd3_jax.folders import in_bucket, reachable
from bd3_jax.model_card import model_card
from bd3_jax.pretrained import Pretrained, load_pretrained

Format = Literal["pytorch", "bd3"]


def convert(
    source: str,
    dest: str,
    *,
    weights: Weights = "ema",
    format: Format = "pytorch",
    tokenizer: Tokenizer | str | None = None,
    step: int | None = None,
) -> epath.Path:
    """Writes a checkpoint into a folder of its own, with a model card; float32 weights stay the same bit for bit.

    Args:
      source: see `load_pretrained`.
      dest: the folder to make; it appears when it is complete.
      weights: ema or raw, where the source has both.
      format: pytorch: config.json and model.safetensors as the authors publish them. bd3: a workdir to evaluate, to
        sample, and to start training from with `config.init_from`.
      tokenizer: what the source was trained with, if it does not say.
      step: of the checkpoint of a workdir; None: the newest.

    Raises:
      UserError: `dest` exists, or the source cannot be loaded or not be written there in that format.
    """
    target = reachable(dest, "DEST")
    if target.exists() or os.path.islink(target):
        raise UserError(f"{dest} exists and is not overwritten; name a folder that does not exist yet")
    if format not in ("pytorch", "bd3"):
        raise UserError(f"format is {format!r}; allowed: pytorch, bd3")
    if format == "pytorch" and in_bucket(target):
        raise UserError(f"DEST is {dest!r}; allowed for format = pytorch: a local folder; copy it into the bucket then")
    loaded = load_pretrained(source, weights=weights, tokenizer=tokenizer, step=step)
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    temporary.mkdir(parents=True)
    try:
        if format == "bd3":
            _write_run(temporary, loaded)
        else:
            write_published(temporary, loaded.architecture, jax.device_get(loaded.params))
            if loaded.tokenizer:
                loaded.tokenizer.save(temporary)
        (temporary / "README.md").write_text(model_card(loaded, target.name), encoding="utf-8")
        temporary.rename(target)
    except BaseException:
        temporary.rmtree()
        raise
    return target


def _write_run(folder: epath.Path, loaded: Pretrained) -> None:
    architecture = loaded.architecture
    if architecture.time_conditioned != (architecture.objective == "sedd"):
        found = "is" if architecture.time_conditioned else "is not"
        raise UserError(f"{loaded.source} is {architecture.objective} and {found} conditioned on time: no run is such")
    run_folder.write_config(loaded.config, folder)
    if loaded.tokenizer:
        loaded.tokenizer.save(folder / "tokenizer")
    else:
        print(f"no tokenizer was written ({loaded.no_tokenizer}); bd3 sample needs one: give --tokenizer")
    orbax.save_params(folder, loaded.step or 0, loaded.params, *loaded.interval)
