"""Hopper kernels (Mosaic GPU, sm_90a). They need jax 0.11 or newer; nothing is imported before one is asked for."""
