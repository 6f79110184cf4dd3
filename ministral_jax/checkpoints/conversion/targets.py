"""The tensors that a conversion writes: names in the target layout, shapes, and what each is put together of.

Usually of one. Only the HF layout has all experts of a layer in one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import CheckpointError
from ..safetensors_writer import TensorSpec
from ..translate import Name, fused_hf_name, hf_name
from .canonical import LORA_LEAVES, PEFT_PREFIX, Kind, Tensor
from .expert_adapters import FusedAdapter, FusedExperts, expert_of, fused_adapters, same_downs, stored_names
from .opening import Checkpoint
from .pieces import Dtype, dtype_after


@dataclass(frozen=True)
class Target:
    """A tensor to write: its parts, one after the other, are its elements."""

    spec: TensorSpec
    parts: tuple[Tensor, ...]


def named_targets(
    source: Checkpoint, to: Kind, of_experts: Sequence[FusedAdapter], dtype: Dtype | None
) -> dict[str, Target]:
    """Name in the layout `to` -> what is written. Raises CheckpointError for what it has no form for.

    `of_experts` are the adapters that `with_fused_adapters` found in `source`.
    """
    if to != "hf":
        return {name: _target([tensor], tensor.shape, dtype) for name, tensor in source.tensors.items()}
    wrapped = source.config.vision is not None
    prefix, single = PEFT_PREFIX if source.adapter else "", _single_experts(source)
    fused: dict[str, list[Tensor]] = {}
    targets: dict[str, Target | None] = {}
    for tensor in source.tensors.values():
        if source.adapter and expert_of(tensor.name.module):
            continue  # see _adapter_targets
        if tensor.name.is_expert_of_fused and not source.adapter and tensor.name.module not in single:
            name = fused_hf_name(tensor.name, wrapped=wrapped)
            targets.setdefault(name, None)  # in the place of its first expert
            fused.setdefault(name, []).append(tensor)
        else:
            name = prefix + hf_name(tensor.name, wrapped=wrapped)
            targets[name] = _target([tensor], tensor.shape, dtype)
    made = {name: target or _all_experts(name, fused[name], source, dtype) for name, target in targets.items()}
    return made | _adapter_targets(source, of_experts, dtype)


def _target(parts: Sequence[Tensor], shape: tuple[int, ...], dtype: Dtype | None) -> Target:
    return Target(TensorSpec(dtype_after(parts[0], dtype), shape), tuple(parts))


def _single_experts(source: Checkpoint) -> set[str]:
    """Experts with scales of their own in the words of compressed-tensors, which has each as a module of its own."""
    return {tensor.name.module for tensor in source.tensors.values() if tensor.name.leaf == "weight_scale"}


def _all_experts(name: str, parts: list[Tensor], source: Checkpoint, dtype: Dtype | None) -> Target:
    """The tensor of all experts: [E, rows of all parts, columns], or a scale for each expert."""
    parts = sorted(parts, key=lambda tensor: _expert_order(tensor.name))
    _require_alike(name, parts, source)
    first, experts = parts[0], len({_expert_order(part.name)[0] for part in parts})
    if first.name.leaf == "weight" or len(first.shape) == 2:
        rows = first.shape[0] * len(parts) // experts
        return _target(parts, (experts, rows, *first.shape[1:]), dtype)
    _require_one_scale(parts, source)
    # As transformers has them.
    shape = (experts, 1, 1) if first.name.leaf == "qscale_weight" else (experts,)
    return _target(parts[:: len(parts) // experts], shape, dtype)


def _expert_order(name: Name) -> tuple[int, str]:
    _, _, expert, part = name.module.rsplit(".", 3)
    return int(expert), part


def _require_alike(name: str, parts: list[Tensor], source: Checkpoint) -> None:
    odd = next((part for part in parts if (part.dtype, part.shape) != (parts[0].dtype, parts[0].shape)), None)
    if odd is not None:
        raise CheckpointError(
            f"{source.reader.path_of(odd.stored)}: tensor '{odd.stored}' is {odd.dtype.name} {list(odd.shape)}, "
            f"{parts[0].stored} is {parts[0].dtype.name} {list(parts[0].shape)}; expected one dtype and shape for all "
            f"experts, which {name} holds together"
        )


def _require_one_scale(parts: list[Tensor], source: Checkpoint) -> None:
    """That w1 and w3 of an expert have the same scale, so that nothing has to be computed anew."""
    scales: dict[int, np.ndarray] = {}
    for part in parts:
        value = np.empty(1, part.dtype)
        source.reader.read_into(part.stored, part.first, value)
        expert, _ = _expert_order(part.name)
        if not np.array_equal(scales.setdefault(expert, value), value):
            raise CheckpointError(
                f"{source.reader.path_of(part.stored)}: tensor '{part.stored}' is {value.item():g}, of w1 of that "
                f"expert {scales[expert].item():g}; the HF layout has one scale for both: expected equal ones; convert "
                "the bfloat16 checkpoint, or quantise it here, which makes them so"
            )


def with_fused_adapters(source: Checkpoint) -> tuple[Checkpoint, list[FusedAdapter]]:
    """The adapter `source`, its reader able to give what PEFT has of all experts; and how PEFT has them."""
    same = same_downs(source.tensors, source.reader, source.config)
    of_experts = fused_adapters(source.low_ranks(), source.config, same, source.reader.paths[0])
    return dataclasses.replace(source, reader=FusedExperts(source.reader)), of_experts


def _adapter_targets(source: Checkpoint, of_experts: Sequence[FusedAdapter], dtype: Dtype | None) -> dict[str, Target]:
    """The adapters of experts by their names in PEFT's file."""
    targets: dict[str, Target] = {}
    for fused, names in stored_names(of_experts, wrapped=source.config.vision is not None):
        assert isinstance(source.reader, FusedExperts)
        matrices = source.reader.add(fused, source.tensors, source.config, names[LORA_LEAVES[1]])
        for leaf, parts in zip(LORA_LEAVES, matrices, strict=True):
            targets[names[leaf]] = _target(parts, fused.shape(leaf, source.config.dim), dtype)
    return targets
