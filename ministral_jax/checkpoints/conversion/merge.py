"""Merging an adapter into its base model: a conversion of both as one, in bounded memory.

from ministral_jax.checkpoints.conversion.merge import merge
merge("Ministral-8B", "run/lora", "Ministral-8B-tuned", to="hf")
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from ...config_files import Layout
from ...errors import CheckpointError
from ..hub import resolve
from .adapters import require_adapter
from .convert import Progress, Report, write_planned
from .merged import Merging, merged_checkpoint
from .opening import open_checkpoint
from .pieces import Dtype
from .plan import plan_conversion

logger = logging.getLogger("ministral_jax")


def merge(
    base: str | Path,
    adapter: str | Path,
    target: str | Path,
    *,
    to: Layout | None = None,
    dtype: Dtype | None = None,
    max_shard_bytes: int | None = None,
    revision: str | None = None,
    force: bool = False,
    verify: bool = False,
    dry_run: bool = False,
    progress: Progress = lambda done, total: None,
) -> tuple[Report, Merging]:
    """Writes `base`, a folder or hub id, with the adapter in the folder `adapter` merged in, into the folder `target`.

    `W + scale B A` is computed in float32 and rounded once to the base's dtype, or to `dtype`. A quantised base is
    dequantised, and logged to be. `to` is the layout (default: the base's); the rest is as in `convert.convert`, and so
    is what happens to an interrupted run. Raises MinistralError in one line.
    """
    folder = Path(adapter).expanduser()
    require_adapter(folder)
    with contextlib.ExitStack() as opened:
        model = opened.enter_context(open_checkpoint(resolve(base, revision)))
        if model.adapter is not None:
            raise CheckpointError(f"{model.folder}: is an adapter; expected the model it belongs to")
        lora = opened.enter_context(open_checkpoint(folder, base=model.config))
        whole, merging = merged_checkpoint(model, lora, dtype)
        if merging.stored:
            logger.warning(
                "%s: is stored as %s; all its projections are written as %s",
                model.folder,
                merging.stored,
                merging.dequantized,
            )
        layout: Layout = to or ("hf" if model.kind == "hf" else "mistral")
        plan = plan_conversion(whole, layout, dtype=dtype, max_shard_bytes=max_shard_bytes)
        report = write_planned(plan, target, force=force, verify=verify, dry_run=dry_run, progress=progress)
    return report, merging
