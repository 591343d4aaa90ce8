"""Tests run on the CPU, whatever the machine has, and speak to nobody; the environment may say otherwise."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
