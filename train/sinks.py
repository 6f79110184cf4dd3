"""Where the rows of a run's metrics go: its JSONL files, and from there to TensorBoard and wandb if they are asked for.

The files are the truth. A sink gets the rows that they get, and one that is new to a run those that they already have.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ministral_jax.errors import MinistralError
from ministral_jax.extras import import_extra
from ministral_jax.sharding import hosts

from .config import RunConfig, WandbConfig
from .metrics import EVAL_FILE, TRAIN_FILE, MetricsFile

TENSORBOARD_FOLDER = "tb"
WANDB_ID_FILE = "wandb.id"  # of the run at wandb, which one that is resumed goes on with

Row = Mapping[str, Any]

# Kinds of rows and their files, in the order in which a step adds to them.
FILES: Mapping[str, str] = {"train": TRAIN_FILE, "eval": EVAL_FILE}


@runtime_checkable
class Sink(Protocol):
    """Takes rows of a kind while it is entered. `is_new`: it has none of this run yet."""

    is_new: bool

    def add(self, kind: str, row: Row) -> None: ...

    def __enter__(self) -> Sink: ...

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None: ...


class MetricRows:
    """The rows of a run: each is in its file, and has gone to every sink, when `add` returns."""

    def __init__(self, files: Mapping[str, MetricsFile], sinks: Sequence[Sink]) -> None:
        self._files, self._sinks = files, sinks

    def add(self, kind: str, row: Row) -> None:
        """Adds a row of a kind in FILES; it has a `step`."""
        self._files[kind].add(row)
        for sink in self._sinks:
            sink.add(kind, row)


def require_sinks(config: RunConfig) -> None:
    """Raises MinistralError where a sink that `config` asks for cannot be had: no package, or no account."""
    if config.tensorboard:
        _tensorboard("event_file_writer")
    if config.wandb is not None:
        wandb = _wandb()
        if hosts.process_id() == 0 and not _stays_here(config.wandb):
            with _wandb_failures(wandb):
                wandb.login()


@contextmanager
def metric_rows(config: RunConfig, folder: Path, start: int) -> Iterator[MetricRows]:
    """The rows of the run in `folder`, which goes on after step `start`; rows of later steps are dropped.

    Among several processes the first alone has files and sinks.
    """
    if hosts.process_id() != 0:
        yield MetricRows({}, ())
        return
    files = {kind: MetricsFile(folder / name) for kind, name in FILES.items()}
    told = {kind: max((row["step"] for row in file.rows()), default=0) for kind, file in files.items()}
    for file in files.values():
        file.cut_after(start)
    with ExitStack() as opened:
        sinks: list[Sink] = []
        if config.tensorboard:
            sinks.append(opened.enter_context(TensorBoard(folder / TENSORBOARD_FOLDER, start)))
        if config.wandb is not None:
            sinks.append(opened.enter_context(Wandb(config.wandb, folder, config.document(), told)))
        _catch_up([sink for sink in sinks if sink.is_new], files)
        yield MetricRows(files, sinks)


def _catch_up(sinks: Sequence[Sink], files: Mapping[str, MetricsFile]) -> None:
    """Tells sinks of the rows that there are, by steps; of one step, in the order of the files."""
    rows = [(kind, row) for kind, file in files.items() for row in file.rows()]
    for kind, row in sorted(rows, key=lambda pair: pair[1]["step"]):
        for sink in sinks:
            sink.add(kind, row)


class TensorBoard:
    """Event files with a scalar for each number of a row, such as train/loss; on the disk when `add` returns."""

    def __init__(self, folder: Path, start: int) -> None:
        self.is_new = not any(folder.glob("events.*"))
        self._events = _tensorboard("proto.event_pb2")
        self._values = _tensorboard("proto.summary_pb2")
        folder.mkdir(exist_ok=True)
        # Names hold the second, and files are read in the order of their names: what follows sorts those of one second.
        self._writer = _tensorboard("event_file_writer").EventsWriter(str(folder / "events"), f".after_{start:06d}")
        if not self.is_new:  # has TensorBoard forget later steps that it has read: they are taken again
            again = self._events.SessionLog(status=self._events.SessionLog.START)
            self._write(start + 1, session_log=again)

    def add(self, kind: str, row: Row) -> None:
        values = [self._values.Summary.Value(tag=tag, simple_value=value) for tag, value in _numbers(kind, row).items()]
        self._write(row["step"], summary=self._values.Summary(value=values))

    def _write(self, step: int, **what: Any) -> None:
        self._writer.write_event(self._events.Event(wall_time=time.time(), step=step, **what))
        self._writer.flush()

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._writer.close()


class Wandb:
    """A run at wandb, or in files for `wandb sync`: the same one whenever the run in `folder` is gone on with.

    `told` has the last step of each kind that was told before: wandb cannot forget those, and is not told them again.
    """

    def __init__(self, config: WandbConfig, folder: Path, document: dict[str, Any], told: Mapping[str, int]) -> None:
        wandb, home = _wandb(), folder / WANDB_ID_FILE
        self.is_new = not home.exists()
        self._told = {} if self.is_new else told
        run_id = uuid.uuid4().hex[:8] if self.is_new else home.read_text(encoding="ascii").strip()
        with _wandb_failures(wandb):
            self._run = wandb.init(
                project=config.project,
                name=config.run_name or folder.absolute().name,
                id=run_id,
                resume=None if config.offline else "allow",
                mode="offline" if config.offline else None,  # None leaves it to WANDB_MODE
                dir=str(folder),
                job_type="training",
                config=document,
            )
        partial = home.with_name(home.name + ".partial")
        partial.write_text(run_id + "\n", encoding="ascii")
        os.replace(partial, home)

    def add(self, kind: str, row: Row) -> None:
        if row["step"] > self._told.get(kind, 0):
            self._run.log(_numbers(kind, row), step=row["step"])

    def __enter__(self) -> Wandb:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._run.finish(exit_code=int(error is not None))


def _numbers(kind: str, row: Row) -> dict[str, float]:
    """What of a row can be drawn over its steps, by names that both sinks group by kind."""
    numbers = {name: value for name, value in row.items() if name != "step" and isinstance(value, int | float)}
    return {f"{kind}/{name}": value for name, value in numbers.items()}


def _tensorboard(module: str) -> Any:
    return import_extra(f"tensorboardX.{module}", "tensorboard", "tensorboard: true")


def _wandb() -> Any:
    return import_extra("wandb", "wandb", "wandb.project")


def _stays_here(config: WandbConfig) -> bool:
    return config.offline or os.environ.get("WANDB_MODE", "online") != "online"


@contextmanager
def _wandb_failures(wandb: Any) -> Iterator[None]:
    """Has what wandb raises end a run in one line."""
    try:
        yield
    except wandb.Error as error:
        message = " ".join(str(error).split()).rstrip(".")
        raise MinistralError(f"wandb: {message}; wandb.offline: true needs no account and no network") from error
