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
from ..weight_files import STEMS
from .adapters import MISTRAL_FILE, PEFT_CONFIG, PEFT_FILE, mistral_document, one_factor, peft_document
from .canonical import Kind
from .expert_adapters import FusedAdapter, fused_metadata, peft_ranks
from .opening import Checkpoint
from .pieces import DTYPES, Dtype
from .targets import Target, named_targets, with_fused_adapters

# As published: the HF layout in files of this size, the mistral layout in one, which mistral-inference asks for.
HF_SHARD_BYTES = 5 * 10**9
_CARRIED = (*SIDE_FILES, "LICENSE*", "README.md")


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
    require_form(source, to)
    source = _with_one_factor(source, to)
    source, of_experts = with_fused_adapters(source) if source.adapter is not None and to == "hf" else (source, [])
    targets = named_targets(source, to, of_experts, dtype)
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


def require_form(source: Checkpoint, to: Kind) -> None:
    """That the layout `to` has a form for `source`. Raises CheckpointError."""
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
