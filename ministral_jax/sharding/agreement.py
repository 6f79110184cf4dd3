"""Whether all processes run the same program on the same files: what each has is compared before anything compiles.

Programs that differ do not fail, they hang in their first collective, or worse. Only descriptions are compared, digests
of what is long; nothing of the mathematics.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

from .. import __version__
from ..checkpoints.safetensors_header import LENGTH_BYTES
from ..checkpoints.weight_files import WeightFiles
from ..config import ModelConfig, Window
from ..config_files import detect_layout, read_config
from ..errors import CheckpointError, HostsError, TokenizerError
from ..tokenizer_files import find_tokenizer_file
from .hosts import MEETING_SECONDS, n_processes, process_id, tell, wait_for

Items = Mapping[str, str]  # what it is -> its value, both short

_PACKAGES = ("jax", "jaxlib", "flax", "numpy")
_NOTHING = "nothing"
_LONGEST_VALUE = 200
_DIGEST_LETTERS = 16
_SAMPLES, _SAMPLE_BYTES = 16, 4096
_EXTRA_SECONDS = 30  # for process 0 to say what it found


def require_agreement(what: str, items: Items, seconds: float = MEETING_SECONDS) -> None:
    """Compares `items` with those of all other processes, which call this too; `what` names the comparison, once a run.

    Raises HostsError, the same line in every process, naming a process that differs from process 0, the item and both
    values, or a process that has not come within `seconds`.
    """
    if n_processes() == 1:
        return
    place = f"ministral/agreement/{what}/"
    if process_id() == 0:
        problem = _compare_all(what, place, {name: _shortened(value) for name, value in items.items()}, seconds)
        tell(place + "verdict", problem)
    else:
        tell(place + str(process_id()), json.dumps({name: _shortened(value) for name, value in items.items()}))
        silence = f"process 0 of {n_processes()} did not come to the comparison of the {what}"
        problem = wait_for(place + "verdict", silence, seconds + _EXTRA_SECONDS)
    if problem:
        raise HostsError(problem)


def require_same_model(folder: Path, windows: str | Sequence[Window] | None = None) -> None:
    """Compares the checkpoint in `folder`, its tokenizer, and the config they give, with those of all other processes.

    `windows` is as in `checkpoints.load`. Reads headers and samples; raises as `require_agreement` does, and
    MinistralError for files that cannot be read.
    """
    if n_processes() == 1:
        return
    with WeightFiles(folder, detect_layout(folder)) as files:
        paths = list(files.paths)
    with contextlib.suppress(TokenizerError):  # token ids need none; where only one process lacks it, that shows
        paths.append(find_tokenizer_file(folder))
    items = config_items(read_config(folder, windows=windows)) | checkpoint_items(paths)
    require_agreement("checkpoint", items)


def _compare_all(what: str, place: str, mine: Items, seconds: float) -> str:
    """One line on the first process that is missing or differs; "" if there is none."""
    for other in range(1, n_processes()):
        try:
            absent = f"process {other} of {n_processes()} did not come to the comparison of the {what}"
            problem = difference(mine, json.loads(wait_for(place + str(other), absent, seconds)), other)
        except HostsError as error:
            return str(error)
        if problem:
            return problem
    return ""


def difference(mine: Items, theirs: Items, other: int) -> str:
    """One line on how the items of process `other` differ from process 0's; "" if they do not."""
    names = [*mine, *(name for name in theirs if name not in mine)]
    differing = [name for name in names if mine.get(name) != theirs.get(name)]
    if not differing:
        return ""
    name = differing[0]
    more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
    return (
        f"process {other} differs from process 0 in {name}{more}: {theirs.get(name, _NOTHING)} there, "
        f"{mine.get(name, _NOTHING)} in process 0; all have to run the same program on the same files"
    )


def version_items() -> dict[str, str]:
    """The versions that decide what is computed."""
    others = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), "ministral-jax": __version__} | others


def config_items(config: ModelConfig) -> dict[str, str]:
    """The fields of a model's config, as resolved."""
    return {f"the config's {field.name}": str(getattr(config, field.name)) for field in dataclasses.fields(config)}


def checkpoint_items(paths: Sequence[Path]) -> dict[str, str]:
    """Describes the files of a checkpoint: each one's size, and digests of its header and of samples of its contents.

    A header names every tensor with its dtype, shape and offsets. 16 pages of 4 KiB, evenly spread, tell apart
    checkpoints with equal headers, such as two fine-tunes of one model, at no cost. Files without a header (JSON) are
    digested whole.
    """
    items = {}
    for path in sorted(paths):
        try:
            items |= _file_items(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    return items


def _file_items(path: Path) -> dict[str, str]:
    if path.suffix != ".safetensors":
        return {f"the contents of {path.name}": digest(path.read_bytes())}
    with path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        header = file.read(min(length, size))
        samples = []
        for sample in range(_SAMPLES):
            file.seek(max(size - _SAMPLE_BYTES, 0) * sample // (_SAMPLES - 1))
            samples.append(file.read(_SAMPLE_BYTES))
    return {
        f"the size of {path.name}": f"{size} bytes",
        f"the header of {path.name}": digest(header),
        f"the tensors of {path.name}": digest(b"".join(samples)),
    }


def digest(data: bytes) -> str:
    """Short enough to read in a message, long enough not to be equal by chance."""
    return "sha256 " + hashlib.sha256(data).hexdigest()[:_DIGEST_LETTERS]


def _shortened(value: str) -> str:
    return value if len(value) <= _LONGEST_VALUE else f"{value[:40]}... ({digest(value.encode())})"
