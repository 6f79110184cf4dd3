"""A base model and an adapter as one checkpoint: `W + scale B A`, computed as it is read. Writes nothing.

Where the base is quantised, all its projections are dense here. Any block of rows is always computed whole, so a
value does not depend on how it is read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...config import QuantizationConfig
from ...errors import CheckpointError
from ..translate import Name
from .adapters import AdapterSettings
from .canonical import LORA_LEAVES, Reader, StoredTensor, Tensor
from .expected import interleaved_heads, modules
from .opening import Checkpoint
from .pieces import DTYPES, Dtype, Pieces, dense_dtype
from .staging import file_identities

# A multiple of the 128 rows of an FP8 block; of 28672 columns in float32 these are 14 MiB.
BLOCK_ROWS = 128
_EIGHT_BITS = ("int8", "float8_e4m3fn")


@dataclass(frozen=True)
class Merging:
    """What was merged: the adapter's settings, its number of modules, and what format was made dense as what dtype."""

    settings: AdapterSettings
    modules: int
    stored: str | None = None
    dequantized: str | None = None


def merged_checkpoint(base: Checkpoint, adapter: Checkpoint, dtype: Dtype | None) -> tuple[Checkpoint, Merging]:
    """`base` with `adapter` in its weights. Takes over both: closing the result closes them.

    Merged weights have the dtype of the base's; what was quantised has that of most of the base's dense weights; with
    `dtype`, they have that one. Raises CheckpointError for a module that the base does not have.
    """
    assert adapter.adapter is not None, "not an adapter"
    matrices = _Matrices(base, adapter)
    stored = base.config.quantization
    plain = DTYPES[dtype] if dtype else dense_dtype(base)
    weights: dict[str, Tensor] = {}
    sources: dict[str, _Weight] = {}
    by_module: dict[str, dict[str, Tensor]] = {}
    for tensor in base.tensors.values():
        by_module.setdefault(tensor.name.module, {})[tensor.name.leaf] = tensor
    shapes = dict(modules(base.config))
    for module, leaves in by_module.items():
        quantized = stored if stored is not None and _is_quantized(leaves) else None
        if quantized is None and module not in matrices.modules:
            weights |= {str(tensor.name): tensor for tensor in leaves.values()}
            continue
        merged = _merged_tensor(module, shapes[module], leaves, base, plain if quantized or dtype else None)
        weights[str(merged.name)] = merged
        sources[merged.stored] = _Weight(module, merged, leaves, base, quantized, matrices)
    strays = sorted(matrices.modules - by_module.keys())
    if strays:
        raise CheckpointError(f"{adapter.folder}: adapts {strays[0]}, which {base.folder} does not have")
    report = Merging(adapter.adapter, len(matrices.modules), *((stored.format, plain.name) if stored else ()))
    config = dataclasses.replace(base.config, quantization=None)
    merged_base = dataclasses.replace(
        base,
        config=config,
        reader=_MergedReader(base.reader, adapter.reader, sources),
        tensors=weights,
        merged=_identity(adapter, dtype),
    )
    return merged_base, report


def _identity(adapter: Checkpoint, dtype: Dtype | None) -> dict[str, Any]:
    """What a run must share with an earlier one, of the adapter."""
    files = file_identities([*adapter.reader.paths, *adapter.config_paths])
    return {"files": files, "settings": repr(adapter.adapter), "dtype": dtype}


def _is_quantized(leaves: Mapping[str, Tensor]) -> bool:
    weight = leaves.get("weight")
    return "weight_packed" in leaves or (weight is not None and weight.dtype.name in _EIGHT_BITS)


def _merged_tensor(
    module: str, shape: tuple[int, ...], leaves: Mapping[str, Tensor], base: Checkpoint, dtype: np.dtype | None
) -> Tensor:
    """The weight as it will be, under a name of its own in place of the stored one's."""
    weight = leaves.get("weight", leaves.get("weight_packed"))
    assert weight is not None, module
    heads = interleaved_heads(module, base.config)
    return Tensor(Name(module, "weight"), dtype or weight.dtype, shape, f"merged {module}", 0, heads)


class _Matrices:
    """A and B of each module of an adapter, in float32 and the base's row order; those last asked for are kept."""

    def __init__(self, base: Checkpoint, adapter: Checkpoint) -> None:
        self._adapter, self._interleaved = adapter, base.interleaved
        self._pieces = Pieces(adapter)
        self.modules = {tensor.name.module for tensor in adapter.tensors.values()}
        self._scales = {module: factor for module, (_, factor) in adapter.low_ranks().items()}
        self._kept: tuple[str, np.ndarray, np.ndarray] | None = None

    def product(self, module: str, rows: slice) -> np.ndarray | None:
        """Rows of `scale B A` in float32; None for a module that the adapter leaves alone."""
        if module not in self.modules:
            return None
        if self._kept is None or self._kept[0] != module:
            down, up = (self._adapter.tensors[f"{module}.{leaf}"] for leaf in LORA_LEAVES)
            read = [self._pieces.whole(tensor, interleaved=self._interleaved) for tensor in (down, up)]
            self._kept = module, read[0], read[1] * np.float32(self._scales[module])
        return self._kept[2][rows] @ self._kept[1]


@dataclass
class _Weight:
    """One weight of the base, dense or quantised, plus its adapter, in blocks of rows of which the last is kept."""

    module: str
    merged: Tensor
    leaves: Mapping[str, Tensor]
    base: Checkpoint
    quantized: QuantizationConfig | None
    matrices: _Matrices
    _block: tuple[int, np.ndarray] | None = field(default=None, repr=False)

    def read_into(self, first: int, out: np.ndarray) -> None:
        """Fills `out`, one axis, with elements from number `first` on."""
        columns, done = self.merged.shape[1], 0
        while done < out.size:
            number, start = divmod(first + done, BLOCK_ROWS * columns)
            values = self._values(number)[start : start + out.size - done]
            out[done : done + values.size] = values
            done += values.size

    def _values(self, number: int) -> np.ndarray:
        """Block `number` in the dtype it is written as, one axis."""
        if self._block is None or self._block[0] != number:
            start = number * BLOCK_ROWS
            rows = slice(start, min(start + BLOCK_ROWS, self.merged.shape[0]))
            values = self._dense(rows) if self.quantized is None else self._dequantized(rows, self.quantized)
            change = self.matrices.product(self.module, rows)
            values = values if change is None else values + change
            with np.errstate(over="ignore", invalid="ignore"):
                cast = values.astype(self.merged.dtype)
            self._require_fits(values, cast)
            self._block = number, cast.reshape(-1)
        return self._block[1]

    def _require_fits(self, values: np.ndarray, cast: np.ndarray) -> None:
        if np.count_nonzero(np.isfinite(cast)) != np.count_nonzero(np.isfinite(values)):
            raise CheckpointError(
                f"{self.base.folder}: {self.module} with its adapter has values beyond {cast.dtype.name}; expected "
                "another --dtype"
            )

    def _dense(self, rows: slice) -> np.ndarray:
        weight = self.leaves["weight"]
        return self._part(weight, rows, weight.shape).astype(np.float32)

    def _part(self, tensor: Tensor, rows: slice, shape: tuple[int, ...]) -> np.ndarray:
        """Rows of a stored tensor of `shape`, which may be stored with more axes of size one."""
        row = math.prod(shape[1:])
        out = np.empty((rows.stop - rows.start) * row, tensor.dtype)
        self.base.reader.read_into(tensor.stored, tensor.first + rows.start * row, out)
        return out.reshape(rows.stop - rows.start, *shape[1:])

    def _dequantized(self, rows: slice, stored: QuantizationConfig) -> np.ndarray:
        """What the quantised rows mean, in float32."""
        import jax.numpy as jnp  # which dense models are merged without

        from ...quantization import LinearFormat
        from ..quantized import SPELLINGS

        double = "weight_absmax_scale" in self.leaves
        parts: dict[str, Any] = {}
        for name, part in LinearFormat(stored.format, "none", double).parts(*self.merged.shape).items():
            found = next((self.leaves[word] for word in SPELLINGS[name] if word in self.leaves), None)
            if found is None or math.prod(found.shape) != math.prod(part.shape):
                raise CheckpointError(
                    f"{self.base.folder}: {self.module}.{name} is missing or has another shape than "
                    f"{list(part.shape)}; expected with {stored.format} weights"
                )
            per_row = -(-self.merged.shape[0] // part.shape[0]) if part.shape else 0
            taken = slice(rows.start // per_row, -(-rows.stop // per_row)) if per_row else slice(0, 1)
            values = self._part(found, taken, part.shape or (1,))
            parts[name] = jnp.asarray(values.reshape(values.shape if part.shape else ()), part.dtype)
        return np.asarray(LinearFormat(stored.format, "none", double).weight(parts).dequantize())


class _MergedReader:
    """Reads computed weights as if they were stored, and all else from the base."""

    def __init__(self, base: Reader, adapter: Reader, sources: Mapping[str, _Weight]) -> None:
        self._base, self._adapter, self._sources = base, adapter, sources

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return {**self._base.tensors, **{name: weight.merged for name, weight in self._sources.items()}}

    @property
    def paths(self) -> list[Path]:
        return [*self._base.paths, *self._adapter.paths]

    def path_of(self, name: str) -> Path:
        if name not in self._sources:
            return self._base.path_of(name)
        return self._base.path_of(next(iter(self._sources[name].leaves.values())).stored)

    def read_into(self, name: str, first: int, out: np.ndarray) -> None:
        if name in self._sources:
            self._sources[name].read_into(first, out)
        else:
            self._base.read_into(name, first, out)

    def close(self) -> None:
        self._base.close()
        self._adapter.close()
