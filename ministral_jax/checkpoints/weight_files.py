"""Which files hold the weights of a checkpoint folder, and all their tensors as one. Knows no model and no names.

Files of both layouts may lie side by side, each with every tensor; only those of one layout are opened.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..config_files.layout import Layout
from ..errors import CheckpointError
from .json_pieces import JsonPieces, shown
from .safetensors import SafetensorsFile, open_regular, read_up_to
from .safetensors_header import MAX_HEADER_BYTES, TensorInfo

logger = logging.getLogger("ministral_jax")

STEMS: dict[Layout, str] = {"mistral": "consolidated", "hf": "model"}
PICKLES = re.compile(r".*\.(pth|pt|bin|ckpt)")


def is_weight_file(name: str, layout: Layout) -> bool:
    """Whether a file called `name` is one of weights in `layout`, or their index."""
    return (
        re.fullmatch(rf"{STEMS[layout]}(-\d+-of-\d+)?\.safetensors|{STEMS[layout]}\.safetensors\.index\.json", name)
        is not None
    )


class WeightFiles:
    """The weight files of one layout in a folder, opened: `tensors` by name over all of them. A context manager.

    `source` is what to name in a message about all of them: the only file, their index, or the folder; `paths` are all
    files that were opened, the index among them.
    Raises CheckpointError in one line for files that are missing, damaged, or at odds with each other or their index.
    """

    def __init__(self, directory: str | Path, layout: Layout) -> None:
        self.directory = Path(directory)
        self.layout: Layout = layout
        self.tensors: dict[str, TensorInfo] = {}
        self._home: dict[str, SafetensorsFile] = {}
        paths, index = weight_paths(self.directory, layout)
        self.paths = [*paths, index.path] if index else paths
        self.source = paths[0] if len(paths) == 1 else index.path if index else self.directory
        with contextlib.ExitStack() as opened:
            for path in paths:
                self._add(opened.enter_context(SafetensorsFile(path)))
            if index:
                self._require_index(index)
            self._open = opened.pop_all()

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._open.close()

    def path_of(self, name: str) -> Path:
        """The file that tensor `name` is in."""
        return self._home[name].path

    def read(self, name: str) -> np.ndarray:
        """The whole tensor, in fresh memory."""
        return self._home[name].read(name)

    def read_into(self, name: str, first: int, out: np.ndarray) -> None:
        """Fills `out`, contiguous, with the bytes of the tensor from its element number `first` on."""
        self._home[name].read_into(name, first, out)

    def read_slice(self, name: str, index: Sequence[slice]) -> np.ndarray:
        """`tensor[index]`, in fresh memory, reading only its bytes."""
        return self._home[name].read_slice(name, index)

    def _add(self, file: SafetensorsFile) -> None:
        for name, info in file.tensors.items():
            if name in self._home:
                raise CheckpointError(
                    f"{file.path}: tensor {shown(name)} is also in {self._home[name].path.name}; expected it once"
                )
            self._home[name] = file
            self.tensors[name] = info

    def _require_index(self, index: WeightIndex) -> None:
        for name, file_name in index.files.items():
            if name not in self._home:
                raise CheckpointError(
                    f"{self.directory / file_name}: tensor {shown(name)}, listed here by {index.path.name}, is missing"
                )
            found = self._home[name].path.name
            if found != file_name:
                raise CheckpointError(f"{index.path}: tensor {shown(name)} is in {found}, the index says {file_name}")
        for name in self._home.keys() - index.files.keys():
            raise CheckpointError(f"{index.path}: tensor {shown(name)} of {self.path_of(name).name} is not listed")


class WeightIndex:
    """An index file, `consolidated.safetensors.index.json` or its like: `files[tensor]` is a name in its folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = JsonPieces(_index_bytes(path), path, "index")

        def member(key: str) -> Any:
            return dict(text.object(lambda name: text.string())) if key == "weight_map" else text.value()

        self.files: Mapping[str, str] = dict(text.object(member)).get("weight_map", {})
        text.end()
        if not self.files:
            raise CheckpointError(
                f"{path}: weight_map is empty or missing; expected an object from tensor to file name"
            )

    def paths(self) -> list[Path]:
        """The listed files, each once and each truly in the folder of the index (or among the blobs of a hub cache)."""
        return [self._inside(file_name) for file_name in sorted(set(self.files.values()))]

    def _inside(self, file_name: str) -> Path:
        plain = re.fullmatch(r"[^/\\\x00-\x1f:]+\.safetensors", file_name) and not file_name.startswith(".")
        if not plain:
            raise CheckpointError(
                f"{self.path}: weight_map names {shown(file_name)}; expected a .safetensors file in the same folder"
            )
        path = self.path.parent / file_name
        try:
            folder, real = self.path.parent.resolve(), path.resolve(strict=True)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file, but {self.path.name} lists it; download it again") from None
        except (OSError, RuntimeError):  # a name too long for the system, a link to itself
            raise CheckpointError(f"{self.path}: weight_map names {shown(file_name)}, which cannot be opened") from None
        homes = [folder]
        if folder.parent.name == "snapshots":  # a hub cache: links into ../../blobs
            homes.append(folder.parent.parent / "blobs")
        if real.parent not in homes:
            raise CheckpointError(
                f"{self.path}: weight_map names {shown(file_name)}, a link out of the folder; expected a file in it"
            )
        return path


def _index_bytes(path: Path) -> bytes:
    with open_regular(path) as file:
        try:
            raw = read_up_to(file, MAX_HEADER_BYTES + 1)
        except OSError as problem:
            raise CheckpointError(f"{path}: cannot be read ({problem.strerror})") from None
    if len(raw) > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: more than {MAX_HEADER_BYTES} bytes; expected a list of tensors")
    return raw


def weight_paths(directory: Path, layout: Layout) -> tuple[list[Path], WeightIndex | None]:
    """The files to read, and the index that lists them where there is one.

    A single file wins over an index, as in transformers; without either, a complete set of numbered files does.
    """
    stem = STEMS[layout]
    single, index_path = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    try:
        names = sorted(entry.name for entry in directory.iterdir())
    except OSError as problem:
        raise CheckpointError(f"{directory}: cannot be read ({problem.strerror})") from None
    shards = [name for name in names if re.fullmatch(rf"{stem}-\d+-of-\d+\.safetensors", name)]
    if index_path.name in names:
        index = WeightIndex(index_path)
        if single.name not in names or single.name in index.files.values():
            unlisted = sorted(set(shards) - set(index.files.values()))
            if unlisted:
                raise CheckpointError(
                    f"{directory / unlisted[0]}: not listed in {index_path.name}; remove one of the two"
                )
            return index.paths(), index
    if single.name in names:
        if shards or index_path.name in names:
            logger.warning("%s: read alone; the numbered files beside it are not", single)
        return [single], None
    if shards:
        return [directory / name for name in _complete(shards, directory)], None
    raise _no_weights(directory, names, layout)


def _complete(shards: list[str], directory: Path) -> list[str]:
    """The numbered files, if they are 1 to n of one n."""
    total = shards[0].rsplit("-", 1)[1]
    expected = [re.sub(r"-\d+-of-.*", f"-{i:05d}-of-{total}", shards[0]) for i in range(1, _bounded_count(total) + 1)]
    for name in expected:
        if name not in shards:
            raise CheckpointError(f"{directory / name}: missing beside {shards[0]}; download it again")
    for name in shards:
        if name not in expected:
            raise CheckpointError(f"{directory / name}: does not belong to the {len(expected)} files of {shards[0]}")
    return expected


def _bounded_count(total: str) -> int:
    return min(int(total.split(".")[0]), 100_000)


def _no_weights(directory: Path, names: list[str], layout: Layout) -> CheckpointError:
    expected = f"expected {STEMS[layout]}.safetensors or numbered files with an index"
    pickles = [name for name in names if PICKLES.fullmatch(name)]
    if pickles:
        return CheckpointError(
            f"{directory / pickles[0]}: pickle files are never opened, since they can run code; {expected}: download "
            "the safetensors files of this model, or convert these with transformers' save_pretrained"
        )
    return CheckpointError(f"{directory}: no weight files of the {layout} layout; {expected}")
