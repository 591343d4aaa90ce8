"""The network; knows no diffusion."""
