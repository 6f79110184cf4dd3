"""Which implementation of paged_attention serves a call: one table, read from top to bottom.

| name       | device     | q                 | pools                        | why                                   |
|------------|------------|-------------------|------------------------------|---------------------------------------|
| pallas_tpu | TPU        | bfloat16, float32 | what tpu/paged.py supports   | fetches only visible pages, overlapped |
| pallas_gpu | Hopper GPU | bfloat16, float16 | what gpu/paged.py supports   | as above; needs jax 0.11              |
| xla        | all        | all               | all, latent ones too         | gathers visible pages, runs everywhere |
| reference  | all        | all               | all, latent ones too         | the definition: only when asked for   |

"auto" takes the first row for the device at hand that does not refuse the call, and logs once why it passed others
over. What a row refuses it also refuses when asked for by name, with the same reason.
"""

from __future__ import annotations

import importlib
from typing import Literal, NamedTuple

from .dispatch import Row, Target, refused_unless_hopper, refuses_nothing

Implementation = Literal["auto", "reference", "xla", "pallas_tpu", "pallas_gpu"]


class PagedProblem(NamedTuple):
    """What the choice depends on."""

    target: Target
    dtype: str
    pool_dtype: str
    widths: tuple[int, int]  # H, Hv
    heads: tuple[int, int]  # N, K
    page: int  # tokens
    rows: int  # packed query rows T
    sequences: int  # B
    table_width: int  # entries per sequence
    latent: bool  # values are the first columns of the keys
    interpret: bool


def _refused_by_tpu_kernel(problem: PagedProblem) -> str | None:
    return _latent(problem) or importlib.import_module(".tpu.paged", __package__).unsupported(problem)


def _refused_by_hopper_kernel(problem: PagedProblem) -> str | None:
    reason = refused_unless_hopper(problem) or _latent(problem)
    dtypes = (problem.dtype, problem.pool_dtype, problem.pool_dtype)
    return reason or importlib.import_module(".gpu.paged", __package__).unsupported(
        dtypes, problem.widths, problem.heads, problem.page
    )


def _latent(problem: PagedProblem) -> str | None:
    return "v_pages is None, the kernel reads values from pages of their own" if problem.latent else None


TABLE: dict[str, Row[PagedProblem]] = {
    "pallas_tpu": Row(
        ".tpu.paged",
        "paged_attention_tpu",
        ("tpu",),
        ("bfloat16", "float32"),
        _refused_by_tpu_kernel,
        interpretable=True,
    ),
    "pallas_gpu": Row(
        ".gpu.paged",
        "paged_attention_gpu",
        ("gpu",),
        ("bfloat16", "float16"),
        _refused_by_hopper_kernel,
        interpretable=True,
    ),
    "xla": Row(".xla.paged", "paged_attention_xla", ("cpu", "gpu", "tpu"), None, refuses_nothing),
    "reference": Row(
        ".reference", "paged_attention_reference", ("cpu", "gpu", "tpu"), None, refuses_nothing, automatic=False
    ),
}
