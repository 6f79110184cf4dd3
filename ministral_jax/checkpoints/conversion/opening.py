"""Opening a folder of any layout for conversion or comparison: model or adapter, safetensors or orbax."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ... import catalog
from ...config import ModelConfig
from ...config_files import CONFIG_FILE_NAMES, config_from_hf, config_from_params, detect_layout, read_config
from ...config_files.json_file import read_json_object
from ...errors import CheckpointError, ConfigError
from ..json_pieces import shown
from ..safetensors import SafetensorsFile
from ..safetensors_header import DTYPE_NAMES, TensorInfo
from ..translate import hf_name
from ..weight_files import WeightFiles
from .adapters import (
    MISTRAL_FILE,
    PEFT_CONFIG,
    PEFT_FILE,
    AdapterSettings,
    is_mistral_adapter,
    is_peft,
    read_peft,
    require_ranks,
    settings_of_params,
    settings_of_peft,
)
from .canonical import LORA_LEAVES, Kind, Reader, Tensor, canonical_tensors
from .expert_adapters import SingleExperts
from .manifest import MANIFEST, kept_documents
from .orbax_folder import OrbaxReader, is_orbax


@dataclass(frozen=True)
class Checkpoint:
    """An opened folder: `tensors` by canonical name, in the order of the model; `dropped` are those that no conversion
    carries, by kind. `config` is the model's, with an adapter its base's. `merged` tells apart what was merged into
    the tensors, if anything. `fused` are the modules of an adapter that its file has as one with others: the name and
    the rank there. A context manager.
    """

    folder: Path
    kind: Kind
    config: ModelConfig
    reader: Reader
    tensors: Mapping[str, Tensor]
    dropped: Counter[str]
    adapter: AdapterSettings | None = None
    merged: Mapping[str, Any] | None = None
    fused: Mapping[str, tuple[str, int]] = field(default_factory=dict)

    def low_ranks(self) -> dict[str, tuple[int, float]]:
        """Module of an adapter -> the rank of its matrices and the factor of their product."""
        assert self.adapter is not None, "not an adapter"
        factors = {theirs: self.adapter.scaling_of(theirs) for theirs in self.adapter_ranks()}
        return {
            tensor.name.module: (tensor.shape[0], factors[self._their_module(tensor)[0]]) for tensor in self._downs()
        }

    def adapter_ranks(self) -> dict[str, int]:
        """Name of each module or parameter of an adapter in the HF layout -> rank that its file has it in."""
        return dict(map(self._their_module, self._downs()))

    def _downs(self) -> list[Tensor]:
        return [tensor for tensor in self.tensors.values() if tensor.name.leaf == LORA_LEAVES[0]]

    def _their_module(self, tensor: Tensor) -> tuple[str, int]:
        name = hf_name(tensor.name, wrapped=self.config.vision is not None).removesuffix(f".{tensor.name.leaf}")
        return self.fused.get(tensor.name.module, (name, tensor.shape[0]))

    @property
    def interleaved(self) -> bool:
        """Whether rotary rows lie in the mistral layout's order."""
        return self.kind == "mistral"

    @property
    def config_paths(self) -> list[Path]:
        """The files beside the weights that decide what is written."""
        names = [*CONFIG_FILE_NAMES.values(), PEFT_CONFIG, MANIFEST]
        return [self.folder / name for name in names if (self.folder / name).is_file()]

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.reader.close()


class _OneFile:
    """The reader of an adapter: a single safetensors file, whatever it is called."""

    def __init__(self, path: Path) -> None:
        self.paths = [path]
        self._file = SafetensorsFile(path)
        self.metadata = self._file.metadata

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._file.tensors

    def path_of(self, name: str) -> Path:
        return self.paths[0]

    def read_into(self, name: str, first: int, out: np.ndarray) -> None:
        self._file.read_into(name, first, out)

    def close(self) -> None:
        self._file.close()


_MATRIX_DTYPES = ("float32", "bfloat16", "float16", "float64")
_KEPT_READERS: Mapping[str, Callable[[Mapping[str, Any]], object]] = {
    "mistral": config_from_params,
    "hf": config_from_hf,
    "peft": settings_of_peft,
}


def open_checkpoint(folder: str | Path, *, base: str | Path | ModelConfig | None = None) -> Checkpoint:
    """Opens the model or adapter in `folder`; reads headers and configs, no weights.

    `base` is the model that an adapter belongs to, a folder, a published name or a config, where the adapter does not
    say, or instead of what it says.
    Raises MinistralError in one line for files that are missing, damaged or do not fit each other.
    """
    folder = Path(folder)
    if is_peft(folder):
        return _open_peft(folder, base)
    if is_mistral_adapter(folder):
        return _open_mistral_adapter(folder, base)
    config = _with_kept(read_config(folder), folder)
    if is_orbax(folder):
        return _opened(folder, "orbax", config, OrbaxReader(folder))
    layout = detect_layout(folder)
    return _opened(folder, layout, config, WeightFiles(folder, layout))


def _opened(
    folder: Path, kind: Kind, config: ModelConfig, reader: Reader, adapter: AdapterSettings | None = None
) -> Checkpoint:
    try:
        tensors, dropped = canonical_tensors(reader, kind, config, adapter=adapter is not None)
    except BaseException:
        reader.close()
        raise
    return Checkpoint(folder, kind, config, reader, tensors, dropped, adapter)


def _with_kept(config: ModelConfig, folder: Path) -> ModelConfig:
    """The config with the documents that an earlier conversion kept, under the one that is there now."""
    kept = kept_documents(folder)
    for layout, document in kept.items():
        where = f"{folder / MANIFEST}: documents.{layout}"
        if layout not in _KEPT_READERS:
            raise ConfigError(f"{where}: expected one of {', '.join(_KEPT_READERS)}; remove the file to do without")
        try:
            _KEPT_READERS[layout](document)
        except ConfigError as problem:
            raise ConfigError(f"{where}: {problem}; remove the file to do without") from None
    return dataclasses.replace(config, extra={**kept, **config.extra})


def _open_mistral_adapter(folder: Path, base: str | Path | ModelConfig | None) -> Checkpoint:
    path = folder / CONFIG_FILE_NAMES["mistral"]
    config = _with_kept(base if isinstance(base, ModelConfig) else read_config(path), folder)
    reader = _OneFile(folder / MISTRAL_FILE)
    with contextlib.ExitStack() as on_error:
        opened = on_error.enter_context(
            _opened(folder, "mistral", config, reader, AdapterSettings(rank=1, scaling=1.0))
        )
        rank = Counter(_ranks(opened).values()).most_common(1)[0][0]
        document = read_json_object(path) if path.is_file() else {}
        settings = settings_of_params(path, document, reader.metadata, rank)
        on_error.pop_all()
    return dataclasses.replace(opened, adapter=settings)


def _open_peft(folder: Path, base: str | Path | ModelConfig | None) -> Checkpoint:
    settings, document = read_peft(folder)
    config = base if isinstance(base, ModelConfig) else _base_config(folder, base or settings.base)
    config = _with_kept(config, folder)
    config = dataclasses.replace(config, extra={**config.extra, "peft": document})
    if not (folder / PEFT_FILE).is_file():
        raise CheckpointError(f"{folder / PEFT_FILE}: no such file; expected the adapter's weights, in safetensors")
    with contextlib.ExitStack() as on_error:
        file = _OneFile(folder / PEFT_FILE)
        on_error.callback(file.close)
        reader = SingleExperts(file, file.metadata, config)
        opened = dataclasses.replace(_opened(folder, "hf", config, reader, settings), fused=reader.fused)
        require_ranks(settings, _ranks(opened), folder / PEFT_FILE)
        on_error.pop_all()
    return opened


def _base_config(folder: Path, base: str | Path | None) -> ModelConfig:
    """Config of the model that the PEFT adapter in `folder` was trained on: a folder, a published name, or as kept."""
    kept = kept_documents(folder).get("mistral")
    if base is None and kept is None:
        raise ConfigError(
            f"{folder / PEFT_CONFIG}: base_model_name_or_path is missing; give the base model with --base, a folder or "
            "a published name: the order of rows depends on its heads"
        )
    if base is not None and Path(base).expanduser().is_dir():
        return read_config(Path(base).expanduser())
    if kept is not None:
        return config_from_params(kept)
    try:
        return catalog.find(str(base)).config
    except ConfigError as problem:
        raise ConfigError(
            f"{folder / PEFT_CONFIG}: {problem}; give the base model with --base, a folder or a published name"
        ) from None


def _ranks(opened: Checkpoint) -> dict[str, int]:
    for tensor in opened.tensors.values():
        if tensor.dtype.name not in _MATRIX_DTYPES:
            raise CheckpointError(
                f"{opened.reader.path_of(tensor.stored)}: tensor {shown(tensor.stored)} has dtype "
                f"{DTYPE_NAMES[tensor.dtype]}, expected one of {', '.join(_MATRIX_DTYPES)}"
            )
    ranks = opened.adapter_ranks()
    if not ranks:
        raise CheckpointError(f"{opened.reader.paths[0]}: holds no tensors; expected the matrices of an adapter")
    if not min(ranks.values()):
        raise CheckpointError(f"{opened.reader.paths[0]}: has matrices of rank 0; expected 1 or more")
    return ranks
