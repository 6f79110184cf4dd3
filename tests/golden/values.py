"""Reading the golden values, and folders of the golden models in both layouts. No torch."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from .models import GoldenModel, hf_weights, native_weights

FOLDER = Path(__file__).parent
PROMPT, GREEDY_TOKENS = 45, 20
CLOSE = 1e-4  # of the range of the logits: float32 rounding gives under 1e-5, other mathematics far more
MARGIN = 1e-3  # of the range: closer calls between the two best tokens would be decided by rounding


@dataclass(frozen=True)
class GoldenValues:
    """Logits [2, T, V] that transformers gave to `token_ids`, and greedy continuations of `prompts` [2, PROMPT]."""

    logits: np.ndarray
    prompts: np.ndarray
    greedy: np.ndarray

    @property
    def range(self) -> float:
        return float(np.ptp(self.logits))


def fingerprint(model: GoldenModel) -> int:
    """A checksum over all weights: shows when numpy draws differently from when the values were made."""
    return zlib.crc32(b"".join(array.tobytes() for array in native_weights(model).values()))


def golden_values(model: GoldenModel) -> GoldenValues:
    """The stored values; refuses them if the weights drawn today are others."""
    with np.load(FOLDER / f"{model.name}.npz", allow_pickle=False) as stored:
        if int(stored["fingerprint"]) != fingerprint(model):
            raise AssertionError(f"{model.name}: this numpy draws other weights; run tests.golden.make_golden again")
        return GoldenValues(stored["logits"], stored["prompts"], stored["greedy"])


def write_hf(model: GoldenModel, folder: Path) -> Path:
    """The golden checkpoint as transformers writes it: its own config.json, and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text((FOLDER / f"{model.name}.config.json").read_text())
    save_file({n: np.ascontiguousarray(w) for n, w in hf_weights(model).items()}, folder / "model.safetensors")
    return folder


def write_native(model: GoldenModel, folder: Path) -> Path:
    """The same weights in the mistral layout: params.json and consolidated.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(model.native))
    save_file(native_weights(model), folder / "consolidated.safetensors")
    return folder
