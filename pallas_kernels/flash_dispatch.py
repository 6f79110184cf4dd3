"""Which implementation of flash_attention serves a call: one table, read from top to bottom.

| name       | device     | dtype             | shapes                      | why                                     |
|------------|------------|-------------------|-----------------------------|-----------------------------------------|
| pallas_tpu | TPU        | bfloat16, float32 | all                         | skips blocks outside the window         |
| pallas_gpu | Hopper GPU | bfloat16, float16 | head widths up to 256       | as above; needs jax 0.11                |
| cudnn      | GPU        | bfloat16, float16 | T = S, no segments, no lse  | a baseline: only when asked for by name |
| xla        | all        | all               | all                         | blockwise, O(T * W), runs everywhere    |
| reference  | all        | all               | all                         | the definition: only when asked for     |

"auto" takes the first row for the device at hand that does not refuse the call, and logs once why it passed others
over. What a row refuses it also refuses when asked for by name, with the same reason.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax

Implementation = Literal["auto", "reference", "xla", "pallas_tpu", "pallas_gpu", "cudnn"]
Platform = Literal["cpu", "gpu", "tpu"]

# Parts of the names that jax gives these devices.
HOPPER = ("H100", "H200", "H800", "GH200")

logger = logging.getLogger(__name__)


class Target(NamedTuple):
    """The device that a call will run on: its platform, and its name as jax gives it."""

    platform: str
    kind: str


class Problem(NamedTuple):
    """What the choice depends on."""

    target: Target
    dtype: str
    widths: tuple[int, int]  # H, Hv
    lengths: tuple[int, int]  # T, S
    offset: int | None  # None where it is traced
    segmented: bool
    return_lse: bool
    interpret: bool


class Row(NamedTuple):
    """One line of the table: where the function is, on which platforms, and what it refuses."""

    module: str
    function: str
    platforms: tuple[Platform, ...]
    dtypes: tuple[str, ...] | None
    refuses: Callable[[Problem], str | None]
    automatic: bool = True
    interpretable: bool = False


def _refuses_nothing(problem: Problem) -> str | None:
    return None


def _refused_by_hopper_kernel(problem: Problem) -> str | None:
    if not problem.interpret and not any(name in problem.target.kind for name in HOPPER):
        return f"the device is {problem.target.kind!r}, the kernel is written for Hopper ({', '.join(HOPPER)})"
    return importlib.import_module(".gpu.flash", __package__).unsupported((problem.dtype,) * 3, problem.widths)


def _refused_by_cudnn(problem: Problem) -> str | None:
    T, S = problem.lengths
    if T != S or problem.offset != 0:
        return f"T={T}, S={S}, query_offset={problem.offset}: expected T = S and offset 0"
    if problem.widths[0] != problem.widths[1]:
        return f"v has head width {problem.widths[1]}, q has {problem.widths[0]}: expected the same"
    if problem.segmented:
        return "segment_ids are given, expected none"
    return "return_lse is set, expected False" if problem.return_lse else None


TABLE: dict[str, Row] = {
    "pallas_tpu": Row(
        ".tpu.flash", "flash_attention_tpu", ("tpu",), ("bfloat16", "float32"), _refuses_nothing, interpretable=True
    ),
    "pallas_gpu": Row(
        ".gpu.flash",
        "flash_attention_gpu",
        ("gpu",),
        ("bfloat16", "float16"),
        _refused_by_hopper_kernel,
        interpretable=True,
    ),
    "cudnn": Row(
        ".cudnn", "flash_attention_cudnn", ("gpu",), ("bfloat16", "float16"), _refused_by_cudnn, automatic=False
    ),
    "xla": Row(".xla.flash", "flash_attention_xla", ("cpu", "gpu", "tpu"), None, _refuses_nothing),
    "reference": Row(
        ".reference", "flash_attention_reference", ("cpu", "gpu", "tpu"), None, _refuses_nothing, automatic=False
    ),
}


def target() -> Target:
    """The device compiled for: that of the abstract mesh in use (an absent chip), else jax's default."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return Target(abstract.platform, abstract.device_kind)
    device = jax.devices()[0]
    return Target(device.platform, device.device_kind)


def refusal(name: str, problem: Problem) -> str | None:
    """Why the row `name` cannot serve the call, or None if it can. Interpreted kernels run on any device."""
    row = TABLE[name]
    if problem.interpret and not row.interpretable:
        return "interpret is set, which only the Pallas kernels have"
    if not problem.interpret and problem.target.platform not in row.platforms:
        hint = "; interpret=True runs it here, slowly" if row.interpretable else ""
        return f"the device is {problem.target.platform}, expected {' or '.join(row.platforms)}{hint}"
    if row.dtypes is not None and problem.dtype not in row.dtypes:
        return f"q is {problem.dtype}, expected {' or '.join(row.dtypes)}"
    return row.refuses(problem)


def choose(implementation: str, problem: Problem) -> Callable[..., Any]:
    """The function that serves the call. Raises ValueError if the one asked for cannot, with the reason."""
    if implementation != "auto":
        reason = refusal(implementation, problem)
        if reason is not None:
            raise ValueError(f"implementation={implementation!r}: {reason}")
        return _load(implementation)
    for name, row in TABLE.items():
        if row.automatic and problem.target.platform in row.platforms:
            reason = refusal(name, problem)
            if reason is None:
                return _load(name)
            _log_once(f"flash_attention: {name} is passed over: {reason}")
    raise ValueError("implementation='auto': no row of the table serves interpret=True here: name a Pallas kernel")


def _load(name: str) -> Callable[..., Any]:
    row = TABLE[name]
    return getattr(importlib.import_module(row.module, __package__), row.function)


@functools.cache
def _log_once(message: str) -> None:
    logger.warning(message)
