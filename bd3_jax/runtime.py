"""What every program that uses devices does first."""

import os

import jax


def start() -> None:
    """Keeps compiled programs in ~/.cache/bd3_jax/xla, or in the folder that JAX_COMPILATION_CACHE_DIR names."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/bd3_jax/xla"))
