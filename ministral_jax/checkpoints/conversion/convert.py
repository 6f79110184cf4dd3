"""Conversion between layouts: mistral, HF and orbax, models and adapters. Streams; never holds a model, nor computes on
quantised weights.

    from ministral_jax.checkpoints.conversion.convert import convert
    convert("Ministral-8B", "Ministral-8B-hf", to="hf")

The result gets its name only when it is whole. A run that was killed is taken up where its last file ended.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...config_files.json_file import write_json
from ...errors import CheckpointError
from ..hub import resolve
from ..safetensors_writer import write_streamed
from .canonical import Kind
from .compare import compare
from .manifest import MANIFEST, FileRecord, write_manifest
from .opening import Checkpoint, open_checkpoint
from .orbax_folder import write_orbax
from .pieces import Dtype, Pieces
from .plan import Plan, plan_conversion
from .staging import Staging, file_identities, notes_if_published, require_free, sha256_of

# Bytes done, bytes in all.
Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Report:
    """What a conversion wrote, or would write: `files` with sizes, `tensors` and their bytes, `dropped` by kind.

    `resumed` are the files taken over from a run that was killed.
    """

    target: Path
    source: Kind
    to: Kind
    tensors: int
    n_bytes: int
    files: Mapping[str, int]
    dropped: Mapping[str, int]
    resumed: tuple[str, ...] = ()


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: Kind,
    dtype: Dtype | None = None,
    max_shard_bytes: int | None = None,
    base: str | Path | None = None,
    revision: str | None = None,
    force: bool = False,
    verify: bool = False,
    dry_run: bool = False,
    progress: Progress = lambda done, total: None,
) -> Report:
    """Writes the model or adapter `source`, a folder or hub id, in the layout `to` into the new folder `target`.

    Every dtype is kept, and no value of a quantised weight or its scales is touched; `dtype` is another one for the
    dense floating-point weights. `max_shard_bytes` bounds the weight files (default: 5 GB for HF, one file for
    mistral). `base` names the model of a PEFT adapter that does not say. `force` replaces a checkpoint at `target` and
    discards what another conversion left unfinished. `verify` reads everything again and compares before the result
    gets its name. `dry_run` plans alone and writes nothing.

    Memory stays below about 100 MB, the interpreter's own included, with orbax below 400 MB. Raises
    MinistralError in one line; what was written so far then stays in `target.partial`, for the next run to take up.
    """
    with open_checkpoint(resolve(source, revision), base=base) as checkpoint:
        plan = plan_conversion(checkpoint, to, dtype=dtype, max_shard_bytes=max_shard_bytes)
        return write_planned(plan, target, force=force, verify=verify, dry_run=dry_run, progress=progress)


def write_planned(
    plan: Plan, target: str | Path, *, force: bool, verify: bool, dry_run: bool, progress: Progress
) -> Report:
    """Writes what is planned, of a checkpoint that is open, into the new folder `target`; the rest as in `convert`."""
    destination, folder = Path(target).expanduser().absolute(), plan.source.folder
    if dry_run:
        return _report(plan, destination)
    identity = _identity(plan)
    if notes_if_published(destination, identity) is not None:
        return _report(plan, destination)
    require_free(destination, folder, force=force)
    with Staging(destination, identity, force=force) as staging:
        resumed = tuple(sorted(staging.finished))
        _require_room(plan, staging)
        _write(plan, staging, progress)
        if verify:
            _verify(plan, staging)
        if _identity(plan)["source"] != identity["source"]:
            raise CheckpointError(f"{folder}: was changed while it was read; convert again once it is whole")
        staging.publish()
    return _report(plan, destination, resumed)


def _report(plan: Plan, target: Path, resumed: tuple[str, ...] = ()) -> Report:
    return Report(
        target=target,
        source=plan.source.kind,
        to=plan.to,
        tensors=len(plan.targets),
        n_bytes=plan.n_bytes,
        files={**plan.file_sizes(), **{path.name: path.stat().st_size for path in plan.carried}},
        dropped=dict(plan.source.dropped),
        resumed=resumed,
    )


def _identity(plan: Plan) -> dict[str, Any]:
    """What a run must share with an earlier one to go on with its files."""
    source = plan.source
    return {
        "source": file_identities([*source.reader.paths, *source.config_paths, *plan.carried]),
        "merged": source.merged,
        "to": plan.to,
        "dtype": plan.dtype,
        "files": {file: len(names) for file, names in plan.files.items()},
        "documents": plan.documents,
    }


def _require_room(plan: Plan, staging: Staging) -> None:
    """That the disk has room for what is still to be written."""
    done = sum(record.n_bytes for record in staging.finished.values())
    needed = plan.n_bytes - done
    free = shutil.disk_usage(staging.folder).free
    if free < needed:
        raise CheckpointError(
            f"{staging.target}: the disk has {free} bytes free, expected {needed} for the rest of the weights; free "
            "some, and run the same again"
        )


def _write(plan: Plan, staging: Staging, progress: Progress) -> None:
    pieces, specs, done = Pieces(plan.source), plan.specs, 0

    def chunks(name: str) -> Iterator[np.ndarray]:
        nonlocal done
        for piece in _target_pieces(plan, pieces, name):
            yield piece
            done += piece.nbytes
            progress(done, plan.n_bytes)

    for file, names in plan.files.items():
        chosen = {name: specs[name] for name in names}
        if file in staging.finished:
            done += sum(spec.n_bytes for spec in chosen.values())
            continue
        sha256 = write_streamed(staging.folder / file, chosen, chunks, plan.metadata)
        staging.record(file, FileRecord((staging.folder / file).stat().st_size, sha256))
    if plan.to == "orbax":
        write_orbax(staging.folder, specs, chunks)
    for path in plan.carried:
        _copy(path, staging.folder / path.name)
    for name, document in plan.documents.items():
        write_json(staging.folder / name, document)
    _write_manifest(plan, staging)


def _target_pieces(plan: Plan, pieces: Pieces, name: str) -> Iterator[np.ndarray]:
    target = plan.targets[name]
    for part in target.parts:
        yield from pieces.of(part, interleaved=plan.to == "mistral", dtype=target.spec.dtype)


def _copy(source: Path, target: Path) -> None:
    try:
        shutil.copyfile(source, target)
    except OSError as problem:
        raise CheckpointError(f"{target}: cannot be copied from {source} ({problem.strerror})") from None


def _write_manifest(plan: Plan, staging: Staging) -> None:
    folder, files = staging.folder, dict(staging.finished)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in files and name != MANIFEST:
            files[name] = sha256_of(path)
    sizes = {path.name: path.stat().st_size for path in plan.source.reader.paths}
    write_manifest(
        folder,
        source={
            "layout": plan.source.kind,
            "adapter": plan.source.adapter is not None,
            "files": sizes,
            **({"merged": plan.source.merged["settings"]} if plan.source.merged else {}),
        },
        options={"to": plan.to, "dtype": plan.dtype},
        documents=plan.kept,
        files=files,
    )


def _verify(plan: Plan, staging: Staging) -> None:
    """Reads back what was written, weights and checksums, and compares."""
    for name, record in staging.finished.items():
        if sha256_of(staging.folder / name) != record:
            raise CheckpointError(f"{staging.folder / name}: is not what was written; check the disk and convert again")
    with open_checkpoint(staging.folder, base=_base_of(plan.source)) as written:
        comparison = compare(plan.source, written, dtype=plan.dtype)
    if not comparison.same:
        raise CheckpointError(f"{staging.folder}: differs from its source: {comparison.differences[0]}; convert again")


def _base_of(source: Checkpoint) -> str | None:
    return source.adapter.base if source.adapter else None
