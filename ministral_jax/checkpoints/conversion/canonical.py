"""The tensors of any checkpoint under canonical names: where each lies, and which of its rows differ between layouts.

Nothing is read here. A canonical tensor is a run of elements of a stored one, which it usually is itself; only fused
experts hold several.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from ...config import ModelConfig
from ...config_files import CONFIG_FILE_NAMES, Layout
from ...config_files.quantization_block import BLOCK
from ...errors import CheckpointError
from ..json_pieces import shown
from ..translate import Name, dropped_kind, parse_fused, parse_hf, parse_mistral
from .expected import HEAD, interleaved_heads, module_shape, modules

Kind = Literal["mistral", "hf", "orbax"]

PEFT_PREFIX = "base_model.model."
LORA_LEAVES = ("lora_A.weight", "lora_B.weight")
# Leaves that belong to the inputs of a projection or to all of it: the order of its rows is nothing to them.
_NOT_BY_ROW = (
    "lora_A.weight",
    "qscale_act",
    "input_scale",
    "input_global_scale",
    "weight_global_scale",
    "weight_shape",
)


@runtime_checkable
class StoredTensor(Protocol):
    """What a header says of a tensor."""

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@runtime_checkable
class Reader(Protocol):
    """Opened files of weights: their tensors by the names in the files, and reads of any run of elements."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]: ...

    @property
    def paths(self) -> list[Path]: ...

    def path_of(self, name: str) -> Path: ...

    def read_into(self, name: str, first: int, out: np.ndarray) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Tensor:
    """A canonical tensor: elements from number `first` of the stored tensor `stored`.

    With `heads`, its rows are in another order in the other layout, within each of that many heads.
    """

    name: Name
    dtype: np.dtype
    shape: tuple[int, ...]
    stored: str
    first: int = 0
    heads: int | None = None

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def canonical_tensors(
    reader: Reader, kind: Kind, config: ModelConfig, *, adapter: bool
) -> tuple[dict[str, Tensor], Counter[str]]:
    """Canonical name -> tensor, in the order of the model, and how many tensors are left behind, by kind.

    Raises CheckpointError naming the file and a tensor that is unknown, missing, or of another shape than `config` has
    it; a tied output head may be there or not.
    """
    layout: Layout = "hf" if kind == "hf" else "mistral"
    config_name = CONFIG_FILE_NAMES[layout]
    found: dict[str, Tensor] = {}
    dropped: Counter[str] = Counter()
    for stored, info in reader.tensors.items():
        left = dropped_kind(stored)
        if left:
            dropped[left] += 1
            continue
        for tensor in _parts(stored, info, reader, kind, adapter):
            if str(tensor.name) in found:
                other = found[str(tensor.name)].stored
                raise CheckpointError(
                    f"{reader.path_of(stored)}: tensor {shown(stored)} is {tensor.name}, which {shown(other)} is too; "
                    "expected one of the two"
                )
            found[str(tensor.name)] = tensor
    ordered = (_ordered_adapter if adapter else _ordered)(found.values(), reader, config, config_name)
    return {str(tensor.name): _with_heads(tensor, reader, config) for tensor in ordered}, dropped


def _parts(stored: str, info: StoredTensor, reader: Reader, kind: Kind, adapter: bool) -> list[Tensor]:
    """The canonical tensors in one stored tensor."""
    plain = stored.removeprefix(PEFT_PREFIX) if adapter and kind == "hf" else stored
    fused = parse_fused(plain) if kind == "hf" and not adapter else None
    if fused:
        return _fused_parts(stored, info, reader, *fused)
    name = parse_hf(plain) if kind == "hf" else parse_mistral(plain)
    if name is None or (name.leaf in LORA_LEAVES) != adapter or (adapter and kind == "hf" and plain == stored):
        raise CheckpointError(
            f"{reader.path_of(stored)}: tensor {shown(stored)} has no name that the {kind} layout of "
            f"{'an adapter' if adapter else 'a model'} knows; expected those of the published models"
        )
    return [Tensor(name, info.dtype, info.shape, stored)]


def _fused_parts(
    stored: str, info: StoredTensor, reader: Reader, layer: str, parts: tuple[str, ...], leaf: str
) -> list[Tensor]:
    """Each expert's own in [experts, all rows of its parts, columns], or in one number for each expert."""
    if leaf != "weight" and info.shape and math.prod(info.shape) == info.shape[0]:
        names = [(expert, part) for expert in range(info.shape[0]) for part in parts]
        return [Tensor(Name(f"{layer}.experts.{e}.{part}", leaf), info.dtype, (), stored, e) for e, part in names]
    if len(info.shape) != 3 or info.shape[1] % len(parts):
        raise CheckpointError(
            f"{reader.path_of(stored)}: tensor {shown(stored)} has shape {list(info.shape)}; expected the {len(parts)} "
            "matrices of every expert in three axes"
        )
    experts, rows, columns = info.shape[0], info.shape[1] // len(parts), info.shape[2]
    names = [(expert, part) for expert in range(experts) for part in parts]
    shape = () if leaf != "weight" and rows * columns == 1 else (rows, columns)
    return [
        Tensor(Name(f"{layer}.experts.{expert}.{part}", leaf), info.dtype, shape, stored, i * rows * columns)
        for i, (expert, part) in enumerate(names)
    ]


def _ordered(found: Iterable[Tensor], reader: Reader, config: ModelConfig, config_name: str) -> list[Tensor]:
    """The tensors in the order of the model's modules; every module must be there, and no others."""
    by_module = _by_module(found)
    ordered: list[Tensor] = []
    for module, shape in modules(config):
        tensors = by_module.pop(module, [])
        if not tensors and not (module == HEAD and config.tied_embeddings):
            source = reader.paths[-1]  # the only file, or the index of several
            raise CheckpointError(f"{source}: tensor '{module}.weight' is missing; expected by {config_name}")
        for tensor in tensors:
            _require_shape(tensor, shape, reader, config_name)
        _require_weight(tensors, reader)
        ordered += tensors
    for tensors in by_module.values():
        raise _not_a_part(tensors[0], reader, config_name)
    return ordered


def _ordered_adapter(found: Iterable[Tensor], reader: Reader, config: ModelConfig, config_name: str) -> list[Tensor]:
    """The tensors of an adapter by layer: any modules of the model's text layers, both matrices of each."""
    by_module = _by_module(found)
    ordered: list[Tensor] = []
    for module in sorted(by_module, key=_by_number):
        tensors = by_module[module]
        weight = module_shape(module, config)
        if weight is None or len(weight) != 2:
            raise _not_a_part(tensors[0], reader, config_name)
        leaves = {tensor.name.leaf: tensor for tensor in tensors}
        where = f"{reader.path_of(tensors[0].stored)}: tensor {shown(tensors[0].stored)}"
        if len(leaves) != 2:
            raise CheckpointError(f"{where} is without its other half; expected lora_A and lora_B of one module")
        down, up = (leaves[leaf] for leaf in LORA_LEAVES)
        rank = down.shape[0] if down.shape else 0
        for tensor, expected in ((down, (rank, weight[1])), (up, (weight[0], rank))):
            _require(tensor, expected, reader, config_name)
        ordered += [down, up]
    return ordered


def _by_module(found: Iterable[Tensor]) -> dict[str, list[Tensor]]:
    modules: dict[str, list[Tensor]] = {}
    for tensor in found:
        modules.setdefault(tensor.name.module, []).append(tensor)
    return modules


def _by_number(module: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in module.split(".")]


def _not_a_part(tensor: Tensor, reader: Reader, config_name: str) -> CheckpointError:
    return CheckpointError(
        f"{reader.path_of(tensor.stored)}: tensor {shown(tensor.stored)} is not part of the model in {config_name}: "
        "use the config that belongs to these weights"
    )


def _require_shape(tensor: Tensor, weight: tuple[int, ...], reader: Reader, config_name: str) -> None:
    if tensor.name.leaf == "weight":
        _require(tensor, weight, reader, config_name)


def _require(tensor: Tensor, expected: tuple[int, ...], reader: Reader, config_name: str) -> None:
    if tensor.shape != expected:
        raise CheckpointError(
            f"{reader.path_of(tensor.stored)}: tensor {shown(tensor.stored)} has shape {list(tensor.shape)}, expected "
            f"{list(expected)} by {config_name}"
        )


def _require_weight(tensors: list[Tensor], reader: Reader) -> None:
    """That a module of which there is anything has its weight."""
    if tensors and not any(t.name.leaf.startswith("weight") and "scale" not in t.name.leaf for t in tensors):
        first = tensors[0]
        raise CheckpointError(
            f"{reader.path_of(first.stored)}: tensor {shown(first.stored)} is there, but no weight of "
            f"{first.name.module}; expected both"
        )


def _with_heads(tensor: Tensor, reader: Reader, config: ModelConfig) -> Tensor:
    """The tensor, marked if its rows differ between the layouts.

    Entries per row go with their rows. A scale of whole blocks of rows stays as it is where every head lies in one
    block; where a head spans blocks, no scale of the permuted rows is any block's.
    """
    heads = interleaved_heads(tensor.name.module, config)
    if heads is None or tensor.name.leaf in _NOT_BY_ROW or math.prod(tensor.shape) == 1:
        return tensor
    vision = config.vision if tensor.name.module.startswith("vision_encoder.") else None
    head_dim = vision.head_dim if vision else config.head_dim
    rows, given = heads * head_dim, tensor.shape[0] if tensor.shape else 0
    if given == rows:
        return Tensor(tensor.name, tensor.dtype, tensor.shape, tensor.stored, tensor.first, heads)
    where = f"{reader.path_of(tensor.stored)}: tensor {shown(tensor.stored)} of shape {list(tensor.shape)}"
    if "scale" not in tensor.name.leaf or given != -(-rows // BLOCK[0]):
        raise CheckpointError(f"{where}: expected one entry for each of {rows} rows, one per block of {BLOCK[0]}, or 1")
    if BLOCK[0] % head_dim:
        raise CheckpointError(
            f"{where}: heads of {head_dim} rows span its blocks of {BLOCK[0]} rows, and their order differs between "
            "the layouts: quantise from the bfloat16 checkpoint in the other layout"
        )
    return tensor
