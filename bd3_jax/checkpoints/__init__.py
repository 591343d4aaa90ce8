"""Checkpoints: ours (Orbax) and the authors' (PyTorch). Knows no network and no objective, only trees of arrays."""
