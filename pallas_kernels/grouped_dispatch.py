"""Which implementation of grouped_matmul serves a call: one table, read from top to bottom.

| name       | device     | dtype             | widths          | why                                           |
|------------|------------|-------------------|-----------------|-----------------------------------------------|
| pallas_tpu | TPU        | bfloat16, float32 | all             | jax's megablox: reads the rows' matrices once |
| pallas_gpu | Hopper GPU | bfloat16, float16 | multiples of 64 | as above; needs jax 0.11                      |
| xla        | all        | all               | all             | ragged_dot: on CPU and GPU all rows by all w  |
| reference  | all        | all               | all             | the definition: only when asked for           |

"auto" takes the first row for the device at hand that does not refuse the call, and logs once why it passed others
over. What a row refuses it also refuses when asked for by name, with the same reason.
"""

from __future__ import annotations

import importlib
from typing import Literal, NamedTuple

from .dispatch import Row, Target, refused_unless_hopper, refuses_nothing

Implementation = Literal["auto", "reference", "xla", "pallas_tpu", "pallas_gpu"]


class GroupedProblem(NamedTuple):
    """What the choice depends on."""

    target: Target
    dtype: str
    widths: tuple[int, int]  # I, O
    interpret: bool


def _refused_by_tpu_kernel(problem: GroupedProblem) -> str | None:
    if problem.dtype in ("bfloat16", "float32"):
        return None
    return f"x is {problem.dtype}, expected bfloat16 or float32"


def _refused_by_hopper_kernel(problem: GroupedProblem) -> str | None:
    reason = refused_unless_hopper(problem)
    return reason or importlib.import_module(".gpu.grouped", __package__).unsupported(problem.dtype, problem.widths)


def _refused_by_fp8_kernel(problem: GroupedProblem) -> str | None:
    kernel = importlib.import_module(".gpu.grouped", __package__)
    return refused_unless_hopper(problem) or kernel.unsupported(problem.dtype, problem.widths, (kernel.FP8,))


TABLE: dict[str, Row[GroupedProblem]] = {
    "pallas_tpu": Row(".tpu.grouped", "grouped_matmul_tpu", ("tpu",), None, _refused_by_tpu_kernel, interpretable=True),
    "pallas_gpu": Row(
        ".gpu.grouped", "grouped_matmul_gpu", ("gpu",), None, _refused_by_hopper_kernel, interpretable=True
    ),
    "xla": Row(".xla.grouped", "grouped_matmul_xla", ("cpu", "gpu", "tpu"), None, refuses_nothing),
    "reference": Row(
        ".reference", "grouped_matmul_reference", ("cpu", "gpu", "tpu"), None, refuses_nothing, automatic=False
    ),
}
# Of grouped_matmul_fp8: where there is no kernel, its caller has something better than the definition.
FP8_TABLE: dict[str, Row[GroupedProblem]] = {
    "pallas_gpu": Row(
        ".gpu.grouped", "grouped_matmul_fp8_gpu", ("gpu",), None, _refused_by_fp8_kernel, interpretable=True
    ),
    "reference": Row(
        ".reference", "grouped_matmul_fp8_reference", ("cpu", "gpu", "tpu"), None, refuses_nothing, automatic=False
    ),
}
