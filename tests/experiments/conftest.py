"""Scripts of experiments/ as modules: they are no package."""

import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "experiments"
sys.path.insert(0, str(FOLDER))  # where they find each other


@pytest.fixture(scope="session")
def script():
    """Imports experiments/NAME.py."""

    def load(name):
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        return sys.modules[name]

    return load
