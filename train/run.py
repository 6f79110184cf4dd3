"""A fine-tuning run from its configuration to the finished adapter or model: what is loaded, and the loop over steps.

    result = run(read_run_config("run.yaml").config)

The same seed, mesh and versions give the same bits, however often the run was stopped and gone on with.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from ministral_jax.catalog import parse_windows
from ministral_jax.checkpoints.hub import resolve
from ministral_jax.checkpoints.load import load_model
from ministral_jax.config import ModelConfig
from ministral_jax.config_files import read_config
from ministral_jax.errors import ConfigError
from ministral_jax.lora import initialize_adapters
from ministral_jax.sharding import hosts
from ministral_jax.sharding.agreement import digest, require_agreement, require_same_model
from ministral_jax.sharding.layout import Layout, layout_for
from ministral_jax.sharding.meshes import mesh_for
from ministral_jax.stacked import attach_adapters
from ministral_jax.tokenizer import Tokenizer

from .config import RunConfig
from .data.pipeline import open_data
from .data.preferences import open_pairs
from .export import export
from .loop import Loop, Row
from .memory_estimate import estimate, require_fits
from .metrics import device_memory
from .objective import NextToken, Objective, Preference
from .optimizer import Optimizer
from .preview import Preview, encoded_prompts
from .run_folder import RunFolder
from .signals import stop_signals
from .sinks import metric_rows, require_sinks
from .step import TrainState, TrainStep, trained_specs

logger = logging.getLogger(__name__)

FINAL = "final"  # the folder of the result in that of the run
_EXPORT_SECONDS = 24 * 3600.0  # that the others wait for process 0 to write it


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
    require_sinks(config)
    folder = RunFolder(Path(config.run_dir))
    config = folder.agreed(config, resume=resume)
    base = _open_base(config)
    config = _with_global_batch(config, base.layout)
    rows = config.batch_size * config.num_microbatches
    sizes: dict[str, int] = {"seq_len": config.seq_len, "seed": config.seed}
    opened = open_data if config.preference is None else open_pairs
    data = opened(config.data, base.tokenizer, batch_size=rows, **sizes)
    evaluation = config.evaluation and opened(config.evaluation, base.tokenizer, batch_size=config.batch_size, **sizes)
    require_agreement("data", {"data": digest(repr(data.state()).encode())})
    checkpoints = folder.checkpoints() if resume else []
    if checkpoints:
        data.restore(checkpoints[-1].data)
    prompts = encoded_prompts(config.samples, base.tokenizer, base.config.max_length) if config.samples.prompts else []
    step, state = _begin(config, base)
    preview = Preview(step, config.samples, prompts, base.tokenizer) if prompts else None
    folder.create(config)
    start = checkpoints[-1].step if checkpoints else 0
    if checkpoints:
        state = checkpoints[-1].restore(state)
        logger.info("going on after step %d, from %s", start, checkpoints[-1].folder)
    with stop_signals() as stopped, metric_rows(config, folder.path, start) as told:
        loop = Loop(config, folder, step, data, evaluation, preview, base.config, told, report or (lambda row: None))
        ended = loop.train(state, start, stopped)
    if ended.signal is not None:
        return RunResult(ended.step, None, ended.signal)
    result = folder.path / FINAL
    export(result, step, ended.state, base.folder, config)
    hosts.sync("the result", _EXPORT_SECONDS)
    return RunResult(ended.step, result)


def _open_base(config: RunConfig) -> _Base:
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
    objective = _objective(config)
    step = TrainStep(model, Optimizer(config.optimizer, trained_specs(model)), objective)
    _tell_parameters(step)
    needed = estimate(step, config.num_microbatches, config.batch_size * objective.rows, config.seq_len)
    logger.info("a step needs %s", needed)
    require_fits(needed, device_memory())
    return step, step.initial_state(model, running)


def _objective(config: RunConfig) -> Objective:
    return NextToken(config.rows_per_mean) if config.preference is None else Preference(config.preference)


def _tell_parameters(step: TrainStep) -> None:
    trained = sum(int(np.prod(spec.shape)) for spec in step.trained_specs.values())
    logger.info(
        "training %s parameters, %s", f"{trained:,}", "of adapters" if step.trains_adapters else "all there are"
    )
