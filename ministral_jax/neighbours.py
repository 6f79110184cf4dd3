"""The packages installed beside this one, found before another module of the same name is taken for them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .errors import MinistralError

HOME = Path(__file__).resolve().parent.parent


def require_neighbour(name: str) -> None:
    """Checks that `import name` gives the package beside this one, `infer` or `train`.

    Users have files called train.py: raises MinistralError naming the file that Python would import instead.
    """
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise MinistralError(f"the package {name} is not beside {HOME / 'ministral_jax'}: install ministral-jax again")
    found = [Path(place) for place in ([spec.origin] if spec.origin else spec.submodule_search_locations or [])]
    if not any(place.resolve().is_relative_to(HOME / name) for place in found):
        raise MinistralError(
            f"{found[0]} hides the package {name} of ministral-jax: rename it, or run where it is not on Python's path"
        )
