"""Adapters of experts in PEFT's folder, where all experts of a layer are one parameter, as in transformers.

`experts.gate_up_proj` [E, 2F, D], w1 over w3, and `experts.down_proj` [E, D, F] have one A [E R, in] and one B
[out, R E] each: rows of A expert by expert, columns of B rank by rank. There w1 and w3 of an expert share A. Two of
other adapters are put one above the other, R is the sum of their ranks, and B is zero where the ranks of the one meet
the rows of the other: the product is the same. The file's metadata say where that was done.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...config import ModelConfig
from ...errors import CheckpointError
from ..json_pieces import shown
from ..safetensors_header import DTYPE_NAMES
from ..translate import Name, fused_hf_name, hf_name
from .canonical import LORA_LEAVES, PEFT_PREFIX, Reader, StoredTensor, Tensor

_DOWN, _UP = LORA_LEAVES
WHOLES = ("gate_up_proj", "down_proj")
_PARTS: Mapping[str, tuple[str, ...]] = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
_EXPERT = re.compile(r"(layers\.[0-9]{1,6})\.(?:feed_forward\.)?experts\.([0-9]{1,6})\.(w[123])")
# PEFT wraps one parameter after the other: that of the first is inside, under `base_layer`, where there are two.
_STORED = re.compile(
    r"(?P<module>base_model\.model\.(?:model\.language_model\.|language_model\.model\.|model\.)"
    r"(?P<layer>layers\.[0-9]{1,6})\.mlp\.experts(?:\.base_layer)?)\.(?P<leaf>lora_[AB]\.weight)"
)
_RANKS = re.compile(r"w1=([0-9]{1,6}) w3=([0-9]{1,6})")
# Expert, part, first and past-the-last row of its B.
ReadRows = Callable[[int, str, int, int], np.ndarray]
# Of B, read and put together at a time.
_BLOCK_BYTES = 2 * 2**20


@dataclass(frozen=True)
class FusedAdapter:
    """The adapter of one parameter of all experts of a layer.

    `ranks` are the ranks that each of its parts has, one of `n_experts`: equal spans are one A for several parts.
    """

    layer: str
    whole: str
    n_experts: int
    rank: int
    ranks: Mapping[str, tuple[int, int]]
    hidden: int

    def rows(self, part: str) -> int:
        """The first row of B that is of `part`: w3 is under w1."""
        return self.hidden if part == "w3" else 0

    @property
    def down_parts(self) -> tuple[str, ...]:
        """The parts whose A of an expert lie one above the other: w1 alone where w3 has the same."""
        return ("w1",) if len(self.ranks) == 2 and len(set(self.ranks.values())) == 1 else tuple(self.ranks)

    def parameter(self, *, wrapped: bool) -> str:
        """The parameter's name in transformers, which patterns of PEFT are matched with."""
        return fused_hf_name(Name(f"{self.layer}.experts.0.{_PARTS[self.whole][0]}", "weight"), wrapped=wrapped)

    def stored(self, leaf: str, wholes: int, *, wrapped: bool) -> str:
        """The name in PEFT's file, of a layer that has `wholes` of the two parameters adapted."""
        inside = ".base_layer" if wholes == 2 and self.whole == WHOLES[0] else ""
        return f"{PEFT_PREFIX}{self.parameter(wrapped=wrapped).rpartition('.')[0]}{inside}.{leaf}"

    def shape(self, leaf: str, dim: int) -> tuple[int, int]:
        """Of A or B in the file, for a model of width `dim`."""
        wide = self.rank * self.n_experts
        if self.whole == "down_proj":
            return (wide, self.hidden) if leaf == _DOWN else (dim, wide)
        return (wide, dim) if leaf == _DOWN else (2 * self.hidden, wide)

    def note(self) -> str | None:
        """What the metadata say of ranks that were put together; None where every part has them all."""
        if set(self.ranks.values()) == {(0, self.rank)} and len(self.ranks) == len(_PARTS[self.whole]):
            return None
        counts = {part: last - first for part, (first, last) in self.ranks.items()}
        return f"w1={counts.get('w1', 0)} w3={counts.get('w3', 0)}"

    def up(
        self, first: int, last: int, read: Callable[[int, str, int, int], np.ndarray], dtype: np.dtype
    ) -> np.ndarray:
        """Rows `first` to `last` of B: [rows, R E]. `read` gives rows of one expert's."""
        block = np.zeros((last - first, self.rank, self.n_experts), dtype)
        for part, (low, high) in self.ranks.items():
            start = self.rows(part)
            end = start + self.hidden if self.whole == "gate_up_proj" else last
            begin, stop = max(first, start), min(last, end)
            for expert in range(self.n_experts) if begin < stop else ():
                block[begin - first : stop - first, low:high, expert] = read(expert, part, begin - start, stop - start)
        return block.reshape(last - first, -1)


def expert_of(module: str) -> tuple[str, int, str] | None:
    """Layer, number and part of a module that is one expert's; None for others."""
    found = _EXPERT.fullmatch(module)
    return (found[1], int(found[2]), found[3]) if found else None


def expert_module(layer: str, expert: int, part: str, config: ModelConfig) -> str:
    """The canonical name of one expert's projection."""
    return f"{layer}.{'' if config.latent else 'feed_forward.'}experts.{expert}.{part}"


def fused_adapters(
    ranks: Mapping[str, tuple[int, float]], config: ModelConfig, same_down: Callable[[str], bool], where: Path
) -> list[FusedAdapter]:
    """How PEFT has the adapters of experts among modules with `ranks` and factors, layer by layer.

    `same_down(layer)` says whether w1 and w3 of every expert have the very same A. Raises CheckpointError where
    experts of a layer differ in ranks, or where some of them have no adapter.
    """
    by_part: dict[tuple[str, str], dict[int, tuple[int, float]]] = {}
    for module, low_rank in ranks.items():
        found = expert_of(module)
        if found:
            by_part.setdefault((found[0], found[2]), {})[found[1]] = low_rank
    n_experts = config.moe.n_experts if config.moe else 0
    for (layer, part), experts in by_part.items():
        if len(experts) != n_experts or len(set(experts.values())) != 1:
            raise CheckpointError(
                f"{where}: adapts {part} of {len(experts)} of the {n_experts} experts of {layer}, or not all of them "
                "with one rank and factor; PEFT has one adapter for them all: expected --to mistral"
            )
    found = []
    for layer in dict.fromkeys(layer for layer, _ in by_part):
        for whole in WHOLES:
            parts = {part: by_part[layer, part][0] for part in _PARTS[whole] if (layer, part) in by_part}
            if parts:
                found.append(_fused(layer, whole, parts, config, same_down, where))
    return found


def _fused(
    layer: str,
    whole: str,
    parts: Mapping[str, tuple[int, float]],
    config: ModelConfig,
    same_down: Callable[[str], bool],
    where: Path,
) -> FusedAdapter:
    assert config.moe is not None
    if len({factor for _, factor in parts.values()}) > 1:
        raise CheckpointError(
            f"{where}: w1 and w3 of the experts of {layer} have two factors; PEFT has one for both: expected one"
        )
    counts = {part: rank for part, (rank, _) in parts.items()}
    if len(counts) == 2 and counts["w1"] == counts["w3"] and same_down(layer):
        ranks = dict.fromkeys(counts, (0, counts["w1"]))
    else:
        ends = np.cumsum(list(counts.values())).tolist()
        ranks = {part: (end - counts[part], end) for part, end in zip(counts, ends, strict=True)}
    return FusedAdapter(
        layer, whole, config.moe.n_experts, max(end for _, end in ranks.values()), ranks, config.moe.expert_hidden_dim
    )


def stored_names(
    of_experts: Sequence[FusedAdapter], *, wrapped: bool
) -> Iterator[tuple[FusedAdapter, Mapping[str, str]]]:
    """Each of `of_experts`, all of an adapter, with the names of its A and B in PEFT's file by their leaves."""
    wholes = Counter(fused.layer for fused in of_experts)
    for fused in of_experts:
        yield fused, {leaf: fused.stored(leaf, wholes[fused.layer], wrapped=wrapped) for leaf in LORA_LEAVES}


def fused_metadata(of_experts: Sequence[FusedAdapter], *, wrapped: bool) -> dict[str, str]:
    """Metadata of PEFT's file: whose ranks were put together, by module."""
    notes = {
        names[_DOWN].removesuffix(f".{_DOWN}"): fused.note()
        for fused, names in stored_names(of_experts, wrapped=wrapped)
    }
    return {module: note for module, note in notes.items() if note is not None}


def peft_ranks(
    low_ranks: Mapping[str, tuple[int, float]], of_experts: Sequence[FusedAdapter], config: ModelConfig
) -> tuple[dict[str, tuple[int, float]], dict[str, tuple[int, float]]]:
    """Ranks and factors of an adapter's modules, and of its parameters of all experts, by the names of transformers."""
    wrapped = config.vision is not None
    modules = {
        hf_name(Name(module, _DOWN), wrapped=wrapped).removesuffix(f".{_DOWN}"): low_rank
        for module, low_rank in low_ranks.items()
        if not expert_of(module)
    }
    parameters = {}
    for fused in of_experts:
        module = expert_module(fused.layer, 0, next(iter(fused.ranks)), config)
        parameters[fused.parameter(wrapped=wrapped)] = fused.rank, low_ranks[module][1]
    return modules, parameters


@dataclass(frozen=True)
class _Single:
    """One expert's matrix, as if it were stored."""

    dtype: np.dtype
    shape: tuple[int, ...]
    stored: str
    fused: FusedAdapter
    expert: int
    part: str
    leaf: str


class SingleExperts:
    """A reader of PEFT's file that shows adapters of all experts as those of each, and all else as it is."""

    def __init__(self, reader: Reader, metadata: Mapping[str, str], config: ModelConfig) -> None:
        self._reader, self._config = reader, config
        self.fused: dict[str, tuple[str, int]] = {}
        self._singles: dict[str, _Single] = {}
        self._kept: dict[str, np.ndarray] = {}
        by_module: dict[str, dict[str, str]] = {}
        for name in reader.tensors:
            found = _STORED.fullmatch(name)
            if found:
                by_module.setdefault(found["module"], {})[found["leaf"]] = name
        self._hidden = {name for leaves in by_module.values() for name in leaves.values()}
        for module, leaves in by_module.items():
            self._show(module, leaves, metadata.get(module))

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        plain = {name: info for name, info in self._reader.tensors.items() if name not in self._hidden}
        return {**plain, **self._singles}

    @property
    def paths(self) -> list[Path]:
        return self._reader.paths

    def path_of(self, name: str) -> Path:
        return self._reader.path_of(self._singles[name].stored if name in self._singles else name)

    def close(self) -> None:
        self._reader.close()

    def read_into(self, name: str, first: int, out: np.ndarray) -> None:
        single = self._singles.get(name)
        if single is None:
            self._reader.read_into(name, first, out)
            return
        low, high = single.fused.ranks[single.part]
        if single.leaf == _DOWN:
            start = (single.expert * single.fused.rank + low) * single.shape[1]
            self._reader.read_into(single.stored, start + first, out)
            return
        start = single.fused.rows(single.part)
        matrix = self._by_expert(single)[single.expert, start : start + single.shape[0], low:high]
        out[:] = matrix.reshape(-1)[first : first + out.size]

    def _by_expert(self, single: _Single) -> np.ndarray:
        """B of all experts [E, out, R]; those of a layer's two parameters are kept."""
        if single.stored not in self._kept:
            fused, (n_out, wide) = single.fused, self._reader.tensors[single.stored].shape
            whole = np.empty(n_out * wide, single.dtype)
            self._reader.read_into(single.stored, 0, whole)
            by_expert = np.ascontiguousarray(whole.reshape(n_out, fused.rank, fused.n_experts).transpose(2, 0, 1))
            self._require_apart(by_expert, single)
            self._kept = dict(list(self._kept.items())[-1:]) | {single.stored: by_expert}
        return self._kept[single.stored]

    def _require_apart(self, by_expert: np.ndarray, single: _Single) -> None:
        """That B is zero where the metadata say so."""
        rest = np.ones(by_expert.shape[1:], bool)
        for part, (low, high) in single.fused.ranks.items():
            start = single.fused.rows(part)
            rest[start : start + single.fused.hidden if single.fused.whole == WHOLES[0] else None, low:high] = False
        if np.any(by_expert[:, rest]):
            raise CheckpointError(
                f"{self.path_of(single.stored)}: tensor {shown(single.stored)} has other ranks for w1 and w3 than its "
                "metadata say; expected zeros between them, or no such metadata"
            )

    def _show(self, module: str, leaves: Mapping[str, str], note: str | None) -> None:
        down, up = (leaves.get(leaf) for leaf in LORA_LEAVES)
        first = down or up
        assert first is not None
        where = f"{self._reader.path_of(first)}: tensor {shown(first)}"
        if down is None or up is None:
            raise CheckpointError(f"{where} is without its other half; expected lora_A and lora_B of one module")
        fused = self._of_shapes(_STORED.fullmatch(first), down, up, note, where)  # type: ignore[arg-type]
        wrapped = self._config.vision is not None
        for part, (low, high) in fused.ranks.items():
            columns = self._reader.tensors[down].shape[1]
            rows = fused.hidden if fused.whole == WHOLES[0] else self._config.dim
            for expert in range(fused.n_experts):
                canonical = expert_module(fused.layer, expert, part, self._config)
                self.fused[canonical] = fused.parameter(wrapped=wrapped), fused.rank
                for leaf, stored, shape in ((_DOWN, down, (high - low, columns)), (_UP, up, (rows, high - low))):
                    name = PEFT_PREFIX + hf_name(Name(canonical, leaf), wrapped=wrapped)
                    if name in self._singles or name in self._reader.tensors:
                        raise CheckpointError(f"{where} has what another tensor has too; expected one of the two")
                    dtype = self._reader.tensors[stored].dtype
                    self._singles[name] = _Single(dtype, shape, stored, fused, expert, part, leaf)

    def _of_shapes(self, found: re.Match[str], down: str, up: str, note: str | None, where: str) -> FusedAdapter:
        moe, dim = self._config.moe, self._config.dim
        shapes = [self._reader.tensors[name].shape for name in (down, up)]
        if moe is None:
            raise CheckpointError(f"{where} adapts experts, which the base model has not; expected another --base")
        expected = {"gate_up_proj": (dim, 2 * moe.expert_hidden_dim), "down_proj": (moe.expert_hidden_dim, dim)}
        wide = shapes[0][0] if shapes[0] else 0
        rank, rest = divmod(wide, moe.n_experts)
        for whole, (columns, rows) in expected.items():
            if not rest and shapes == [(wide, columns), (rows, wide)]:
                ranks = _ranks_of(whole, rank, note, where)
                return FusedAdapter(found["layer"], whole, moe.n_experts, rank, ranks, moe.expert_hidden_dim)
        raise CheckpointError(
            f"{where} and its other half have shapes {list(shapes[0])} and {list(shapes[1])}; expected those of "
            f"{' or '.join(expected)} for {moe.n_experts} experts of {moe.expert_hidden_dim}, in a model of {dim}"
        )


def _ranks_of(whole: str, rank: int, note: str | None, where: str) -> dict[str, tuple[int, int]]:
    if note is None or whole == "down_proj":
        return dict.fromkeys(_PARTS[whole], (0, rank))
    found = _RANKS.fullmatch(note)
    first, second = map(int, found.groups()) if found else (0, 0)
    if not found or first + second != rank:
        raise CheckpointError(f"{where}: its metadata say {note!r}; expected 'w1=R w3=R' with {rank} ranks in all")
    spans = {"w1": (0, first), "w3": (first, rank)}
    return {part: span for part, span in spans.items() if span[0] < span[1]}


@dataclass
class _Up:
    """A fused B to write, in blocks of rows of which the last is kept."""

    fused: FusedAdapter
    tensor: Tensor
    sources: Mapping[tuple[int, str], Tensor]
    reader: Reader
    _block: tuple[int, np.ndarray] | None = field(default=None, repr=False)

    def read_into(self, first: int, out: np.ndarray) -> None:
        rows, columns = self.tensor.shape
        step, done = max(1, _BLOCK_BYTES // (columns * self.tensor.dtype.itemsize)), 0
        while done < out.size:
            number, start = divmod(first + done, step * columns)
            if self._block is None or self._block[0] != number:
                begin, end = number * step, min((number + 1) * step, rows)
                self._block = number, self.fused.up(begin, end, self._rows, self.tensor.dtype).reshape(-1)
            values = self._block[1][start : start + out.size - done]
            out[done : done + values.size] = values
            done += values.size

    def _rows(self, expert: int, part: str, first: int, last: int) -> np.ndarray:
        source = self.sources[expert, part]
        rank = source.shape[1]
        values = np.empty((last - first) * rank, source.dtype)
        self.reader.read_into(source.stored, source.first + first * rank, values)
        return values.reshape(last - first, rank)


class FusedExperts:
    """A reader of any adapter's file that has, beside its own tensors, each B of all experts as PEFT keeps it."""

    def __init__(self, reader: Reader) -> None:
        self._reader, self._ups = reader, dict[str, _Up]()

    def add(
        self, fused: FusedAdapter, tensors: Mapping[str, Tensor], config: ModelConfig, stored: str
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The parts of A, one after the other, and B, which is read under the name `stored`, of canonical `tensors`."""
        downs: list[Tensor] = []
        ups: dict[tuple[int, str], Tensor] = {}
        for expert in range(fused.n_experts):
            for part in fused.ranks:
                module = expert_module(fused.layer, expert, part, config)
                ups[expert, part] = tensors[f"{module}.{_UP}"]
                if part in fused.down_parts:
                    downs.append(tensors[f"{module}.{_DOWN}"])
        first = downs[0]
        odd = next((tensor for tensor in (*downs, *ups.values()) if tensor.dtype != first.dtype), None)
        if odd is not None:
            raise CheckpointError(
                f"{self.path_of(odd.stored)}: tensor {shown(odd.stored)} is {DTYPE_NAMES[odd.dtype]}, "
                f"{shown(first.stored)} is {DTYPE_NAMES[first.dtype]}; expected one dtype for all experts of a layer"
            )
        name = Name(f"{fused.layer}.experts.{fused.whole}", _UP)
        up = Tensor(name, first.dtype, fused.shape(_UP, config.dim), stored)
        self._ups[stored] = _Up(fused, up, ups, self._reader)
        return downs, [up]

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return {**self._reader.tensors, **{name: up.tensor for name, up in self._ups.items()}}

    @property
    def paths(self) -> list[Path]:
        return self._reader.paths

    def path_of(self, name: str) -> Path:
        up = self._ups.get(name)
        return self._reader.path_of(next(iter(up.sources.values())).stored if up else name)

    def read_into(self, name: str, first: int, out: np.ndarray) -> None:
        if name in self._ups:
            self._ups[name].read_into(first, out)
        else:
            self._reader.read_into(name, first, out)

    def close(self) -> None:
        self._reader.close()


def same_downs(tensors: Mapping[str, Tensor], reader: Reader, config: ModelConfig) -> Callable[[str], bool]:
    """Whether w1 and w3 of every expert of a layer have the same A, bit by bit."""

    def same(layer: str) -> bool:
        for expert in range(config.moe.n_experts if config.moe else 0):
            pair = [tensors[f"{expert_module(layer, expert, part, config)}.{_DOWN}"] for part in ("w1", "w3")]
            if pair[0].dtype != pair[1].dtype or pair[0].shape != pair[1].shape:
                return False
            values = []
            for tensor in pair:
                values.append(np.empty(math.prod(tensor.shape), tensor.dtype))
                reader.read_into(tensor.stored, tensor.first, values[-1])
            if not np.array_equal(values[0].view(np.uint8), values[1].view(np.uint8)):
                return False
        return True

    return same
