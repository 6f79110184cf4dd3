"""What a conversion will write, known before it writes: target tensors and files, config documents, files carried."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config import ModelConfig
from ...config_files import CONFIG_FILE_NAMES, Layout, hf_from_config, params_from_config
from ...errors import CheckpointError, ConfigError
from ..hub import SIDE_FILES
from ..safetensors_writer import TensorSpec, file_bytes, index_document, shard_file_names, shard_names
from ..translate import Name, fused_hf_name, hf_name
from ..weight_files import STEMS
from .adapters import MISTRAL_FILE, PEFT_CONFIG, PEFT_FILE, mistral_document, one_factor, peft_document
from .canonical import LORA_LEAVES, PEFT_PREFIX, Kind, Tensor
from .expert_adapters import (
    FusedAdapter,
    FusedExperts,
    expert_of,
    fused_adapters,
    fused_metadata,
    peft_ranks,
    same_downs,
    stored_names,
)
from .opening import Checkpoint
from .pieces import DTYPES, Dtype, dtype_after

# As published: the HF layout in files of this size, the mistral layout in one, which mistral-inference asks for.
HF_SHARD_BYTES = 5 * 10**9
_CARRIED = (*SIDE_FILES, "LICENSE*", "README.md")


@dataclass(frozen=True)
class Target:
    """A tensor to write: its parts, one after the other, are its elements."""

    spec: TensorSpec
    parts: tuple[Tensor, ...]


@dataclass(frozen=True)
class Plan:
    """`files` are the weight files with the names of their tensors, none of them for orbax; `documents` the JSON files
    by name; `kept` the config documents that the manifest keeps; `carried` the files that are copied.
    """

    source: Checkpoint
    to: Kind
    dtype: Dtype | None
    targets: Mapping[str, Target]
    files: Mapping[str, tuple[str, ...]]
    metadata: Mapping[str, str] | None
    documents: Mapping[str, Mapping[str, Any]]
    kept: Mapping[str, Any]
    carried: tuple[Path, ...]

    @functools.cached_property
    def specs(self) -> dict[str, TensorSpec]:
        return {name: target.spec for name, target in self.targets.items()}

    @functools.cached_property
    def n_bytes(self) -> int:
        """Of all tensors."""
        return sum(target.spec.n_bytes for target in self.targets.values())

    def file_sizes(self) -> dict[str, int]:
        """Weight file -> its size in bytes."""
        specs = self.specs
        return {
            file: file_bytes({name: specs[name] for name in names}, self.metadata) for file, names in self.files.items()
        }


def plan_conversion(
    source: Checkpoint, to: Kind, *, dtype: Dtype | None = None, max_shard_bytes: int | None = None
) -> Plan:
    """Plans `source` in the layout `to`. Raises MinistralError, in one line, for what that layout cannot hold."""
    _refuse_without_form(source, to)
    source = _with_one_factor(source, to)
    of_experts = _fused_adapters(source) if source.adapter is not None and to == "hf" else []
    if of_experts:
        source = dataclasses.replace(source, reader=FusedExperts(source.reader))
    named = _named_parts(source, to) | _named_fused(source, of_experts)
    targets = {name: _target(parts, fused, dtype) for name, (parts, fused) in named.items()}
    documents, kept = _config_documents(source, to, dtype, of_experts)
    files = _weight_files(targets, to, source.adapter is not None, max_shard_bytes)
    if len(files) > 1:
        specs = {name: target.spec for name, target in targets.items()}
        documents[f"{STEMS[_layout(to)]}.safetensors.index.json"] = index_document(specs, files)
    metadata = {"format": "pt"} if to == "hf" else None
    if source.adapter is not None and to == "mistral":
        metadata = {"scaling": repr(source.adapter.scaling)}
    elif metadata:
        metadata |= fused_metadata(of_experts, wrapped=source.config.vision is not None)
    carried = carried_files(source.folder, documents)
    return Plan(source, to, dtype, targets, files, metadata, documents, kept, carried)


def _layout(kind: Kind) -> Layout:
    return "hf" if kind == "hf" else "mistral"


def _refuse_without_form(source: Checkpoint, to: Kind) -> None:
    config = source.config
    if source.adapter is not None and to == "orbax":
        raise CheckpointError(f"{source.folder}: is an adapter, which --to mistral and --to hf have a form for")
    large = config.latent is not None and config.moe is not None and config.moe.first_dense_layers > 0
    if to == "hf" and source.kind != "hf" and large:
        raise CheckpointError(
            f"{source.folder}: Mistral Large 3 has no HF form: it is published in the mistral layout alone, and the "
            "nearest class of transformers scales attention otherwise; expected --to mistral or --to orbax"
        )


def _with_one_factor(source: Checkpoint, to: Kind) -> Checkpoint:
    """An adapter bound for the mistral layout with the factor that all its modules have."""
    if source.adapter is None or to != "mistral":
        return source
    factor = one_factor(source.adapter, source.adapter_ranks(), source.reader.paths[0])
    return dataclasses.replace(source, adapter=dataclasses.replace(source.adapter, scaling=factor, alpha=None))


def _named_parts(source: Checkpoint, to: Kind) -> dict[str, tuple[list[Tensor], bool]]:
    """Name in the target layout -> its parts, and whether they are experts side by side in a new axis."""
    if to != "hf":
        return {name: ([tensor], False) for name, tensor in source.tensors.items()}
    wrapped = source.config.vision is not None
    prefix = PEFT_PREFIX if source.adapter else ""
    _refuse_fused_scales(source)
    named: dict[str, tuple[list[Tensor], bool]] = {}
    for tensor in source.tensors.values():
        if source.adapter and expert_of(tensor.name.module):
            continue  # see _named_fused
        if tensor.name.is_expert_of_fused and not source.adapter:
            named.setdefault(fused_hf_name(tensor.name, wrapped=wrapped), ([], True))[0].append(tensor)
        else:
            named[prefix + hf_name(tensor.name, wrapped=wrapped)] = [tensor], False
    for name, (parts, fused) in named.items():
        if fused:
            parts.sort(key=lambda tensor: _expert_order(tensor.name))
            _require_alike(name, parts, source)
    return named


def _fused_adapters(source: Checkpoint) -> list[FusedAdapter]:
    """The adapters of experts in `source`, as PEFT has them."""
    same = same_downs(source.tensors, source.reader, source.config)
    return fused_adapters(source.low_ranks(), source.config, same, source.reader.paths[0])


def _named_fused(source: Checkpoint, of_experts: Sequence[FusedAdapter]) -> dict[str, tuple[list[Tensor], bool]]:
    """The adapters of experts by their names in PEFT's file."""
    named: dict[str, tuple[list[Tensor], bool]] = {}
    for fused, names in stored_names(of_experts, wrapped=source.config.vision is not None):
        assert isinstance(source.reader, FusedExperts)
        matrices = source.reader.add(fused, source.tensors, source.config, names[LORA_LEAVES[1]])
        named |= {names[leaf]: (parts, False) for leaf, parts in zip(LORA_LEAVES, matrices, strict=True)}
    return named


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


def _refuse_fused_scales(source: Checkpoint) -> None:
    """Experts with scales of their own beside plain `weight`: fused, they would share one, and be computed anew."""
    plain = {tensor.name.module for tensor in source.tensors.values() if tensor.name.is_expert_of_fused}
    scaled = next((t for t in source.tensors.values() if t.name.module in plain and "scale" in t.name.leaf), None)
    if scaled is not None:
        raise CheckpointError(
            f"{source.reader.path_of(scaled.stored)}: tensor '{scaled.stored}' scales one expert; the HF layout keeps "
            "all experts in one tensor with one scale: convert the bfloat16 checkpoint and quantise it there"
        )


def _target(parts: list[Tensor], fused: bool, dtype: Dtype | None) -> Target:
    first = parts[0]
    shape = first.shape
    if fused:
        experts = len({_expert_order(part.name)[0] for part in parts})
        shape = (experts, first.shape[0] * len(parts) // experts, *first.shape[1:])
    elif len(parts) > 1:  # one above the other
        shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    return Target(TensorSpec(dtype_after(first, dtype), shape), tuple(parts))


def _weight_files(
    targets: Mapping[str, Target], to: Kind, adapter: bool, max_shard_bytes: int | None
) -> dict[str, tuple[str, ...]]:
    if to == "orbax":
        return {}
    if adapter:
        return {PEFT_FILE if to == "hf" else MISTRAL_FILE: tuple(targets)}
    limit = max_shard_bytes or (HF_SHARD_BYTES if to == "hf" else sum(t.spec.n_bytes for t in targets.values()) + 1)
    shards = shard_names({name: target.spec for name, target in targets.items()}, limit)
    names = shard_file_names(STEMS[_layout(to)], len(shards))
    return {file: tuple(tensors) for file, tensors in zip(names, shards, strict=True)}


def _config_documents(
    source: Checkpoint, to: Kind, dtype: Dtype | None, of_experts: Sequence[FusedAdapter]
) -> tuple[dict[str, Mapping[str, Any]], dict[str, Any]]:
    """The config files of the target, and the documents that its manifest keeps for the way back."""
    config, settings = source.config, source.adapter
    kept: dict[str, Any] = {layout: _with_dtype(document, dtype) for layout, document in config.extra.items()}
    if settings is not None and to == "hf":
        document = peft_document(
            settings, *peft_ranks(source.low_ranks(), of_experts, config), config, kept=config.extra.get("peft")
        )
        kept.setdefault("mistral", params_from_config(config))
        return {PEFT_CONFIG: document}, kept
    layout = source_layout(source) if to == "orbax" else _layout(to)
    try:
        document = config_document(config, layout, source, dtype)
    except ConfigError as problem:
        raise ConfigError(f"{source.folder}: {problem}") from None
    if settings is not None:
        document = mistral_document(settings, document)
    return {CONFIG_FILE_NAMES[layout]: document}, kept


def source_layout(source: Checkpoint) -> Layout:
    """The layout of the source's config file, which for orbax is not that of its weights."""
    return "mistral" if (source.folder / CONFIG_FILE_NAMES["mistral"]).is_file() else "hf"


def config_document(
    config: ModelConfig, layout: Layout, source: Checkpoint, dtype: Dtype | None = None
) -> dict[str, Any]:
    """The config file of `layout`; an HF one that is new names the dtype of most dense weights of `source`."""
    document = params_from_config(config) if layout == "mistral" else hf_from_config(config)
    if layout == "hf" and "hf" not in config.extra:
        stored = Counter[str]()
        for tensor in source.tensors.values():
            stored[tensor.dtype.name] += tensor.n_bytes if tensor.dtype in DTYPES.values() else 0
        document = {**document, "dtype": stored.most_common(1)[0][0] if any(stored.values()) else "bfloat16"}
    return _with_dtype(document, dtype)


def _with_dtype(document: Mapping[str, Any], dtype: Dtype | None) -> dict[str, Any]:
    """The document, where it names the dtype of its weights, with the new one."""
    if dtype is None:
        return dict(document)
    changed: dict[str, Any] = {
        key: dtype if key in ("dtype", "torch_dtype") else value for key, value in document.items()
    }
    for block in ("text_config", "vision_config"):
        if isinstance(changed.get(block), dict):
            changed[block] = _with_dtype(changed[block], dtype)
    return changed


def carried_files(folder: Path, documents: Mapping[str, Any]) -> tuple[Path, ...]:
    """Tokenizer and other small files, which are as good in one layout as in the other."""
    configs = {*documents, *CONFIG_FILE_NAMES.values()}
    names = sorted(path.name for path in folder.iterdir())
    chosen = [n for n in names if any(fnmatch.fnmatchcase(n, pattern) for pattern in _CARRIED) and n not in configs]
    return tuple(_inside(folder / name) for name in chosen)


def _inside(path: Path) -> Path:
    """The file, if it truly lies in its folder (or among the blobs of a hub cache)."""
    folder = path.parent.resolve()
    homes = [folder, folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [folder]
    try:
        real = path.resolve(strict=True)
        regular = stat.S_ISREG(real.stat().st_mode)
    except (OSError, RuntimeError):
        regular, real = False, path
    if not regular or real.parent not in homes:
        raise CheckpointError(f"{path}: not a regular file of its folder; expected one to copy, or remove it")
    return path
