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

import importlib
from typing import Literal, NamedTuple

from .dispatch import Row, Target, refused_unless_hopper, refuses_nothing

Implementation = Literal["auto", "reference", "xla", "pallas_tpu", "pallas_gpu", "cudnn"]


class FlashProblem(NamedTuple):
    """What the choice depends on."""

    target: Target
    dtype: str
    widths: tuple[int, int]  # H, Hv
    lengths: tuple[int, int]  # T, S
    offset: int | None  # None where it is traced
    segmented: bool
    return_lse: bool
    interpret: bool


def _refused_by_hopper_kernel(problem: FlashProblem) -> str | None:
    reason = refused_unless_hopper(problem)
    if reason is not None:
        return reason
    return importlib.import_module(".gpu.flash", __package__).unsupported((problem.dtype,) * 3, problem.widths)


def _refused_by_cudnn(problem: FlashProblem) -> str | None:
    T, S = problem.lengths
    if T != S or problem.offset != 0:
        return f"T={T}, S={S}, query_offset={problem.offset}: expected T = S and offset 0"
    if problem.widths[0] != problem.widths[1]:
        return f"v has head width {problem.widths[1]}, q has {problem.widths[0]}: expected the same"
    if problem.segmented:
        return "segment_ids are given, expected none"
    return "return_lse is set, expected False" if problem.return_lse else None


TABLE: dict[str, Row[FlashProblem]] = {
    "pallas_tpu": Row(
        ".tpu.flash", "flash_attention_tpu", ("tpu",), ("bfloat16", "float32"), refuses_nothing, interpretable=True
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
    "xla": Row(".xla.flash", "flash_attention_xla", ("cpu", "gpu", "tpu"), None, refuses_nothing),
    "reference": Row(
        ".reference", "flash_attention_reference", ("cpu", "gpu", "tpu"), None, refuses_nothing, automatic=False
    ),
}
