"""What the accelerator is told to do: attention over whole sequences and over a paged cache, products by group.

This package imports jax only and knows arrays, not models.
"""

from .flash_attention import flash_attention
from .flash_gradients import flash_attention_gradients
from .grouped_fp8 import grouped_matmul_fp8, has_grouped_fp8_kernel
from .grouped_matmul import grouped_matmul, has_grouped_kernel
from .paged_attention import paged_attention, write_pages

__all__ = [
    "flash_attention",
    "flash_attention_gradients",
    "grouped_matmul",
    "grouped_matmul_fp8",
    "has_grouped_fp8_kernel",
    "has_grouped_kernel",
    "paged_attention",
    "write_pages",
]
