"""The folder in which a conversion takes shape: DST.partial, with a journal, until it is whole and gets its name.

A run that was killed leaves it; the next one takes over the files that the journal lists with their checksums. What may
lie in it is decided here; what is written, elsewhere.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ...config_files import CONFIG_FILE_NAMES
from ...errors import CheckpointError
from .adapters import PEFT_CONFIG
from .manifest import MANIFEST, FileRecord

JOURNAL, NEW, REPLACED, LOCK = "journal.jsonl", "new", "replaced", "lock"
_NEW_JOURNAL = f".{JOURNAL}"
# What a run leaves for the next beside the sum of a file: numbers by name.
Notes = dict[str, float]

_CHECKPOINT_MARKS = (*CONFIG_FILE_NAMES.values(), PEFT_CONFIG, MANIFEST)


class Staging:
    """DST.partial of one conversion, locked. A context manager; `publish` gives its contents the final name.

    `folder` is where to write. `finished` are the files of an earlier run of the same conversion, checked by their
    sums, `notes` what was noted with each. `identity` must be equal for a run to be taken over: `source` (what the
    source's files are) and all else.
    """

    def __init__(self, target: Path, identity: Mapping[str, Any], *, force: bool) -> None:
        self.target = target
        self._partial = target.with_name(f"{target.name}.partial")
        self.folder = self._partial / NEW
        self.finished: dict[str, FileRecord] = {}
        self.notes: dict[str, Notes] = {}
        self._lock: IO[bytes] | None = None
        with _named(target):
            self._partial.mkdir(parents=True, exist_ok=True)
            self._hold()
            try:
                self._take_over(json.loads(json.dumps(identity)), force)
            except BaseException:
                self._release()
                raise

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def record(self, name: str, record: FileRecord, notes: Notes | None = None) -> None:
        """Notes that the file `name` in `folder` is complete, and what the next run is to know of it."""
        self.finished[name], self.notes[name] = record, notes or {}
        line = _line(name, record, self.notes[name])
        with _named(self.target), open(self._partial / JOURNAL, "a", encoding="utf-8") as journal:
            journal.write(line)
            journal.flush()
            os.fsync(journal.fileno())

    def publish(self) -> None:
        """Renames `folder` to the target, in place of what has that name, and removes all else."""
        with _named(self.target):
            _sync(self.folder)
            if self.target.exists():
                self.target.rename(self._partial / REPLACED)
            self.folder.rename(self.target)
            _sync(self.target.parent)
            _remove(self._partial)

    def _hold(self) -> None:
        """Takes the lock of the folder, which ends with the process, however that ends."""
        self._lock = open(self._partial / LOCK, "wb")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise CheckpointError(f"{self._partial}: another conversion is writing here; wait until it ends") from None

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def _take_over(self, identity: dict[str, Any], force: bool) -> None:
        strangers = {path.name for path in self._partial.iterdir()} - {JOURNAL, _NEW_JOURNAL, NEW, REPLACED, LOCK}
        if strangers:
            raise CheckpointError(
                f"{self._partial}: holds {sorted(strangers)[0]!r}, which no conversion left; move the folder away"
            )
        begun = _begun(self._partial)
        difference = _difference(begun[0], identity) if begun else None
        if begun and begun[1] and difference and not force:
            raise CheckpointError(
                f"{self._partial}: was begun {difference}; give --force to begin anew, or repeat the first command on "
                "the first files"
            )
        self._put_back()
        if begun and not difference:
            self.finished = {name: record for name, (record, _) in begun[1].items() if _is(self.folder / name, record)}
            self.notes = {name: begun[1][name][1] for name in self.finished}
        self._remove_unfinished()
        self.folder.mkdir(exist_ok=True)
        lines = [_line(name, record, self.notes[name]) for name, record in self.finished.items()]
        _replace(self._partial / JOURNAL, "".join([json.dumps(identity) + "\n", *lines]))

    def _put_back(self) -> None:
        """What a run that was killed had moved out of the way, and not yet replaced."""
        moved = self._partial / REPLACED
        if moved.exists() and not self.target.exists():
            moved.rename(self.target)
        elif moved.exists():
            shutil.rmtree(moved)

    def _remove_unfinished(self) -> None:
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            if path.name not in self.finished:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def notes_if_published(target: Path, identity: Mapping[str, Any], *, mark: str = MANIFEST) -> dict[str, Notes] | None:
    """What was noted with each file, if the conversion `identity` got its name and was killed right then, else None.

    What it left behind is removed. `mark` is a file that it has written.
    """
    partial = target.with_name(f"{target.name}.partial")
    if not (partial / JOURNAL).is_file() or (partial / NEW).exists() or not (target / mark).is_file():
        return None
    begun = _begun(partial)
    with _named(target):
        _remove(partial)
    if begun is None or begun[0] != json.loads(json.dumps(identity)):
        return None
    return {name: notes for name, (_, notes) in begun[1].items()}


def require_free(target: Path, source: Path, *, force: bool) -> None:
    """That a conversion may get the name `target`. Raises CheckpointError where something is there and is to stay."""
    if target.is_symlink():
        raise CheckpointError(f"{target}: is a link; expected the name of a new folder")
    if not target.exists():
        if source.resolve().is_relative_to(target.with_name(f"{target.name}.partial").resolve()):
            raise CheckpointError(f"{target}.partial: holds the source; expected another name for the result")
        return
    if source.resolve().is_relative_to(target.resolve()):
        raise CheckpointError(f"{target}: holds the source; expected another folder")
    if not target.is_dir():
        raise CheckpointError(f"{target}: is a file; expected the name of a new folder")
    if not force:
        raise CheckpointError(f"{target}: exists; expected a new name, or --force to replace it")
    if any(target.iterdir()) and not any((target / mark).is_file() for mark in _CHECKPOINT_MARKS):
        raise CheckpointError(f"{target}: is no checkpoint and is not replaced; expected a new name")


def file_identities(paths: Iterable[Path]) -> dict[str, list[int]]:
    """Size and times of change of each file by name: equal as long as nobody writes to it."""
    found = {}
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as problem:
            raise CheckpointError(f"{path}: cannot be read ({problem.strerror})") from None
        found[path.name] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return found


def sha256_of(path: Path) -> FileRecord:
    """Size and SHA-256 of a file, read in pieces."""
    with open(path, "rb", buffering=0) as file:
        return FileRecord(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _is(path: Path, record: FileRecord) -> bool:
    return path.is_file() and path.stat().st_size == record.n_bytes and sha256_of(path) == record


def _line(name: str, record: FileRecord, notes: Notes) -> str:
    """A finished file in the journal."""
    entry = {"file": name, "bytes": record.n_bytes, "sha256": record.sha256, **({"notes": notes} if notes else {})}
    return json.dumps(entry) + "\n"


def _notes(entry: Mapping[str, Any]) -> Notes:
    return {name: float(number) for name, number in entry.get("notes", {}).items()}


def _begun(partial: Path) -> tuple[dict[str, Any], dict[str, tuple[FileRecord, Notes]]] | None:
    """Identity and finished files of an earlier run; a last line that was not finished counts for nothing."""
    path = partial / JOURNAL
    try:
        text = path.read_text(encoding="utf-8")
        first, *rest = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return first, {line["file"]: (FileRecord(line["bytes"], line["sha256"]), _notes(line)) for line in rest}
    except FileNotFoundError:
        return None
    except (AttributeError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}: damaged; remove {partial} to begin anew") from None


def _remove(partial: Path) -> None:
    """Removes the folder, its journal last, so that whoever is killed here is known to have been done."""
    shutil.rmtree(partial / REPLACED, ignore_errors=True)
    for name in (LOCK, _NEW_JOURNAL, JOURNAL):
        (partial / name).unlink(missing_ok=True)
    partial.rmdir()


def _difference(begun: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """In what the identity of an earlier run differs, for a message."""
    before, after = begun.get("source", {}), now["source"]
    for name in sorted({*before, *after}):
        if before.get(name) != after.get(name):
            return f"from other files: {name} of the source has changed since"
    return None if begun == now else "with other options or by another version"


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(_NEW_JOURNAL)
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _named(target: Path) -> Iterator[None]:
    """Failures of the file system as one line about the target."""
    try:
        yield
    except OSError as problem:
        where = problem.filename or target
        raise CheckpointError(f"{where}: cannot be written ({problem.strerror})") from None
