"""Hopper kernels (Mosaic GPU, sm_90a). They need jax 0.11 or newer; nothing here is imported before a kernel is asked for."""
