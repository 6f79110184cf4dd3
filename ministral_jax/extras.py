"""Packages that only some extras of the project bring, imported where they are needed."""

from __future__ import annotations

import importlib
from types import ModuleType

from .errors import MinistralError


def import_extra(module: str, extra: str, needed_by: str) -> ModuleType:
    """The module, of a package that `pip install 'ministral-jax[extra]'` brings.

    Raises MinistralError where it cannot be imported, naming what is `needed_by` and the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MinistralError(
            f"{needed_by}: {package} cannot be imported ({error}): pip install 'ministral-jax[{extra}]'"
        ) from error
