"""Adapters between files and models: mistral-finetune's lora.safetensors and PEFT's folder, read and written.

In memory a matrix is float32 and rows of q and k are half-split; `layers.0.attention.wq` has `lora_a` and `lora_b`.
From file to file, see conversion/adapters.py; what an adapter computes is in linear.py.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ..config import ModelConfig
from ..config_files import CONFIG_FILE_NAMES, Layout, params_from_config
from ..config_files.json_file import write_json
from ..errors import CheckpointError
from ..linear import Linear, LowRank, projections
from ..moe import ExpertLinear
from ..parameters import AdapterParam, parameter_specs
from ..row_order import interleaved_rows
from ..stacked import StackedTransformer
from ..transformer import Transformer
from .conversion.adapters import (
    MISTRAL_FILE,
    PEFT_CONFIG,
    PEFT_FILE,
    AdapterSettings,
    mistral_document,
    peft_document,
    require_adapter,
)
from .conversion.canonical import LORA_LEAVES, PEFT_PREFIX
from .conversion.expected import interleaved_heads
from .conversion.expert_adapters import (
    FusedAdapter,
    expert_module,
    expert_of,
    fused_adapters,
    fused_metadata,
    peft_ranks,
    stored_names,
)
from .conversion.opening import open_checkpoint
from .conversion.pieces import DTYPES, Dtype, Pieces, dense_dtype
from .layouts import file_module
from .safetensors_writer import TensorSpec, write_safetensors
from .translate import Name, hf_name

Model = Transformer | StackedTransformer

_DOWN, _UP = LORA_LEAVES
_PARTS: Mapping[str, str] = {_DOWN: "lora_a", _UP: "lora_b"}


@dataclass(frozen=True)
class Adapter:
    """The adapter in `folder`: what each module has, and the matrices [R, in] and [out, R] by module and part."""

    folder: Path
    modules: Mapping[str, LowRank]
    matrices: Mapping[str, Mapping[str, np.ndarray]] = field(repr=False)

    def summary(self) -> str:
        """One line: rank, scaling and how many projections are adapted."""
        ranks = sorted({module.rank for module in self.modules.values()})
        scales = sorted({module.scale for module in self.modules.values()})
        return f"rank {_span(ranks)}, scaling {_span(scales)}, {len(self.modules)} projections"


def _span(values: list[int] | list[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def read_adapter(folder: str | Path, config: ModelConfig) -> Adapter:
    """Reads the adapter in `folder`, of either layout, for a base model of `config`.

    Raises MinistralError in one line for files that are missing, damaged, of another base or not a plain LoRA.
    """
    folder = Path(folder).expanduser()
    require_adapter(folder)
    with open_checkpoint(folder, base=config) as opened:
        assert opened.adapter is not None
        pieces = Pieces(opened)
        matrices: dict[str, dict[str, np.ndarray]] = {}
        for tensor in opened.tensors.values():
            matrix = pieces.whole(tensor, interleaved=False)
            matrices.setdefault(tensor.name.module, {})[_PARTS[tensor.name.leaf]] = matrix
        dropout = opened.adapter.dropout
        modules = {module: LowRank(*low_rank, dropout) for module, low_rank in opened.low_ranks().items()}
    return Adapter(folder, modules, matrices)


def attach_adapter(model: Model, adapter: Adapter) -> None:
    """Puts `adapter` on a filled model: on its projections, beside whatever they are stored in, where the model lies.

    Raises CheckpointError for a module that the model has no projection for, or only shares with others that the
    adapter leaves alone.
    """
    chosen: dict[str, list[str]] = {}
    for name, linear in projections(model).items():
        modules = [module for module, _ in file_modules(model, name, linear)]
        found = {adapter.modules.get(module) for module in modules}
        if found == {None}:
            continue
        (low_rank, *others) = found
        if others or low_rank is None:
            raise CheckpointError(
                f"{adapter.folder}: adapts {modules[0]} and {modules[-1]}, which are one here, differently, or only "
                "some of them; expected one rank and factor"
            )
        linear.adapt(low_rank)
        chosen[name] = modules
    strays = adapter.modules.keys() - {module for modules in chosen.values() for module in modules}
    if strays:
        raise CheckpointError(f"{adapter.folder}: adapts {min(strays)}, which this model has no projection for")
    if isinstance(model, StackedTransformer):
        model.stack_placeholders()
    _fill(model, adapter, chosen)


def _fill(model: Model, adapter: Adapter, chosen: Mapping[str, list[str]]) -> None:
    specs, linears = parameter_specs(model), projections(model)
    for name, modules in chosen.items():
        for part in _PARTS.values():
            spec = specs[f"{name}.{part}"]
            values = np.stack([adapter.matrices[module][part] for module in modules]).reshape(spec.shape)
            placed = (
                jnp.asarray(values)
                if model.layout is None
                else jax.make_array_from_callback(
                    spec.shape, model.layout.placement(f"{name}.{part}", spec), values.__getitem__
                )
            )
            variable: AdapterParam = getattr(linears[name], part)
            setattr(linears[name], part, variable.replace(placed))


def file_modules(model: Model, name: str, linear: Linear) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The modules of files that the projection `name` of `model` holds, and where each lies in its leading axes."""
    stacked = isinstance(model, StackedTransformer) and name.startswith("places.")
    names = model.pattern.names(name) if isinstance(model, StackedTransformer) else [name]
    for layer, ours in enumerate(names):
        index, module = (layer,) if stacked else (), file_module(ours, model.config)
        if not isinstance(linear, ExpertLinear):
            yield module, index
            continue
        for expert in range(linear.n_experts):
            yield re.sub(r"\bexperts\.", f"experts.{expert}.", module), (*index, expert)


def base_dtype(folder: str | Path) -> Dtype:
    """What the dense weights of the checkpoint in `folder` are stored as, by its headers: for `save_adapter`, where the
    model was loaded as something else."""
    with open_checkpoint(folder) as base:
        found = dense_dtype(base)
    return next(name for name, dtype in DTYPES.items() if dtype == found)


def save_adapter(
    directory: str | Path,
    model: Model,
    *,
    to: Layout,
    dtype: Dtype | None = None,
    base: str | None = None,
    config: ModelConfig | None = None,
) -> None:
    """Writes the adapter of `model`: `lora.safetensors` and params.json (mistral), or PEFT's two files (hf).

    `dtype` None is that of the model's dense weights as they were loaded; mistral-inference asks for that of the base's
    files, `base_dtype`. `base` is the name or folder of the model for PEFT to find. `config` is the base's own, where
    the model was read without its vision tower: PEFT has other names for modules beside one. The mistral layout has one
    factor for all modules: where they differ, B is multiplied. An adapter that is there is replaced, each file when its
    successor is complete.
    """
    folder, config = Path(directory), config or model.config
    homes = _adapted_modules(model)
    if not homes:
        raise CheckpointError(f"{folder}: the model has no adapter to write; attach one first")
    folder.mkdir(parents=True, exist_ok=True)
    (rank, scaling), _ = Counter((home.adapter.rank, home.adapter.scale) for home in homes.values()).most_common(1)[0]
    settings = AdapterSettings(rank, scaling, max(home.adapter.dropout for home in homes.values()), base)
    stored = np.dtype(jnp.dtype(dtype or model.tok_embeddings.weight.dtype))
    if to == "mistral":
        _save_mistral(folder, homes, settings, config, stored)
    else:
        _save_peft(folder, homes, settings, config, stored)


def _save_mistral(
    folder: Path, homes: Mapping[str, _Home], settings: AdapterSettings, config: ModelConfig, stored: np.dtype
) -> None:
    names = {str(Name(module, leaf)): (module, leaf) for module in homes for leaf in _PARTS}
    specs = {name: TensorSpec(stored, homes[module].shape(leaf)) for name, (module, leaf) in names.items()}

    def produce(name: str) -> np.ndarray:
        module, leaf = names[name]
        values = homes[module].values(leaf)
        if leaf == _UP:
            values = values * np.float32(homes[module].adapter.scale / settings.scaling)
            heads = interleaved_heads(module, config)
            values = interleaved_rows(values, heads) if heads else values
        return values.astype(stored)

    write_safetensors(folder / MISTRAL_FILE, specs, produce, {"scaling": repr(settings.scaling)})
    document = mistral_document(settings, params_from_config(config))
    write_json(folder / CONFIG_FILE_NAMES["mistral"], document)


def _save_peft(
    folder: Path, homes: Mapping[str, _Home], settings: AdapterSettings, config: ModelConfig, stored: np.dtype
) -> None:
    wrapped = config.vision is not None
    low_ranks = {module: (home.adapter.rank, home.adapter.scale) for module, home in homes.items()}

    def same_down(layer: str) -> bool:
        pairs = [
            [homes[expert_module(layer, expert, part, config)].values(_DOWN) for part in ("w1", "w3")]
            for expert in range(config.moe.n_experts if config.moe else 0)
        ]
        return all(np.array_equal(one, other) for one, other in pairs)

    of_experts = fused_adapters(low_ranks, config, same_down, folder)
    tensors: dict[str, tuple[tuple[int, int], Callable[[], np.ndarray]]] = {}
    for module, home in homes.items():
        for leaf in _PARTS if not expert_of(module) else ():
            name = PEFT_PREFIX + hf_name(Name(module, leaf), wrapped=wrapped)
            tensors[name] = home.shape(leaf), functools.partial(home.values, leaf)
    for fused, names in stored_names(of_experts, wrapped=wrapped):
        for leaf, name in names.items():
            tensors[name] = fused.shape(leaf, config.dim), functools.partial(_of_all, fused, leaf, homes, config)
    specs = {name: TensorSpec(stored, shape) for name, (shape, _) in tensors.items()}
    metadata = {"format": "pt"} | fused_metadata(of_experts, wrapped=wrapped)
    write_safetensors(folder / PEFT_FILE, specs, lambda name: tensors[name][1]().astype(stored), metadata)
    document = peft_document(settings, *peft_ranks(low_ranks, of_experts, config), config)
    write_json(folder / PEFT_CONFIG, document)


def _of_all(fused: FusedAdapter, leaf: str, homes: Mapping[str, _Home], config: ModelConfig) -> np.ndarray:
    """A or B of all experts of a layer, as PEFT has it."""

    def matrix(expert: int, part: str) -> np.ndarray:
        return homes[expert_module(fused.layer, expert, part, config)].values(leaf)

    if leaf == _UP:
        rows = fused.shape(_UP, config.dim)[0]
        return fused.up(0, rows, lambda expert, part, *span: matrix(expert, part)[slice(*span)], np.dtype(np.float32))
    return np.concatenate([matrix(expert, part) for expert in range(fused.n_experts) for part in fused.down_parts])


@dataclass(frozen=True)
class _Home:
    """Where a file's module lies in a model: the projection, and the place in the leading axes of its matrices."""

    linear: Linear
    adapter: LowRank
    index: tuple[int, ...]

    def shape(self, leaf: str) -> tuple[int, int]:
        """Of one matrix."""
        n_out, n_in = self.linear.shape
        return (self.adapter.rank, n_in) if leaf == _DOWN else (n_out, self.adapter.rank)

    def values(self, leaf: str) -> np.ndarray:
        """One matrix, on this host."""
        return np.asarray(getattr(self.linear, _PARTS[leaf])[...][self.index], np.float32)


def _adapted_modules(model: Model) -> dict[str, _Home]:
    """Module of a file -> where it lies, for all that have an adapter, in the order of the layers."""
    homes = {
        module: _Home(linear, linear.adapter, index)
        for name, linear in projections(model).items()
        if linear.adapter is not None
        for module, index in file_modules(model, name, linear)
    }
    return {module: homes[module] for module in sorted(homes, key=lambda name: int(name.split(".")[1]))}
