"""The steps of a fine-tuning run, and what is due between them: metrics, evaluations, checkpoints, samples."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from ministral_jax.config import ModelConfig
from ministral_jax.errors import MinistralError
from ministral_jax.sharding import hosts

from .config import RunConfig
from .data.batches import Batch
from .data.pipeline import Batches
from .metrics import (
    SAMPLES_FILE,
    MetricsFile,
    peak_flops,
    peak_memory,
    perplexity,
    step_flops,
    tokens_in,
)
from .preview import Preview
from .run_folder import RunFolder
from .sinks import MetricRows
from .step import BATCH_AXES, Metrics, TrainState, TrainStep

logger = logging.getLogger(__name__)

_MOST_LOST = 10  # steps in a row whose gradients are not finite

Row = dict[str, Any]


class Ended(NamedTuple):
    """How the steps of a run ended: the state, the last step taken, and the signal that came before it was the last."""

    state: TrainState
    step: int
    signal: int | None


class Loop:
    """The steps of a run. What it changes is in the folder; the state of training goes in and out."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        step: TrainStep,
        data: Batches[Batch],
        evaluation: Batches[Batch] | None,
        preview: Preview | None,
        model: ModelConfig,
        rows: MetricRows,
        report: Callable[[Row], object],
    ) -> None:
        self._config, self._folder, self._step, self._model = config, folder, step, model
        self._data, self._evaluation, self._preview = data, evaluation, preview
        self._evaluation_start = None if evaluation is None else evaluation.state()
        self._rows, self._report = rows, report
        self._samples = MetricsFile(folder.path / SAMPLES_FILE)
        n_devices = 1 if step.layout is None else step.layout.mesh.size
        self._peak_flops = peak_flops(jax.devices()[0].device_kind, n_devices)
        self._lost = 0
        self._began: tuple[int, float] | None = None  # a step, and when it had ended: what the time left is told by

    def train(self, state: TrainState, start: int, stopped: Callable[[], int | None]) -> Ended:
        """Takes the steps after `start` until the last, the end of the data, or a signal that comes before these."""
        if hosts.process_id() == 0:
            self._samples.cut_after(start)
        try:
            return self._steps(state, start, stopped)
        finally:
            self._folder.close(self._config.checkpoints)

    def _steps(self, state: TrainState, start: int, stopped: Callable[[], int | None]) -> Ended:
        number = start
        if signal := self._signal(start, stopped):
            return Ended(state, start, signal)
        batch = self._next(start)
        while batch is not None:
            begin = time.perf_counter()
            state, metrics = self._step(state, self._in_microbatches(batch))
            number += 1
            signal = self._signal(number, stopped)
            place = self._data.state()  # before the next batch is drawn, while the devices are at work
            following, problem = self._following(number)
            ends = following is None and problem is None
            stops = not ends and (signal is not None or problem is not None)
            self._tell(number, batch, metrics, begin, last=ends or stops)
            self._require_finite(metrics, number)
            self._between(state, number, place, ends=ends, stops=stops)
            if problem is not None:
                raise problem
            if stops:
                return Ended(state, number, signal)
            batch = following
        return Ended(state, number, None)

    def _next(self, number: int) -> Batch | None:
        """The batch of the step after `number`; None after the last."""
        return None if number >= self._config.max_steps else next(self._data, None)

    def _following(self, number: int) -> tuple[Batch | None, MinistralError | None]:
        """The same, or why it cannot be had: what step `number` has given is saved first."""
        try:
            return self._next(number), None
        except MinistralError as error:
            return None, error

    def _signal(self, number: int, stopped: Callable[[], int | None]) -> int | None:
        """The signal that ends the run after step `number`, if one does; among several processes, one of process 0."""
        return int(hosts.shared(f"stops after {number}", str(stopped() or 0))) or None

    def _in_microbatches(self, batch: Batch) -> Batch:
        """[A, B, T] on the devices, of [A B, T] on the host."""
        shape = (self._config.num_microbatches, -1, self._config.seq_len)
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

    def _tell(self, number: int, batch: Batch, metrics: Metrics, begin: float, *, last: bool) -> None:
        loss = float(metrics.loss)  # waits for the step
        now = time.perf_counter()
        seconds = now - begin
        if self._began is None:
            self._began = (number, now)  # the first step may have waited for the compiler
        if number % self._config.log_every and not last:
            return
        done = number - self._began[0]
        each = (now - self._began[1]) / done if done else seconds
        flops = step_flops(
            self._model,
            batch,
            full=not self._step.trains_adapters,
            reference=self._config.preference is not None,
        )
        row: Row = {
            "step": number,
            "loss": loss,
            **{name: float(value) for name, value in metrics.values.items()},
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
            self._rows.add("train", row)
            self._report(row)

    def _between(self, state: TrainState, number: int, place: dict[str, Any], *, ends: bool, stops: bool) -> None:
        """What is due after a step: a checkpoint, which is safe before anything else is begun; evaluation; samples."""
        checkpoints = self._config.checkpoints
        due = ends or stops or self._due(checkpoints.every, number)
        self._folder.finish(checkpoints, wait=due)  # the one before
        if due:
            self._folder.save(state, place, number)
        if stops:
            self._folder.finish(checkpoints, wait=True)
        if self._evaluation is not None and (ends or self._due(self._config.eval.every, number)):
            self._folder.evaluated(number, self._evaluate(state, number))
        if self._preview is not None and (ends or self._due(self._config.samples.every, number)):
            self._sample(self._preview, state, number)
        if ends:
            self._folder.finish(checkpoints, wait=True)

    def _due(self, every: int, number: int) -> bool:
        return every > 0 and number % every == 0

    def _evaluate(self, state: TrainState, number: int) -> float:
        """The loss over the data of evaluation, in nats per trained token, or of preferences per pair."""
        assert self._evaluation is not None
        assert self._evaluation_start is not None
        self._evaluation.restore(self._evaluation_start)
        total = weight = 0.0
        values = dict.fromkeys(self._step.objective.names, 0.0)
        for count, batch in enumerate(self._evaluation):
            if count == self._config.eval.batches:
                break
            layout = self._step.layout
            placed = batch if layout is None else layout.put(batch, *BATCH_AXES[1:])
            sums = self._step.evaluate(state, placed)
            total, weight = total + float(sums.loss), weight + float(sums.weight)
            values = {name: value + float(sums.values[name]) for name, value in values.items()}
        if not weight:
            raise MinistralError("the data of evaluation: nothing in it to evaluate on: `ministral data validate`")
        loss = total / weight
        if self._config.preference is None:
            beside: Row = {"perplexity": perplexity(loss), "tokens": int(weight)}
        else:
            beside = {name: value / weight for name, value in values.items()} | {"pairs": int(weight)}
        if hosts.process_id() == 0:
            self._rows.add("eval", {"step": number, "loss": loss, **beside})
        told = ", ".join(f"{name.replace('_', ' ')} {value:.6g}" for name, value in beside.items())
        logger.info("step %d: evaluation loss %.4f, %s", number, loss, told)
        return loss

    def _sample(self, preview: Preview, state: TrainState, number: int) -> None:
        """What the model answers now, into its file and to whoever watches."""
        for prompt, text in zip(preview.prompts, preview(state), strict=True):
            if hosts.process_id() == 0:
                self._samples.add({"step": number, "prompt": prompt, "text": text})
            logger.info("step %d: %r -> %r", number, prompt, text)
