"""Adapters between files and models: mistral-finetune's lora.safetensors and PEFT's folder, read and written.

In memory a matrix is float32 and rows of q and k are half-split; `layers.0.attention.wq` has `lora_a` and `lora_b`.
From file to file, see conversion/adapters.py; what an adapter computes is in linear.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
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
from .conversion.opening import open_checkpoint
from .conversion.pieces import DTYPES, Dtype, Pieces, dense_dtype
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
        ranks, pieces = opened.adapter_ranks(), Pieces(opened)
        matrices: dict[str, dict[str, np.ndarray]] = {}
        for tensor in opened.tensors.values():
            matrix = pieces.whole(tensor, interleaved=False)
            matrices.setdefault(tensor.name.module, {})[_PARTS[tensor.name.leaf]] = matrix
        modules = {
            module: LowRank(rank, opened.adapter.scaling_of(theirs), opened.adapter.dropout)
            for module, (theirs, rank) in zip(matrices, ranks.items(), strict=True)
        }
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
    for layer, module in enumerate(names):
        index = (layer,) if stacked else ()
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
    names = {_file_name(Name(module, leaf), config, to): (module, leaf) for module in homes for leaf in _PARTS}
    specs = {name: TensorSpec(stored, homes[module].shape(leaf)) for name, (module, leaf) in names.items()}

    def produce(name: str) -> np.ndarray:
        module, leaf = names[name]
        values = homes[module].values(leaf)
        if leaf == _UP and to == "mistral":
            values = values * np.float32(homes[module].adapter.scale / scaling)
            heads = interleaved_heads(module, config)
            values = interleaved_rows(values, heads) if heads else values
        return values.astype(stored)

    if to == "mistral":
        write_safetensors(folder / MISTRAL_FILE, specs, produce, {"scaling": repr(scaling)})
        document = mistral_document(settings, params_from_config(config))
        write_json(folder / CONFIG_FILE_NAMES["mistral"], document)
    else:
        write_safetensors(folder / PEFT_FILE, specs, produce, {"format": "pt"})
        write_json(folder / PEFT_CONFIG, _peft_document(homes, config, settings))


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


def _file_name(name: Name, config: ModelConfig, to: Layout) -> str:
    return str(name) if to == "mistral" else PEFT_PREFIX + hf_name(name, wrapped=config.vision is not None)


def _peft_document(homes: Mapping[str, _Home], config: ModelConfig, settings: AdapterSettings) -> dict[str, object]:
    wrapped = config.vision is not None
    theirs = {
        hf_name(Name(module, _DOWN), wrapped=wrapped).removesuffix(f".{_DOWN}"): (home.adapter.rank, home.adapter.scale)
        for module, home in homes.items()
    }
    return peft_document(settings, theirs, n_layers=config.n_layers, wrapped=wrapped)
