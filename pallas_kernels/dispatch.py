"""How a table of implementations is read: what a row says, why it refuses a call, which one serves it.

The tables themselves are in flash_dispatch.py, paged_dispatch.py and grouped_dispatch.py.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax

Platform = Literal["cpu", "gpu", "tpu"]

# Parts of the names that jax gives these devices.
HOPPER = ("H100", "H200", "H800", "GH200")

logger = logging.getLogger(__name__)


class Target(NamedTuple):
    """The device that a call will run on: its platform, and its name as jax gives it."""

    platform: str
    kind: str


@runtime_checkable
class Problem(Protocol):
    """What the choice depends on; each operation has its own, with at least these."""

    @property
    def target(self) -> Target: ...
    @property
    def dtype(self) -> str: ...
    @property
    def interpret(self) -> bool: ...


AnyProblem = TypeVar("AnyProblem", bound=Problem)


@dataclass(frozen=True)
class Row(Generic[AnyProblem]):
    """One line of a table: where the function is, on which platforms, and what it refuses."""

    module: str
    function: str
    platforms: tuple[Platform, ...]
    dtypes: tuple[str, ...] | None
    refuses: Callable[[AnyProblem], str | None]
    automatic: bool = True
    interpretable: bool = False


def refuses_nothing(problem: Problem) -> str | None:
    """For rows that serve every call on their platforms."""
    del problem


def refused_unless_hopper(problem: Problem) -> str | None:
    """For kernels written for Hopper; interpreted, they run anywhere."""
    if problem.interpret or any(name in problem.target.kind for name in HOPPER):
        return None
    return f"the device is {problem.target.kind!r}, the kernel is written for Hopper ({', '.join(HOPPER)})"


def target() -> Target:
    """The device compiled for: that of the abstract mesh in use (an absent chip), else jax's default."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return Target(abstract.platform, abstract.device_kind)
    device = jax.devices()[0]
    return Target(device.platform, device.device_kind)


def refusal(row: Row[AnyProblem], problem: AnyProblem) -> str | None:
    """Why the row cannot serve the call, or None if it can. Interpreted kernels run on any device."""
    if problem.interpret and not row.interpretable:
        return "interpret is set, which only the Pallas kernels have"
    if not problem.interpret and problem.target.platform not in row.platforms:
        hint = "; interpret=True runs it here, slowly" if row.interpretable else ""
        return f"the device is {problem.target.platform}, expected {' or '.join(row.platforms)}{hint}"
    if row.dtypes is not None and problem.dtype not in row.dtypes:
        return f"q is {problem.dtype}, expected {' or '.join(row.dtypes)}"
    return row.refuses(problem)


def choose(
    operation: str, table: Mapping[str, Row[AnyProblem]], implementation: str, problem: AnyProblem
) -> Callable[..., Any]:
    """The function that serves the call: the first automatic row for the device that does not refuse it.

    Raises ValueError if the row asked for by name cannot, with the reason.
    """
    if implementation != "auto":
        reason = refusal(table[implementation], problem)
        if reason is not None:
            raise ValueError(f"implementation={implementation!r}: {reason}")
        return _load(table[implementation])
    name = automatic(operation, table, problem)
    if name is None:
        raise ValueError("implementation='auto': no row of the table serves interpret=True here: name a Pallas kernel")
    return _load(table[name])


def automatic(operation: str, table: Mapping[str, Row[AnyProblem]], problem: AnyProblem) -> str | None:
    """The first automatic row for the device that does not refuse the call; logs once why it passed others over."""
    for name, row in table.items():
        if row.automatic and problem.target.platform in row.platforms:
            reason = refusal(row, problem)
            if reason is None:
                return name
            _log_once(f"{operation}: {name} is passed over: {reason}")
    return None


def _load(row: Row[Any]) -> Callable[..., Any]:
    return getattr(importlib.import_module(row.module, __package__), row.function)


@functools.cache
def _log_once(message: str) -> None:
    logger.warning(message)
