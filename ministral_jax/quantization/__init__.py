"""Weights in eight and four bits: array formats, their exact (de)quantisation, and products with them."""

from .formats import LinearFormat
from .fp8 import Fp8BlockWeight, Fp8Weight
from .int8 import Int8Weight
from .nf4 import Nf4Weight
from .nvfp4 import Nvfp4Weight
from .weight import QuantizedProduct, QuantizedWeight, frozen_product

__all__ = [
    "Fp8BlockWeight",
    "Fp8Weight",
    "Int8Weight",
    "LinearFormat",
    "Nf4Weight",
    "Nvfp4Weight",
    "QuantizedProduct",
    "QuantizedWeight",
    "frozen_product",
]
