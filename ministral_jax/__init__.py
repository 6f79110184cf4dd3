"""The Mistral open-weight family in JAX.

    model = ministral_jax.load("path-or-hub-id")
    tokenizer = ministral_jax.Tokenizer.load("path-or-hub-id")
    generator = ministral_jax.Generator(model, tokenizer)

Names are imported on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .neighbours import require_neighbour

if TYPE_CHECKING:
    from infer.generate import Generator
    from infer.sampling import SamplingParams

    from .checkpoints.load import load
    from .config import ModelConfig
    from .errors import MinistralError
    from .tokenizer import Tokenizer
    from .transformer import Transformer

__version__ = "0.1.0"

_HOMES = {
    "Generator": "infer.generate",
    "MinistralError": "ministral_jax.errors",
    "ModelConfig": "ministral_jax.config",
    "SamplingParams": "infer.sampling",
    "Tokenizer": "ministral_jax.tokenizer",
    "Transformer": "ministral_jax.transformer",
    "load": "ministral_jax.checkpoints.load",
}

__all__ = [
    "Generator",
    "MinistralError",
    "ModelConfig",
    "SamplingParams",
    "Tokenizer",
    "Transformer",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    package = home.partition(".")[0]
    if package != __name__:
        require_neighbour(package)
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return __all__
