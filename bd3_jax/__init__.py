"""Block diffusion language models in JAX: training, evaluation and sampling."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bd3_jax.pretrained import Pretrained as Pretrained
    from bd3_jax.pretrained import load_pretrained as load_pretrained
    from bd3_jax.pretrained import stream as stream

__version__ = "0.1.0"
__all__ = ["Pretrained", "load_pretrained", "stream"]


def __getattr__(name: str) -> Any:
    """Imports JAX when it is needed, not before: a mistake on the command line is reported at once."""
    if name in __all__:
        from bd3_jax import pretrained

        return getattr(pretrained, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
