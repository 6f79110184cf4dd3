"""From a dense checkpoint to a quantised one, one matrix at a time, in either layout. Runs no model.

    from ministral_jax.checkpoints.conversion.quantize import quantize
    quantize("Ministral-8B", "Ministral-8B-int8", to="hf", stored=LinearFormat("int8_channel", "dynamic"))

What is written is a compressed-tensors checkpoint, which vLLM and transformers load; FP8 in the mistral layout is
spelled as Mistral publishes it; nf4 is of this project alone. What stays dense is in scheme.py. Every expert is a
module of its own; where a matrix has one scale, w1 and w3 of an expert have the same, so that they can be put in one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ...config_files import CONFIG_FILE_NAMES, Layout
from ...config_files.json_file import write_json
from ...errors import CheckpointError
from ...quantization import LinearFormat
from ...quantization.encoding import ONE_SCALE, Parts, encode, relative_error
from ...quantization.formats import COLUMNS
from ..hub import resolve
from ..layouts import file_module
from ..safetensors_writer import TensorSpec, index_document, shard_file_names, shard_names, write_streamed
from ..translate import Name, hf_name
from ..weight_files import STEMS
from .canonical import Tensor
from .manifest import FileRecord
from .opening import Checkpoint, open_checkpoint
from .pieces import DTYPES, Pieces
from .plan import HF_SHARD_BYTES, carried_files, config_document, require_form
from .scheme import quantization_config, quantized_modules
from .staging import Notes, Staging, file_identities, notes_if_published, require_free

Progress = Callable[[int, int], object]

# The two projections of an expert that runtimes make one.
_GATE_UP = re.compile(r"(layers\.[0-9]+\.(?:feed_forward\.)?experts\.[0-9]+)\.(w[13])")
_TWIN = {"w1": "w3", "w3": "w1"}


@dataclass(frozen=True)
class QuantizationReport:
    """What was written: files with their sizes, bytes before and after, and each projection's relative error.

    `resumed` are the files taken over from a run that was killed.
    """

    target: Path
    to: Layout
    n_bytes_before: int
    n_bytes: int
    files: Mapping[str, int]
    errors: Mapping[str, float] = field(repr=False)
    resumed: tuple[str, ...] = ()


def quantize(
    source: str | Path,
    target: str | Path,
    *,
    stored: LinearFormat,
    to: Layout | None = None,
    input_maxima: Mapping[str, float] | None = None,
    revision: str | None = None,
    max_shard_bytes: int | None = None,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> QuantizationReport:
    """Writes the dense model `source`, a folder or hub id, its projections as `stored`, into the new folder `target`.

    `to` is the layout (default: the source's). `input_maxima` gives the largest input of each projection, from
    `calibration.input_maxima`, for formats that keep a scale of activations. `max_shard_bytes` bounds the weight files.
    `force` replaces a checkpoint at `target` and discards what another run left unfinished. Memory beyond the
    interpreter's is a few copies of the largest matrix. Raises MinistralError in one line; what was written so far then
    stays in `target.partial`, for the next run to take up.
    """
    folder, destination = resolve(source, revision), Path(target).expanduser().absolute()
    with open_checkpoint(folder) as checkpoint:
        _refuse(checkpoint)
        layout: Layout = to or ("hf" if checkpoint.kind == "hf" else "mistral")
        require_form(checkpoint, layout)
        job = _Job(checkpoint, layout, stored, input_maxima or {}, max_shard_bytes)
        identity, resumed = job.identity(), tuple[str, ...]()
        notes = notes_if_published(destination, identity, mark=CONFIG_FILE_NAMES[layout])
        if notes is None:
            require_free(destination, folder, force=force)
            with Staging(destination, identity, force=force) as staging:
                resumed = tuple(sorted(staging.finished))
                notes = job.write(staging, progress)
                if job.identity() != identity:
                    raise CheckpointError(f"{folder}: was changed while it was read; quantise again once it is whole")
                staging.publish()
        before = sum(tensor.n_bytes for tensor in checkpoint.tensors.values())
    sizes = {name: (destination / name).stat().st_size for name in job.files}
    found = {module: error for of_file in notes.values() for module, error in of_file.items()}
    errors = {module: found[module] for module in job.modules if module in found}
    return QuantizationReport(destination, layout, before, job.n_bytes, sizes, errors, resumed)


def _refuse(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    if checkpoint.adapter is not None:
        raise CheckpointError(f"{checkpoint.folder}: is an adapter; expected a model")
    if config.quantization is not None:
        raise CheckpointError(
            f"{checkpoint.folder}: is quantised already ({config.quantization.format}); expected a dense checkpoint"
        )


class _Job:
    """One checkpoint on its way: names and shapes of what is written, and the matrices as they are encoded."""

    def __init__(
        self,
        source: Checkpoint,
        layout: Layout,
        stored: LinearFormat,
        input_maxima: Mapping[str, float],
        max_shard_bytes: int | None,
    ) -> None:
        self.source, self.stored = source, stored
        self.maxima = {file_module(name, source.config): largest for name, largest in input_maxima.items()}
        self.layout: Layout = layout
        self._pieces = Pieces(source)
        self._encoded: tuple[str, Parts] = ("", {})
        self._largest: dict[str, float] = {}
        self._errors: Notes = {}
        self._targets = dict(self._named())
        projections = (tensor.name.module for _, tensor, part in self._targets.values() if part is not None)
        self.modules = list(dict.fromkeys(projections))
        self.specs = {name: spec for name, (spec, _, _) in self._targets.items()}
        self.n_bytes = sum(spec.n_bytes for spec in self.specs.values())
        limit = max_shard_bytes or (HF_SHARD_BYTES if layout == "hf" else self.n_bytes + 1)
        shards = shard_names(self.specs, limit)
        self.files = dict(zip(shard_file_names(STEMS[layout], len(shards)), shards, strict=True))
        self.documents = {CONFIG_FILE_NAMES[layout]: self._config_document()}
        if len(self.files) > 1:
            self.documents[f"{STEMS[layout]}.safetensors.index.json"] = index_document(self.specs, self.files)
        self.carried = carried_files(source.folder, self.documents)

    def identity(self) -> dict[str, Any]:
        """What a run must share with an earlier one to go on with its files."""
        return {
            "source": file_identities([*self.source.reader.paths, *self.source.config_paths, *self.carried]),
            "quantize": repr(self.stored),
            "to": self.layout,
            "maxima": dict(self.maxima),
            "files": {file: len(names) for file, names in self.files.items()},
            "documents": self.documents,
        }

    def _named(self) -> Iterator[tuple[str, tuple[TensorSpec, Tensor, str | None]]]:
        """Name in the target -> what it will be, the tensor it comes from, and which part it is of it."""
        native = self.layout == "mistral" and self.stored.format == "fp8_tensor"
        words = {"weight_scale": "qscale_weight", "input_scale": "qscale_act"} if native else {}
        chosen = quantized_modules(self.stored, self.source.config)
        for tensor in self.source.tensors.values():
            if not chosen.fullmatch(tensor.name.module):
                yield self._name(tensor.name), (TensorSpec(tensor.dtype, tensor.shape), tensor, None)
                continue
            self._require_columns(tensor)
            for part, made in self.stored.parts(*tensor.shape).items():
                shape = made.shape if native or len(made.shape) == 2 else (*made.shape, 1)
                name = self._name(Name(tensor.name.module, words.get(part, part)))
                yield name, (TensorSpec(np.dtype(made.dtype), shape), tensor, part)

    def _name(self, name: Name) -> str:
        return hf_name(name, wrapped=self.source.config.vision is not None) if self.layout == "hf" else str(name)

    def _require_columns(self, tensor: Tensor) -> None:
        multiple = COLUMNS.get(self.stored.format, 1)
        if tensor.dtype not in (*DTYPES.values(), np.dtype(np.float64)) or tensor.shape[1] % multiple:
            raise CheckpointError(
                f"{self.source.reader.path_of(tensor.stored)}: tensor '{tensor.stored}' is {tensor.dtype.name} "
                f"{list(tensor.shape)}; {self.stored.format} is made of dense matrices with a multiple of {multiple} "
                "columns"
            )

    def write(self, staging: Staging, progress: Progress) -> Mapping[str, Notes]:
        """Writes everything that is not there yet; returns the errors of the projections in each weight file."""
        metadata = {"format": "pt"} if self.layout == "hf" else None
        done = 0

        def chunks(name: str) -> Iterator[np.ndarray]:
            nonlocal done
            for piece in self._chunks(name):
                yield piece
                done += piece.nbytes
                progress(done, self.n_bytes)

        for file, names in self.files.items():
            specs, path = {name: self.specs[name] for name in names}, staging.folder / file
            if file in staging.finished:
                done += sum(spec.n_bytes for spec in specs.values())
                continue
            self._errors = {}
            sha256 = write_streamed(path, specs, chunks, metadata)
            staging.record(file, FileRecord(path.stat().st_size, sha256), self._errors)
        for path in self.carried:
            (staging.folder / path.name).write_bytes(path.read_bytes())
        for name, document in self.documents.items():
            write_json(staging.folder / name, document)
        return staging.notes

    def _chunks(self, name: str) -> Iterator[np.ndarray]:
        spec, tensor, part = self._targets[name]
        interleaved = self.layout == "mistral"
        if part is None:
            yield from self._pieces.of(tensor, interleaved=interleaved)
        else:
            yield np.asarray(self._parts(tensor)[part]).reshape(spec.shape)

    def _parts(self, tensor: Tensor) -> Parts:
        """The parts of one matrix, rows in the target's order; the last matrix is kept for its next part."""
        module = tensor.name.module
        if self._encoded[0] != module:
            weight = self._pieces.whole(tensor, interleaved=self.layout == "mistral")
            largest = self._shared_maximum(module, weight) if self.stored.format in ONE_SCALE else None
            parts = encode(jnp.asarray(weight), self.stored, self.maxima.get(module), largest=largest)
            if module not in self._errors:
                self._errors[module] = relative_error(jnp.asarray(weight), parts, self.stored)
            self._encoded = module, parts
        return self._encoded[1]

    def _shared_maximum(self, module: str, weight: np.ndarray) -> float | None:
        """The largest number of w1 and w3 of an expert, of which `weight` is one; None for other modules."""
        found = _GATE_UP.fullmatch(module)
        if not found:
            return None
        twin = f"{found[1]}.{_TWIN[found[2]]}"
        self._largest[module] = float(np.abs(weight).max(initial=0.0))
        if twin not in self._largest:
            other = self._pieces.whole(self.source.tensors[f"{twin}.weight"], interleaved=False)
            self._largest[twin] = float(np.abs(other).max(initial=0.0))
        return max(self._largest[module], self._largest[twin])

    def _config_document(self) -> dict[str, Any]:
        quantization = quantization_config(self.stored, self.layout, self.source.config)
        config = dataclasses.replace(self.source.config, quantization=quantization)
        return config_document(config, self.layout, self.source)
