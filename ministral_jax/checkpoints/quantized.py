"""Which tensors of a file are parts of quantised projections: their names, in every spelling, by headers alone.

A projection is quantised if its own tensors say so, not because the config names or ignores it: lists of ignored
modules are in the names of another layout more often than not.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np

from ..config import ModelConfig, QuantizationConfig
from ..errors import CheckpointError, ConfigError
from ..linear import Linear
from ..quantization import LinearFormat
from ..quantization.formats import COLUMNS, Part
from ..quantization.fp8 import BLOCK
from .json_pieces import shown
from .layouts import Entry, ReadPlan, Source, expert_parts, whole_module
from .safetensors_header import DTYPE_NAMES, TensorInfo
from .weight_files import WeightFiles

# How activations meet quantised weights: as they are, or rounded as the format says.
Activations = Literal["plain", "quantized"]

# Part in memory -> what files call it, after the module's name: compressed-tensors, transformers' fp8, mistral's own.
SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "weight": ("weight",),
    "weight_packed": ("weight_packed",),
    "weight_scale": ("weight_scale", "weight_scale_inv", "qscale_weight"),
    "input_scale": ("input_scale", "activation_scale", "qscale_act"),
    "weight_global_scale": ("weight_global_scale",),
    "input_global_scale": ("input_global_scale",),
    "weight_absmax": ("weight_absmax",),
    "weight_absmax_scale": ("weight_absmax_scale",),
    "weight_absmax_offset": ("weight_absmax_offset",),
}
# As what hangs on a parameter of all experts is called, after its name.
_OF_ALL_EXPERTS: Mapping[str, tuple[str, ...]] = {
    "weight": ("",),
    "weight_scale": ("_scale_inv",),
    "input_scale": ("_activation_scale",),
}
_FUSED_SCALE = re.compile(r"(.*\.experts\.(?:gate_up_proj|down_proj))(?:_scale_inv|_activation_scale)")
_COMPANIONS = frozenset(name for part, names in SPELLINGS.items() if part != "weight" for name in names)
_EIGHT_BITS = ("F8_E4M3", "I8")
_SCALE_DTYPES = ("F32", "BF16", "F16", "F64")


@dataclass(frozen=True)
class QuantizedParts:
    """What was found: projection -> format, and parameter, of one expert if it is of experts, -> tensor."""

    formats: Mapping[str, LinearFormat]
    sources: Mapping[str, Source]

    def in_plan(self, plan: ReadPlan) -> ReadPlan:
        """The plan with the parts in place of the dense weights they stand for."""
        dense = {
            name: source
            for name, source in plan.sources.items()
            if whole_module(name.removesuffix(".weight")) not in self.formats
        }
        return dataclasses.replace(plan, sources={**dense, **self.sources}, formats=self.formats)


def without_companions(names: Collection[str]) -> set[str]:
    """The names as they would be if nothing were quantised: one `weight` for each module, no scales."""
    plain = set()
    for name in names:
        module, _, last = name.rpartition(".")
        if last == "weight_packed":
            plain.add(f"{module}.weight")
        elif last not in _COMPANIONS and not _FUSED_SCALE.fullmatch(name):
            plain.add(name)
    return plain


def find_parts(
    files: WeightFiles,
    linears: Mapping[str, Linear],
    sources: Mapping[str, Source],
    config: ModelConfig,
    activations: Activations | None = None,
) -> QuantizedParts:
    """The quantised ones among the projections `linears`, whose dense weights would be at `sources`.

    `activations` is "plain" or "quantized" instead of what the format says. Raises CheckpointError for a part that is
    missing, has another shape or dtype, or belongs to no quantised projection; ConfigError for activations that the
    format cannot round.
    """
    formats: dict[str, LinearFormat | None] = {}
    parts: dict[str, Source] = {}
    read: set[str] = set()
    if config.quantization is None:
        return QuantizedParts({}, parts)
    for name, linear in linears.items():
        for weight in expert_parts(f"{name}.weight", config):
            source = sources[weight]
            module = source.name.removesuffix(".weight")
            stored = _stored(source, files, config.quantization, activations)
            _require_alike(formats.setdefault(name, stored), stored, module, files)
            if stored is not None:
                finder = _Finder(files, module, stored, source, config.head_dim)
                parts |= {
                    f"{weight.removesuffix('.weight')}.{part}": where
                    for part, where in finder.sources(linear.shape).items()
                }
                read |= {f"{module}.{spelling}" for spelling in _COMPANIONS} | {module}
    _require_no_strays(files, {source.name.removesuffix(".weight") for source in sources.values()}, read)
    return QuantizedParts({name: stored for name, stored in formats.items() if stored is not None}, parts)


def _stored(
    source: Source, files: WeightFiles, quantization: QuantizationConfig, activations: Activations | None
) -> LinearFormat | None:
    """How the projection whose dense weight would be at `source` is stored; None for a dense one."""
    if not _is_quantized(source, files.tensors):
        return None
    double = f"{source.name.removesuffix('.weight')}.weight_absmax_scale" in files.tensors
    return dataclasses.replace(linear_format(quantization, activations), double=double)


def _require_alike(first: LinearFormat | None, stored: LinearFormat | None, module: str, files: WeightFiles) -> None:
    """The experts of a layer are one array, in one format."""
    if first != stored:
        names = [found.format if found else "dense" for found in (stored, first)]
        raise CheckpointError(
            f"{files.source}: {shown(module)} is {names[0]}, but other experts of its layer are {names[1]}: "
            "expected all of them alike"
        )


def linear_format(quantization: QuantizationConfig, activations: Activations | None) -> LinearFormat:
    """The format of a projection, with `activations` "plain" or "quantized" instead of the config's."""
    if activations == "plain":
        return LinearFormat(quantization.format)
    if activations == "quantized" and quantization.activations == "none":
        raise ConfigError(
            f"activations='quantized': these weights ({quantization.format}) say nothing of activations; expected plain"
        )
    return LinearFormat(quantization.format, quantization.activations)


def _is_quantized(source: Source, tensors: Mapping[str, TensorInfo]) -> bool:
    if f"{source.name.removesuffix('.weight')}.weight_packed" in tensors:
        return True
    weight = tensors.get(source.name)
    return weight is not None and DTYPE_NAMES[weight.dtype] in _EIGHT_BITS


def _require_no_strays(files: WeightFiles, modules: set[str], read: set[str]) -> None:
    """A scale without its quantised weight would be ignored, and the weight be wrong."""
    for name in files.tensors:
        module, _, last = name.rpartition(".")
        fused = _FUSED_SCALE.fullmatch(name)
        weight = fused[1] if fused else f"{module}.weight"
        stray = fused[1] not in read if fused else last in _COMPANIONS and name not in read
        if stray and weight.removesuffix(".weight") in modules:
            raise CheckpointError(
                f"{files.path_of(name)}: tensor {shown(name)} is a part of a quantised weight, but {shown(weight)} is "
                "not one: the file is not whole"
            )


def _shapes_of_all(part: Part, entry: Entry) -> list[tuple[int, ...]]:
    """What a tensor of all experts may have: of one scale each, [E, 1, 1], [E, 1] or [E], of two [E, 2, 1]."""
    lone = not part.shape and entry.shape[1] == 1
    return [entry.shape, entry.shape[:2], entry.shape[:1]] if lone else [entry.shape]


@dataclass(frozen=True)
class _Finder:
    """Looks for the parts of one projection [rows, columns], called `module` in the files."""

    files: WeightFiles
    module: str
    stored: LinearFormat
    dense: Source
    head_dim: int

    def sources(self, shape: tuple[int, int]) -> dict[str, Source]:
        multiple = COLUMNS.get(self.stored.format, 1)
        if shape[1] % multiple:
            raise CheckpointError(
                f"{self.files.source}: {shown(self.module)} has {shape[1]} columns; {self.stored.format} needs a "
                f"multiple of {multiple}"
            )
        return {name: self._source(name, part, shape[0]) for name, part in self.stored.parts(*shape).items()}

    def _source(self, name: str, part: Part, rows: int) -> Source:
        if self.dense.entry is None:
            candidates = [f"{self.module}.{spelling}" for spelling in SPELLINGS[name]]
        else:
            candidates = [f"{self.module}{spelling}" for spelling in _OF_ALL_EXPERTS.get(name, (f".{name}",))]
        found = next((candidate for candidate in candidates if candidate in self.files.tensors), None)
        if found is None:
            raise CheckpointError(
                f"{self.files.source}: tensor {shown(candidates[0])} is missing; expected with {self.stored.format} "
                f"weights and {self.stored.activations} scales of activations"
            )
        # A lone scale may be [] or [1], one per row [O] or [O, 1].
        shapes = [part.shape] if len(part.shape) == 2 else [part.shape, (*part.shape, 1)]
        entry = self._entry(part, rows, found)
        self._require_fits(found, part, shapes if entry is None else _shapes_of_all(part, entry))
        return Source(found, self._heads(part, rows), entry)

    def _entry(self, part: Part, rows: int, found: str) -> Entry | None:
        """Which part of the tensor `found`, of all experts, is this one's; w1 and w3 may share a lone scale or not."""
        dense = self.dense.entry
        if dense is None:
            return None
        n_experts = dense.shape[0]
        if not part.shape:
            halves = 2 if dense.shape[1] == 2 * rows and self.files.tensors[found].shape == (n_experts, 2, 1) else 1
            half = dense.rows[0] // rows if halves == 2 else 0
            return Entry(dense.expert, (half, half + 1), (n_experts, halves, 1))
        if part.shape[0] == rows:
            return Entry(dense.expert, dense.rows, (*dense.shape[:2], *part.shape[1:]))
        if rows % BLOCK and dense.shape[1] != rows:
            raise CheckpointError(
                f"{self.files.source}: {shown(self.module)} has scales for blocks of {BLOCK} rows, which w1 and w3, of "
                f"{rows} rows each, would share: expected a multiple of {BLOCK}"
            )
        first, end = (-(-row // BLOCK) for row in dense.rows)
        return Entry(dense.expert, (first, end), (n_experts, -(-dense.shape[1] // BLOCK), *part.shape[1:]))

    def _require_fits(self, tensor: str, part: Part, shapes: Sequence[tuple[int, ...]]) -> None:
        info = self.files.tensors[tensor]
        where = f"{self.files.path_of(tensor)}: tensor {shown(tensor)}"
        if info.shape not in shapes:
            raise CheckpointError(
                f"{where} has shape {list(info.shape)}, expected {list(shapes[0])} for {self.stored.format}"
            )
        expected = _SCALE_DTYPES if part.dtype == jnp.float32 else (DTYPE_NAMES[np.dtype(part.dtype)],)
        if DTYPE_NAMES[info.dtype] not in expected:
            raise CheckpointError(
                f"{where} has dtype {DTYPE_NAMES[info.dtype]}, expected {' or '.join(expected)} for "
                f"{self.stored.format}"
            )

    def _heads(self, part: Part, rows: int) -> int | None:
        """Heads whose entries are permuted; a scale for whole heads is the same in either order."""
        if self.dense.heads is None or not part.axes:
            return None
        if part.shape[0] == rows:
            return self.dense.heads
        if BLOCK % self.head_dim:
            raise CheckpointError(
                f"{self.files.source}: {shown(self.module)} has scales for blocks of {BLOCK} rows, which cut heads of "
                f"{self.head_dim} in parts: their rows cannot be reordered; use the HF layout of this model"
            )
        return None
