"""Frozen pre-trained diffusion networks as denoisers."""
