"""Block diffusion language models in JAX: training, evaluation and sampling."""

__version__ = "0.1.0"
