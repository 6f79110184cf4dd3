"""Attention on the accelerator: flash_attention for whole sequences, paged_attention for a paged cache.

This package imports jax only and knows arrays, not models.
"""

from .flash_attention import flash_attention
from .flash_gradients import flash_attention_gradients
from .paged_attention import paged_attention, write_pages

__all__ = ["flash_attention", "flash_attention_gradients", "paged_attention", "write_pages"]
