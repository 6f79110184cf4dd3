"""Keeps what every kernel's race detector found: an interpreter forgets one kernel's races when the next one starts."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest


class Detectors(list[Any]):
    """The detectors of all kernels interpreted since, in order."""

    @property
    def races_found(self) -> bool:
        return any(detector.races_found for detector in self)


def keep_detectors(monkeypatch: pytest.MonkeyPatch, interpreter: ModuleType, name: str) -> Detectors:
    """Every object that `interpreter` makes of its class `name` from now on."""
    kept = Detectors()
    real = getattr(interpreter, name)

    def made(*args: Any, **options: Any) -> Any:
        kept.append(real(*args, **options))
        return kept[-1]

    monkeypatch.setattr(interpreter, name, made)
    return kept


def of_tpu_kernels(monkeypatch: pytest.MonkeyPatch) -> Detectors:
    """The detectors of `pltpu.InterpretParams(detect_races=True)`."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return keep_detectors(monkeypatch, interpret_pallas_call, "RaceDetectionState")


def of_gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> Detectors:
    """The detectors of `plgpu.InterpretGPUParams(detect_races=True)`."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    return keep_detectors(monkeypatch, gpu_callbacks, "GPURaceDetectionState")
