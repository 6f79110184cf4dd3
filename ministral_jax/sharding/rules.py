"""The table from logical axes to mesh axes, and what it says of one array. Knows shapes and names, no devices.

A weight names its dimensions (`ParameterSpec.axes`), an activation is named where it is constrained; a rule says along
which mesh axes a name is split. Rules do not know how large a mesh is: an axis of size 1 splits nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jax.sharding import PartitionSpec

from ..errors import ShardingError

# Outermost first: what talks least is furthest apart, `tensor` (twice a layer) on neighbours.
MESH_AXES: tuple[str, ...] = ("data", "fsdp", "context", "expert", "tensor")

# Of weights: "embed" is the model's width, "heads", "kv_heads", "hidden" and "vocab" are rows that a device computes
# alone. "norm", "rank", "layers" and all of "vision" are never split.
WEIGHT_AXES = (
    *("vocab", "embed", "heads", "kv_heads", "hidden", "expert", "expert_embed"),
    *("norm", "rank", "layers", "vision"),
)
# Of activations: "batch" x "sequence" of whole sequences, "rows" of packed tokens, "pages" of a cache, "split_pages" of
# layers with full attention, whose pages context shards hold in turn.
ACTIVATION_AXES = (
    "batch",
    "sequence",
    "rows",
    "pages",
    "split_pages",
    "act_embed",
    "act_heads",
    "act_kv_heads",
    "act_hidden",
    "act_vocab",
    "act_expert",
)
LOGICAL_AXES = (*WEIGHT_AXES, *ACTIVATION_AXES)

_TENSOR = {
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "hidden": ("tensor",),
    "act_heads": ("tensor",),
    "act_kv_heads": ("tensor",),
    "act_hidden": ("tensor",),
    "act_vocab": ("tensor",),
}
_FSDP = {"embed": ("fsdp",), "expert_embed": ("fsdp",)}


def _sequences(*along: str) -> dict[str, tuple[str, ...]]:
    """Whole sequences, and all that belongs to them, on devices along these axes."""
    return dict.fromkeys(("batch", "rows", "pages", "split_pages"), along)


_DATA = _sequences("data", "fsdp")
# Outside the experts' layers these devices have sequences of their own and the same weights: a decode step that had to
# gather those would wait longer for them than for the experts.
_EXPERT = {
    "expert": ("expert",),
    "act_expert": ("expert",),
    **_sequences("data", "fsdp", "expert"),
}
_CONTEXT = {
    "sequence": ("context",),
    "embed": ("fsdp", "context"),
    "expert_embed": ("fsdp", "context"),
    "split_pages": ("data", "fsdp", "context"),
}
_ALL = {
    **_DATA,
    **_TENSOR,
    **_FSDP,
    **_EXPERT,
    **_CONTEXT,
    "embed": ("fsdp", "context"),
    "split_pages": ("data", "fsdp", "expert", "context"),
}


@dataclass(frozen=True)
class Rules:
    """Logical axis -> the mesh axes it is split along. Hashable: a compiled program is kept under it."""

    name: str
    table: tuple[tuple[str, tuple[str, ...]], ...]

    @staticmethod
    def of(name: str, table: Mapping[str, Sequence[str]]) -> Rules:
        """The rules of a mapping; axes it does not name are not split. Raises ShardingError for an unknown axis."""
        for logical, along in table.items():
            if logical not in LOGICAL_AXES:
                raise ShardingError(
                    f"rules {name!r}: no logical axis {logical!r}; expected one of {', '.join(LOGICAL_AXES)}"
                )
            unknown = [axis for axis in along if axis not in MESH_AXES]
            if unknown:
                raise ShardingError(
                    f"rules {name!r}: {logical!r} goes along {unknown[0]!r}, which no mesh has; expected axes of "
                    f"{', '.join(MESH_AXES)}"
                )
        return Rules(name, tuple((axis, tuple(table[axis])) for axis in LOGICAL_AXES if table.get(axis)))

    def along(self, logical: str | None) -> tuple[str, ...]:
        """The mesh axes that a logical axis is split along."""
        if logical is not None and logical not in LOGICAL_AXES:
            raise ShardingError(f"no logical axis {logical!r}: expected one of {', '.join(LOGICAL_AXES)}")
        return dict(self.table).get(logical, ()) if logical is not None else ()

    @property
    def mesh_axes(self) -> frozenset[str]:
        """The mesh axes that any rule uses."""
        return frozenset(axis for _, along in self.table for axis in along)


# The usual layouts. "all" is their union, and the default: what is not wanted has size 1 in the mesh.
RULES: Mapping[str, Rules] = {
    "all": Rules.of("all", _ALL),
    "data": Rules.of("data", _sequences("data")),
    "tensor": Rules.of("tensor", _TENSOR),
    "fsdp": Rules.of("fsdp", {**_DATA, **_FSDP}),
    "fsdp+tensor": Rules.of("fsdp+tensor", {**_DATA, **_FSDP, **_TENSOR}),
    "expert": Rules.of("expert", {**_DATA, **_TENSOR, **_FSDP, **_EXPERT}),
    "context": Rules.of("context", {**_DATA, **_TENSOR, **_FSDP, **_CONTEXT}),
}


def partition(
    axes: Sequence[str | None],
    rules: Rules,
    sizes: Mapping[str, int],
    *,
    shape: Sequence[int] | None = None,
    name: str = "array",
) -> PartitionSpec:
    """How an array with these logical axes is split on a mesh of these sizes; mesh axes of size 1 are left out.

    Raises ShardingError if one mesh axis would split two dimensions, or, where `shape` is given, if a dimension does
    not divide.
    """
    entries: list[tuple[str, ...]] = []
    taken: dict[str, str | None] = {}
    for position, logical in enumerate(axes):
        along = tuple(axis for axis in rules.along(logical) if sizes.get(axis, 1) > 1)
        for axis in along:
            if axis in taken:
                raise ShardingError(
                    f"{name}: rules {rules.name!r} put mesh axis {axis!r} on both {taken[axis]!r} and {logical!r}; a "
                    "mesh axis can split one dimension of an array"
                )
            taken[axis] = logical
        if shape is not None:
            _require_divides(name, logical, shape[position], along, sizes)
        entries.append(along)
    while entries and not entries[-1]:
        entries.pop()
    return PartitionSpec(*(along[0] if len(along) == 1 else along or None for along in entries))


def _require_divides(name: str, logical: str | None, size: int, along: Sequence[str], sizes: Mapping[str, int]) -> None:
    ways = math.prod(sizes[axis] for axis in along)
    if size % ways:
        mesh = ", ".join(f"{axis}={sizes[axis]}" for axis in along)
        raise ShardingError(
            f"{name}: {logical!r} of size {size} does not divide over {mesh}; sizes that do: {fitting(size)}"
        )


def fitting(*counts: int, most: int = 64) -> str:
    """The numbers of devices up to `most` over which all of `counts` divide, as text."""
    common = math.gcd(*counts)
    return ", ".join(str(ways) for ways in range(1, min(common, most) + 1) if common % ways == 0)
