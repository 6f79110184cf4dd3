"""A fine-tuning run from its configuration to the finished adapter or model: what is loaded, and the loop over steps.

    result = run(read_run_config("run.yaml").config)

The same seed, mesh and versions give the same bits, however often the run was stopped and gone on with.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ministral_jax.checkpoints.hub import resolve
from ministral_jax.checkpoints.load import load_model
from ministral_jax.config import ModelConfig
from ministral_jax.config_files import read_config
from ministral_jax.errors import ConfigError, MinistralError
from ministral_jax.lora import initialize_adapters
from ministral_jax.sharding import hosts
from ministral_jax.sharding.agreement import digest, require_agreement, require_same_model
from ministral_jax.sharding.layout import Layout, layout_for
from ministral_jax.sharding.meshes import mesh_for
from ministral_jax.stacked import StackedTransformer, attach_adapters
from ministral_jax.tokenizer import Tokenizer

from .config import RunConfig
from .data.batches import Batch
from .data.pipeline import Batches, open_data
from .export import export
from .memory_estimate import estimate, require_fits
from .metrics import (
    EVAL_FILE,
    TRAIN_FILE,
    MetricsFile,
    device_memory,
    peak_flops,
    peak_memory,
    perplexity,
    step_flops,
    tokens_in,
)
from .optimizer import Optimizer
from .run_folder import RunFolder
from .step import BATCH_AXES, Metrics, TrainState, TrainStep, trained_specs

logger = logging.getLogger(__name__)

FINAL = "final"  # the folder of the result in that of the run
_MOST_LOST = 10  # steps in a row whose gradients are not finite

Row = dict[str, Any]


@dataclass(frozen=True)
class RunResult:
    """How a run ended: after which step, where the result lies, or the signal that stopped it before it was there."""

    step: int
    result: Path | None
    stopped_by: int | None = None


@dataclass(frozen=True)
class _Base:
    """The base model of a run as files, before any weight is read."""

    folder: Path
    config: ModelConfig
    mesh: Mesh | None
    layout: Layout | None
    tokenizer: Tokenizer


def run(config: RunConfig, *, resume: bool = False, report: Callable[[Row], object] | None = None) -> RunResult:
    """Runs, or goes on with, what `config` says; `report` is given each row of the metrics of training.

    SIGTERM and SIGINT end it after the step in progress, with a checkpoint. Raises MinistralError in one line for what
    can be foreseen, most of it before weights are read.
    """
    folder = RunFolder(Path(config.run_dir))
    config = folder.agreed(config, resume=resume)
    base = _open_base(config)
    config = _with_global_batch(config, base.layout)
    rows = config.batch_size * config.num_microbatches
    sizes: dict[str, int] = {"seq_len": config.seq_len, "seed": config.seed}
    data = open_data(config.data, base.tokenizer, batch_size=rows, **sizes)
    evaluation = config.evaluation and open_data(
        config.evaluation, base.tokenizer, batch_size=config.batch_size, **sizes
    )
    require_agreement("data", {"data": digest(repr(data.state()).encode())})
    checkpoints = folder.checkpoints() if resume else []
    if checkpoints:
        data.restore(checkpoints[-1].data)
    step, state = _begin(config, base)
    folder.create(config)
    start = checkpoints[-1].step if checkpoints else 0
    if checkpoints:
        state = checkpoints[-1].restore(state)
        logger.info("going on after step %d, from %s", start, checkpoints[-1].folder)
    loop = _Loop(config, folder, step, data, evaluation, base.config, report or (lambda row: None))
    with _stop_signals() as stopped:
        state, last = loop.train(state, start, stopped)
    if stopped() and last < config.max_steps:
        return RunResult(last, None, stopped())
    result = folder.path / FINAL
    export(result, step, state, base.folder, config)
    return RunResult(last, result)


def _open_base(config: RunConfig) -> _Base:
    from ministral_jax.cli.models import parse_windows

    folder = resolve(config.model, config.revision)
    windows = None if config.windows is None else parse_windows(config.windows)
    model = read_config(folder, windows=windows)
    require_same_model(folder, windows)
    if config.seq_len > model.max_length:
        raise ConfigError(f"seq_len: {config.seq_len}, expected at most {model.max_length}, the model's context")
    mesh = None if config.mesh is None else mesh_for(config.mesh, model, training=True)
    layout = None if mesh is None else layout_for(model, mesh, config.rules)
    if mesh is None and len(jax.devices()) > 1:
        logger.info("%d devices are there and one is used: mesh: auto takes all", len(jax.devices()))
    tokenizer = Tokenizer.load(folder if config.tokenizer is None else Path(config.tokenizer))
    if tokenizer.vocabulary_size > model.vocab_size:
        raise ConfigError(
            f"tokenizer: {tokenizer.vocabulary_size} ids, more than the {model.vocab_size} rows of the model's "
            "embeddings: use the tokenizer that belongs to it"
        )
    if config.lora is None and hosts.n_processes() > 1:
        raise ConfigError("full: true: not on several hosts yet, where the model cannot be written; train adapters")
    return _Base(folder, model, mesh, layout, tokenizer)


def _with_global_batch(config: RunConfig, layout: Layout | None) -> RunConfig:
    """The configuration with a batch_size of all devices."""
    ways = 1 if layout is None else layout.ways("batch")
    if config.batch_per_device:
        config = replace(config, batch_size=config.batch_size * ways, batch_per_device=False)
    if config.batch_size % ways:
        raise ConfigError(f"batch_size: {config.batch_size} rows do not divide over the {ways} devices that share them")
    return config


def _begin(config: RunConfig, base: _Base) -> tuple[TrainStep, TrainState]:
    """Loads the model and compiles the step; refuses one that cannot fit."""
    model = load_model(
        base.folder,
        dtype=config.dtype,
        windows=base.config.windows,
        mesh=base.mesh,
        rules=config.rules,
        stacked=True,
    )
    model.remat = config.remat
    beginning, running = jax.random.split(jax.random.key(config.seed))
    if config.lora is not None:
        attach_adapters(model, config.lora)
        initialize_adapters(model, beginning, place=None if model.layout is None else model.layout.placement)
    step = TrainStep(model, Optimizer(config.optimizer, trained_specs(model)), rows_per_mean=config.rows_per_mean)
    _tell_parameters(step, model)
    needed = estimate(step, config.num_microbatches, config.batch_size, config.seq_len)
    logger.info("a step needs %s", needed)
    require_fits(needed, device_memory())
    return step, step.initial_state(model, running)


def _tell_parameters(step: TrainStep, model: StackedTransformer) -> None:
    trained = sum(int(np.prod(spec.shape)) for spec in step.trained_specs.values())
    logger.info(
        "training %s parameters, %s", f"{trained:,}", "of adapters" if _adapters_alone(step) else "all there are"
    )


def _adapters_alone(step: TrainStep) -> bool:
    """Whether adapters are trained, and not every weight."""
    return len(step.trained_specs) < len(step.specs)


class _Loop:
    """The steps of a run. What it changes is in the folder; the state of training goes in and out."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        step: TrainStep,
        data: Batches[Batch],
        evaluation: Batches[Batch] | None,
        model: ModelConfig,
        report: Callable[[Row], object],
    ) -> None:
        self._config, self._folder, self._step, self._model = config, folder, step, model
        self._data, self._evaluation = data, evaluation
        self._evaluation_start = None if evaluation is None else evaluation.state()
        self._report = report
        self._train_rows = MetricsFile(folder.path / TRAIN_FILE)
        self._eval_rows = MetricsFile(folder.path / EVAL_FILE)
        n_devices = 1 if step.layout is None else step.layout.mesh.size
        self._peak_flops = peak_flops(jax.devices()[0].device_kind, n_devices)
        self._lost = 0
        self._began: tuple[int, float] | None = None  # a step, and when it had ended: what the time left is told by

    def train(self, state: TrainState, start: int, stopped: Callable[[], int | None]) -> tuple[TrainState, int]:
        """Takes the steps after `start` until the last, the end of the data, or a signal; returns the last taken."""
        if hosts.process_id() == 0:
            for rows in (self._train_rows, self._eval_rows):
                rows.cut_after(start)
        number = start
        batch = None if self._stops(start, stopped) else self._next(start)
        while batch is not None:
            begin = time.perf_counter()
            state, metrics = self._step(state, self._in_microbatches(batch))
            number += 1
            stops = self._stops(number, stopped)
            place = self._data.state()  # before the next batch is drawn, while the devices are at work
            following = None if stops else self._next(number)
            self._tell(number, batch, metrics, begin)
            self._require_finite(metrics, number)
            self._between(state, number, place, ends=following is None and not stops, stops=stops)
            batch = following
        return state, number

    def _next(self, number: int) -> Batch | None:
        """The batch of the step after `number`; None after the last."""
        return None if number >= self._config.max_steps else next(self._data, None)

    def _stops(self, number: int, stopped: Callable[[], int | None]) -> bool:
        """Whether a signal ends the run after step `number`; among several processes, one that process 0 got."""
        return bool(int(hosts.shared(f"stops after {number}", str(int(stopped() is not None)))))

    def _in_microbatches(self, batch: Batch) -> Batch:
        """[A, B, T] on the devices, of [A B, T] on the host."""
        shape = (self._config.num_microbatches, self._config.batch_size, self._config.seq_len)
        parts = Batch(*(array.reshape(shape) for array in batch))
        return parts if self._step.layout is None else self._step.layout.put(parts, *BATCH_AXES)

    def _require_finite(self, metrics: Metrics, number: int) -> None:
        self._lost = 0 if bool(metrics.finite) else self._lost + 1
        if self._lost:
            logger.warning("step %d: the gradient is not finite, and nothing was changed", number)
        if self._lost == _MOST_LOST:
            raise MinistralError(
                f"step {number}: {_MOST_LOST} gradients in a row are not finite; take a lower optimizer.learning_rate "
                "or dtype: float32, and see whether the base itself gives finite scores (`ministral score`)"
            )

    def _tell(self, number: int, batch: Batch, metrics: Metrics, begin: float) -> None:
        loss = float(metrics.loss)  # waits for the step
        now = time.perf_counter()
        seconds = now - begin
        if self._began is None:
            self._began = (number, now)  # the first step may have waited for the compiler
        if number % self._config.log_every and number != self._config.max_steps:
            return
        done = number - self._began[0]
        each = (now - self._began[1]) / done if done else seconds
        flops = step_flops(self._model, batch, full=not _adapters_alone(self._step))
        row: Row = {
            "step": number,
            "loss": loss,
            "learning_rate": float(metrics.learning_rate),
            "gradient_norm": float(metrics.gradient_norm),
            "trained_tokens": int(metrics.tokens),
            "tokens": tokens_in(batch),
            "seconds": seconds,
            "tokens_per_second": tokens_in(batch) / seconds,
            "mfu": None if self._peak_flops is None else flops / seconds / self._peak_flops,
            "peak_bytes": peak_memory(),
            "eta_seconds": each * (self._config.max_steps - number),
        }
        if hosts.process_id() == 0:
            self._train_rows.add(row)
            self._report(row)

    def _between(self, state: TrainState, number: int, place: dict[str, Any], *, ends: bool, stops: bool) -> None:
        """What is due after a step: an evaluation, a checkpoint."""
        loss = None
        if self._evaluation is not None and (ends or self._due(self._config.eval.every, number)):
            loss = self._evaluate(state, number)
        if ends or stops or self._due(self._config.checkpoints.every, number):
            self._folder.save(state, place, number, loss)
            self._folder.prune(self._config.checkpoints.keep, best=self._config.checkpoints.best)

    def _due(self, every: int, number: int) -> bool:
        return every > 0 and number % every == 0

    def _evaluate(self, state: TrainState, number: int) -> float:
        """The loss over the data of evaluation, in nats per trained token."""
        assert self._evaluation is not None
        assert self._evaluation_start is not None
        self._evaluation.restore(self._evaluation_start)
        total = weight = 0.0
        for count, batch in enumerate(self._evaluation):
            if count == self._config.eval.batches:
                break
            layout = self._step.layout
            placed = batch if layout is None else layout.put(batch, *BATCH_AXES[1:])
            sums = self._step.evaluate(state, placed)
            total, weight = total + float(sums[0]), weight + float(sums[1])
        if not weight:
            raise MinistralError("data.eval_instruct_data: nothing in it to evaluate on: `ministral data validate`")
        loss = total / weight
        if hosts.process_id() == 0:
            self._eval_rows.add({"step": number, "loss": loss, "perplexity": perplexity(loss), "tokens": int(weight)})
        logger.info("step %d: evaluation loss %.4f, perplexity %.4f", number, loss, perplexity(loss))
        return loss


@contextmanager
def _stop_signals() -> Iterator[Callable[[], int | None]]:
    """Yields a function that tells which of SIGTERM and SIGINT has come, if one has; the second one acts as usual."""
    got: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, frame: object) -> None:
        got.append(number)
        signal.signal(number, before[signal.Signals(number)])
        logger.info("%s: saving after this step", signal.Signals(number).name)

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: got[0] if got else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
