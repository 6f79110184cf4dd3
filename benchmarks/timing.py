"""What the benchmarks share: fewest seconds per call, what the machine is, rates of known chips, results kept whole."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).resolve().parent / "results"


def best_seconds(run: Callable[[], Any], wait: Callable[[Any], Any], budget: float) -> float:
    """Fewest seconds per call: batches of calls, so that launches overlap, until `budget` seconds are spent."""
    wait(run())
    began = time.perf_counter()
    wait(run())
    once = max(time.perf_counter() - began, 1e-6)
    calls = max(1, min(50, int(budget / 4 / once)))
    best = float("inf")
    until = time.perf_counter() + budget
    while True:
        began = time.perf_counter()
        last = run()
        for _ in range(calls - 1):
            last = run()
        wait(last)
        best = min(best, (time.perf_counter() - began) / calls)
        if time.perf_counter() >= until:
            return best


def machine() -> dict[str, Any]:
    """The device, the date and the versions that a result was measured with."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    device = jax.devices()[0]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": device.device_kind,
        "platform": device.platform,
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in ("jax", "jaxlib", "jax-cuda13-plugin", "torch", "transformers")},
    }


def write(path: Path, record: Any) -> None:
    """Writes JSON under a temporary name and renames it, so that a killed run leaves the rows before it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, path)
