"""Wherever weights come from: a run of ours, or what the authors published. Evaluation and training start here."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any, Literal

from etils import epath

from bd3_jax.checkpoints import orbax, published, pytorch, run_folder
from bd3_jax.checkpoints.architecture import Architecture
from bd3_jax.config import Config
from bd3_jax.errors import UserError
from bd3_jax.folders import reachable

Weights = Literal["ema", "raw"]


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened checkpoint, its weights not read yet.

    Attributes:
      name: what the user called it.
      architecture: what the weights are weights of.
      config: complete settings that fit it.
      load: (abstract parameters, shardings or None) -> parameters; `Network.abstract_params` gives the first. Raises
        UserError where they do not fit.
      tokenizer: the file or folder of its own; None: it brings none.
      run: the workdir, if it is one of ours.
      step: updates done; None: the source does not say.
    """

    name: str
    architecture: Architecture
    config: Config
    load: Callable[[Any, Any], Any]
    tokenizer: epath.Path | None
    run: epath.Path | None
    step: int | None


def open_source(
    name: str,
    weights: Weights = "ema",
    revision: str | None = None,
    token: str | bool | None = None,
    step: int | None = None,
) -> Source:
    """Opens a workdir, a folder or file of the authors' layout, or a hub id.

    Args:
      name: a workdir of ours; see `published.open_published` and `published.download`.
      weights: ema or raw, where the source has both.
      revision: branch, tag or commit of a hub id.
      token: the hub's access token.
      step: of the checkpoint of a workdir; None: the newest that can be read.

    Raises:
      UserError: nothing is there, or no such checkpoint, or it cannot be reached, or it is damaged.
    """
    if weights not in ("ema", "raw"):
        raise UserError(f"weights is {weights!r}; allowed: ema, raw")
    path = reachable(name, "the source, a path or OWNER/NAME on the hub,")
    if not path.exists():
        path = published.download(name, revision, token)
    if _is_run(path):
        return _open_run(name, path, weights, step)
    if step is not None:
        raise UserError(f"step is {step}, but {name} is no workdir; allowed: none, for it holds one checkpoint")
    opened = published.open_published(path, weights)

    def load(abstract_params: Any, shardings: Any) -> Any:
        try:
            return pytorch.from_tensors(opened.tensors, abstract_params, shardings)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None

    file = (path if path.is_dir() else path.parent) / published.TOKENIZER
    tokenizer = file if file.exists() else None
    return Source(name, opened.architecture, opened.architecture.to_config(), load, tokenizer, run=None, step=None)


def _is_run(path: epath.Path) -> bool:
    if (path / orbax.FOLDER).is_dir():
        return True
    try:
        return "objective" in json.loads((path / run_folder.FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def _open_run(name: str, workdir: epath.Path, weights: Weights, step: int | None) -> Source:
    config = run_folder.read_config(workdir)
    summary = orbax.summarize(workdir, step)
    architecture = Architecture.of(config, summary.vocab_size, summary.low, summary.high)

    def load(abstract_params: Any, shardings: Any) -> Any:
        return orbax.restore_params(config, workdir, weights, shardings, summary.step)[0]

    tokenizer = workdir / "tokenizer" if (workdir / "tokenizer").exists() else None
    return Source(name, architecture, config, load, tokenizer, run=workdir, step=summary.step)
