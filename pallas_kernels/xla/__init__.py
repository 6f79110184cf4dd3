"""The attention operations in plain jax.numpy, blockwise: what runs where there is no accelerator."""
