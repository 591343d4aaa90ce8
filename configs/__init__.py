"""Configurations: `base.py` has every field, each other file a corpus or a purpose. Installed as `bd3_jax.configs`."""
