"""From a folder of published files to a filled model, tensor by tensor. Knows neither names nor file formats."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pallas_kernels.flash_attention import Implementation

from ..config import ModelConfig, Window
from ..config_files import CONFIG_FILE_NAMES, detect_layout, read_config
from ..errors import CheckpointError, ConfigError
from ..linear import projections
from ..parameters import ParameterSpec, fill, parameter_specs
from ..row_order import half_split_rows
from ..sharding.layout import Layout, layout_for
from ..sharding.meshes import mesh_for
from ..sharding.rules import Rules
from ..stacked import LAYERS, StackedTransformer
from ..transformer import Transformer
from .adapters import attach_adapter, read_adapter
from .hub import resolve
from .json_pieces import shown
from .layouts import EMBEDDINGS, HEAD, ReadPlan, Source, expert_parts, is_vision, plan_reading, whole_module
from .quantized import Activations, find_parts, without_companions
from .safetensors import aligned_empty
from .safetensors_header import DTYPE_NAMES
from .weight_files import WeightFiles

logger = logging.getLogger("ministral_jax")

DENSE_DTYPES = ("F64", "F32", "F16", "BF16")
COMPUTE_DTYPES = ("bfloat16", "float16", "float32")
# Rows are cast and permuted in pieces of this size, so that the source of a tensor is never whole beside its copy.
CHUNK_BYTES = 64 * 2**20
STACKED = (LAYERS, "expert")  # axes of a parameter along which files have a tensor each

Extents = tuple[tuple[int, int], ...]  # first and past-the-last index along each axis


def load(
    model: str | Path,
    *,
    revision: str | None = None,
    dtype: str | type | np.dtype | None = None,
    attention: Implementation = "auto",
    windows: str | Sequence[Window] | None = None,
    activations: Activations | None = None,
    vision: bool = True,
    mesh: Mesh | str | None = None,
    rules: Rules | str = "all",
    adapter: str | Path | None = None,
) -> Transformer:
    """The model in a folder, or of a hub id such as "mistralai/Ministral-8B-Instruct-2410", ready to run.

    `revision` is a branch, tag or commit of the hub. The rest is as in `load_model`.
    """
    return load_model(
        resolve(model, revision),
        dtype=dtype,
        attention=attention,
        windows=windows,
        activations=activations,
        vision=vision,
        mesh=mesh,
        rules=rules,
        adapter=adapter,
    )


@overload
def load_model(
    directory: str | Path,
    *,
    dtype: str | type | np.dtype | None = None,
    attention: Implementation = "auto",
    windows: str | Sequence[Window] | None = None,
    activations: Activations | None = None,
    vision: bool = True,
    mesh: Mesh | str | None = None,
    rules: Rules | str = "all",
    adapter: str | Path | None = None,
    stacked: Literal[False] = False,
) -> Transformer: ...


@overload
def load_model(
    directory: str | Path,
    *,
    dtype: str | type | np.dtype | None = None,
    attention: Implementation = "auto",
    windows: str | Sequence[Window] | None = None,
    activations: Activations | None = None,
    vision: bool = True,
    mesh: Mesh | str | None = None,
    rules: Rules | str = "all",
    adapter: str | Path | None = None,
    stacked: Literal[True],
) -> StackedTransformer: ...


def load_model(
    directory: str | Path,
    *,
    dtype: str | type | np.dtype | None = None,
    attention: Implementation = "auto",
    windows: str | Sequence[Window] | None = None,
    activations: Activations | None = None,
    vision: bool = True,
    mesh: Mesh | str | None = None,
    rules: Rules | str = "all",
    adapter: str | Path | None = None,
    stacked: bool = False,
) -> Transformer | StackedTransformer:
    """Reads the checkpoint in `directory`, in either layout; its arrays own their memory.

    `dtype` None or "auto" is the checkpoint's on accelerators and float32 on CPU, where XLA rewrites narrower weights
    at every step. `attention` names the implementation of attention. `windows` replaces the config's: a name of
    `catalog.WINDOW_PATTERNS`, or a list that is repeated over the layers. `activations` of quantised projections are
    rounded as their format says (None); "quantized" insists on it, "plain" leaves them alone. `vision=False` leaves
    out what reads images, as does `stacked`. `mesh` spreads the model over devices by `rules`, one of
    sharding.rules.RULES or your own: a mesh of sharding.meshes, or text such as "fsdp=4,tensor=2" or "auto". Each
    device then reads only the bytes of its shard; without it everything goes to the default device. `stacked` gives the
    model for training, each layer read into its place in a stack. `adapter` is a folder with one, of either layout,
    that is put on the model. Raises MinistralError in one line.
    """
    folder = Path(directory)
    config = read_config(folder, windows=windows)
    layout = None
    if mesh is not None:
        devices = mesh_for(mesh, config, training=stacked) if isinstance(mesh, str) else mesh
        layout = layout_for(config, devices, rules)
    lora = None if adapter is None else read_adapter(adapter, config)  # the small files first
    with WeightFiles(folder, detect_layout(folder)) as files:
        config = with_decided_vision(config, files, wanted=vision and not stacked)
        plan = match_tensors(files, config, activations)
        if plan.unread:
            groups = ", ".join(f"{count} {group}" for group, count in plan.unread.items())
            logger.info("%s: tensors that the text model does not read: %s", folder, groups)
        config = _with_decided_head(config, plan, files)
        sources = dict(plan.sources)
        if plan.head and not config.tied_embeddings:
            sources[HEAD] = plan.head
        compute_dtype = _compute_dtype(dtype, files, _dense(sources, plan))
        abstract = Transformer(config, compute_dtype, attention=attention, layout=layout)
        linears = projections(abstract)
        for name, stored in plan.formats.items():
            linears[name].store_as(stored)

        def parts_of(names: Sequence[str]) -> list[Source]:
            return [sources[part] for name in names for part in expert_parts(name, config)]

        model = StackedTransformer(abstract) if stacked else abstract
        names = model.pattern.names if isinstance(model, StackedTransformer) else lambda name: [name]
        model = fill(model, lambda name, spec: _array(files, parts_of(names(name)), name, spec, layout))
    if lora is not None:
        attach_adapter(model, lora)
        logger.info("%s: %s", lora.folder, lora.summary())
    return model


def load_vision(directory: str | Path, *, dtype: str | type | np.dtype | None = None) -> dict[str, jax.Array]:
    """The parameters of what reads images in the checkpoint, by name, and none where it has nothing of the kind.

    For who goes on from the text decoder alone, as training does. `dtype` and what is raised are `load_model`'s.
    """
    folder = Path(directory)
    with WeightFiles(folder, detect_layout(folder)) as files:
        config = with_decided_vision(read_config(folder), files)
        if config.vision is None:
            return {}
        plan = match_tensors(files, config)
        sources = {name: source for name, source in plan.sources.items() if is_vision(name)}
        specs = parameter_specs(Transformer(config, _compute_dtype(dtype, files, sources)))
        return {name: _array(files, [source], name, specs[name], None) for name, source in sources.items()}


def match_tensors(files: WeightFiles, config: ModelConfig, activations: Activations | None = None) -> ReadPlan:
    """Where each parameter of `config` lies in `files`, by their headers alone; `activations` as in `load_model`.

    Raises CheckpointError naming a tensor that is missing, belongs to no such model, or has another shape or dtype.
    """
    config_name = CONFIG_FILE_NAMES[files.layout]
    if len(files.tensors) < config.n_layers:  # before time is spent on thousands of layers that a number claims
        raise CheckpointError(
            f"{files.source}: {len(files.tensors)} tensors, too few for the {config.n_layers} layers in {config_name}"
        )
    abstract = Transformer(config)
    specs = parameter_specs(abstract)
    names = without_companions(files.tensors) if config.quantization else files.tensors
    plan = plan_reading(specs, names, config, files.layout)
    _require_complete(plan, files, config_name)
    if plan.head is None and not config.tied_embeddings:
        raise CheckpointError(
            f"{files.source}: no output head is there, and {config_name} does not tie it to the "
            "embeddings; expected one of the two"
        )
    quantized = find_parts(files, projections(abstract), plan.sources, config, activations)
    if config.quantization and not quantized.formats:
        logger.warning(
            "%s: %s says %s, but no projection is stored so: all are read as they are",
            files.source,
            config_name,
            config.quantization.format,
        )
    for name, spec in specs.items():
        if name.removesuffix(".weight") in quantized.formats:
            continue
        parts = expert_parts(name, config)
        shape = spec.shape[1:] if parts != [name] else spec.shape
        for source in [plan.head] if name == HEAD else [plan.sources[part] for part in parts]:
            if source is not None:
                _require_fits(source, shape, files, config_name)
    return quantized.in_plan(plan)


def _require_complete(plan: ReadPlan, files: WeightFiles, config_name: str) -> None:
    if plan.missing:
        raise CheckpointError(
            f"{files.source}: tensor {shown(plan.missing[0])}{_and_more(plan.missing)} is missing; expected by "
            f"{config_name}"
        )
    if plan.extra:
        home = files.path_of(plan.extra[0]) if plan.extra[0] in files.tensors else files.source
        raise CheckpointError(
            f"{home}: tensor {shown(plan.extra[0])}{_and_more(plan.extra)} is not part of the "
            f"model in {config_name}: use the config that belongs to these weights"
        )


def _and_more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def with_decided_vision(config: ModelConfig, files: WeightFiles, *, wanted: bool = True) -> ModelConfig:
    """The config, without vision where that is not `wanted`, or where none of its tensors is there: the file wins."""
    if config.vision is None or (wanted and any(map(is_vision, files.tensors))):
        return config
    if wanted:
        logger.warning(
            "%s: no vision tensors, though %s describes a tower: read as a model of text alone",
            files.source,
            CONFIG_FILE_NAMES[files.layout],
        )
    return dataclasses.replace(config, vision=None)


def _with_decided_head(config: ModelConfig, plan: ReadPlan, files: WeightFiles) -> ModelConfig:
    """The config, untied if the file has a head that differs from the embeddings: as in transformers, the file wins."""
    if not config.tied_embeddings or plan.head is None or _same_values(files, plan.sources[EMBEDDINGS], plan.head):
        return config
    config_name = CONFIG_FILE_NAMES[files.layout]
    _require_fits(plan.head, parameter_specs(Transformer(config))[EMBEDDINGS].shape, files, config_name)
    logger.warning(
        "%s: its output head differs from the embeddings, which %s ties: both are kept", files.directory, config_name
    )
    return dataclasses.replace(config, tied_embeddings=False)


def _same_values(files: WeightFiles, one: Source, other: Source) -> bool:
    first, second = files.tensors[one.name], files.tensors[other.name]
    if first.shape != second.shape or len(first.shape) != 2:
        return False
    step = max(1, CHUNK_BYTES // max(1, first.shape[1] * first.dtype.itemsize))
    for begin in range(0, first.shape[0], step):
        rows = (slice(begin, begin + step), slice(None))
        same = np.array_equal(files.read_slice(one.name, rows), files.read_slice(other.name, rows))
        if not same:
            return False
    return True


def _compute_dtype(asked: str | type | np.dtype | None, files: WeightFiles, sources: Mapping[str, Source]) -> jnp.dtype:
    """The dtype that was asked for, or the usual one of the default backend, which is logged."""
    if asked is not None and not (isinstance(asked, str) and asked == "auto"):
        name = asked if isinstance(asked, str) else jnp.dtype(asked).name
        if name not in COMPUTE_DTYPES:
            raise ConfigError(f"dtype={name!r} is not allowed: expected auto, {', '.join(COMPUTE_DTYPES)}")
        return jnp.dtype(name)
    sizes: Counter[np.dtype] = Counter()
    for source in sources.values():
        sizes[files.tensors[source.name].dtype] += files.tensors[source.name].n_bytes
    stored = max(sizes, key=lambda dtype: sizes[dtype])
    on_cpu = jax.default_backend() == "cpu"
    dtype = jnp.dtype(jnp.float32 if on_cpu or stored.name not in COMPUTE_DTYPES else stored)
    logger.info("%s: stored as %s, loaded as %s", files.directory, stored.name, dtype.name)
    return dtype


def _require_fits(source: Source, shape: tuple[int, ...], files: WeightFiles, config_name: str) -> None:
    info = files.tensors[source.name]
    where = f"{files.path_of(source.name)}: tensor {shown(source.name)}"
    expected = shape if source.entry is None else source.entry.shape
    if info.shape != expected:
        raise CheckpointError(f"{where} has shape {list(info.shape)}, expected {list(expected)} by {config_name}")
    if DTYPE_NAMES[info.dtype] not in DENSE_DTYPES:
        raise CheckpointError(
            f"{where} has dtype {DTYPE_NAMES[info.dtype]}, expected one of {', '.join(DENSE_DTYPES)}, as "
            f"{config_name} says nothing of quantisation, or of this tensor's"
        )


def _dense(sources: Mapping[str, Source], plan: ReadPlan) -> dict[str, Source]:
    """Sources of what is not quantised."""
    return {
        name: source for name, source in sources.items() if whole_module(name.rpartition(".")[0]) not in plan.formats
    }


def _array(
    files: WeightFiles, sources: Sequence[Source], name: str, spec: ParameterSpec, layout: Layout | None
) -> jax.Array:
    """The parameter in the one tensor of `sources`, or stacked from one for each layer, expert, or expert of each."""
    dtype = np.dtype(spec.dtype)
    stacked = [axis in STACKED for axis in (*spec.axes, None)].index(False)  # leading axes
    shape = spec.shape[stacked:]  # of one part
    order = np.arange(len(sources)).reshape(spec.shape[:stacked])

    def read_one(source: Source, index: tuple[slice, ...]) -> np.ndarray:
        # Lone scales are [] or [1], those of rows [O] or [O, 1]: all of them small.
        if shape and _shape_of(source, files) == shape:
            return read_values(files, source, dtype, index)
        return np.asarray(read_small(files, source, dtype, shape)[index])

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if not stacked:
            return read_one(sources[0], index)
        parts = order[index[:stacked]]
        extents = [len(range(*part.indices(size))) for part, size in zip(index[stacked:], shape, strict=True)]
        out = aligned_empty((*parts.shape, *extents), dtype)
        for place in np.ndindex(parts.shape):
            out[(*place, ...)] = read_one(sources[int(parts[place])], index[stacked:])
        return out

    if layout is None:
        whole = tuple(slice(None) for _ in spec.shape)
        # The buffer is ours alone, and jax on CPU takes it over as it is.
        return jax.device_put(read(whole)).block_until_ready()
    sharding = layout.placement(name, spec)
    shard = _reading_once(read, spec.shape, sharding)
    return jax.make_array_from_callback(spec.shape, sharding, shard).block_until_ready()


def _reading_once(
    read: Callable[[tuple[slice, ...]], np.ndarray], shape: tuple[int, ...], sharding: jax.sharding.Sharding
) -> Callable[[tuple[slice, ...] | None], np.ndarray]:
    """`read` for the shards of this host, no byte read twice: copies share one, and columns of equal rows are read as
    one piece and then cut."""
    wanted = {_extents(index, shape) for index in sharding.addressable_devices_indices_map(shape).values()}
    blocks: dict[Extents, np.ndarray] = {}

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        extents = _extents(index, shape)
        if not extents:  # a lone scale
            return read(())
        *rows, (start, stop) = extents
        beside = [last for *others, last in wanted if list(others) == rows]
        first, end = min(begin for begin, _ in beside), max(stop for _, stop in beside)
        whole = (*rows, (first, end)) if sum(stop - begin for begin, stop in beside) == end - first else extents
        if whole not in blocks:
            blocks[whole] = read(tuple(slice(*part) for part in whole))
        return blocks[whole][..., start - whole[-1][0] : stop - whole[-1][0]]

    return shard


def _extents(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Extents:
    assert index is not None
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def read_small(files: WeightFiles, source: Source, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """A whole parameter of `shape` from a tensor of as many numbers in another one."""
    values = files.read(source.name).astype(dtype)
    if source.entry:
        values = values.reshape(len(values), -1)[source.entry.expert][slice(*source.entry.rows)]
    values = values.reshape(shape)
    return half_split_rows(values, source.heads) if source.heads else values


def read_values(files: WeightFiles, source: Source, dtype: np.dtype, index: tuple[slice, ...]) -> np.ndarray:
    """`parameter[index]` in memory order and as `dtype`, in fresh memory, reading only the heads or rows it lies in."""
    info, shape = files.tensors[source.name], _shape_of(source, files)
    spans = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
    if info.dtype == dtype and source.heads is None:
        return _read_slice(files, source, [slice(*span) for span in spans])
    (first, last), columns = spans[0], [slice(*span) for span in spans[1:]]
    out = aligned_empty(tuple(stop - start for start, stop in spans), dtype)
    block = shape[0] // source.heads if source.heads else 1  # rows that are permuted among themselves
    row_bytes = math.prod(out.shape[1:]) * info.dtype.itemsize
    step = max(1, CHUNK_BYTES // max(1, row_bytes * block)) * block
    for begin in range(first // block * block, last, step):
        end = min(begin + step, -(-last // block) * block)
        rows = _read_slice(files, source, [slice(begin, end), *columns])
        if source.heads:
            rows = half_split_rows(rows, (end - begin) // block)
        start, stop = max(begin, first), min(end, last)
        with np.errstate(invalid="ignore", over="ignore"):
            out[start - first : stop - first] = rows[start - begin : stop - begin]
    return out


def _shape_of(source: Source, files: WeightFiles) -> tuple[int, ...]:
    if source.entry is None:
        return files.tensors[source.name].shape
    first, end = source.entry.rows
    return (end - first, *source.entry.shape[2:])


def _read_slice(files: WeightFiles, source: Source, index: Sequence[slice]) -> np.ndarray:
    """`parameter[index]` as the file has it."""
    if source.entry is None:
        return files.read_slice(source.name, index)
    expert, first = source.entry.expert, source.entry.rows[0]
    rows = slice(first + index[0].start, first + index[0].stop)
    return files.read_slice(source.name, [slice(expert, expert + 1), rows, *index[1:]])[0]
