"""Whole models that we quantised, in every architecture, against transformers with compressed-tensors.

A whole model with rounded activations is no fair comparison when it runs freely: a token's largest number lies on a tie
of int8, so that one unit in the last place of a norm moves a whole step. Here our model runs on, but each of its
projections is given the very input that it had in the other implementation, after it was seen that its own input is the
same number to 1e-5. All that lies between two projections is compared with that, and every projection on equal terms.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from ministral_jax.checkpoints.conversion.convert import convert
from ministral_jax.checkpoints.conversion.quantize import quantize
from ministral_jax.checkpoints.load import load_model
from ministral_jax.linear import Linear, projections
from ministral_jax.quantization import LinearFormat
from ministral_jax.quantization.int8 import INT8_HALF_RANGE
from ministral_jax.quantization.rounding import dynamic_scale, to_int8
from tests.checkpoint_files import write_tiny_checkpoint
from tests.quantized_parity import (
    CLOSE,
    EXACT,
    IDS,
    STORED,
    Seen,
    a_config,
    logits_of,
    module_of,
    our_logits,
    ours,
    seen_by_projections,
    theirs,
    widen,
    worst,
)

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

DENSE_KINDS = ["mistral", "mistral_window", "ministral", "ministral3", "ministral3_tied"]
# Every format in one architecture, int8 and FP8 in every one.
CASES = [(kind, stored) for kind in DENSE_KINDS for stored in STORED if kind == "ministral3" or stored in STORED[:3]]
BY_CASE = pytest.mark.parametrize(
    ("kind", "stored"), CASES, ids=[f"{kind}-{stored.format}-{stored.activations}" for kind, stored in CASES]
)
# How far from the middle between two codes a number may be for the last bits of a float32 to decide.
TIE = 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def written(folder: Path, stored: LinearFormat, kind: str) -> Path:
    """The checkpoint of a case, made once."""
    there = folder / f"{kind}-{stored.format}-{stored.activations}-hf"
    return there if there.exists() else ours(folder, stored, kind)


class Forced:
    """Our model on the inputs of another implementation; each difference is asserted where it appears."""

    def __init__(self, path: Path, seen: Seen) -> None:
        self.model, self.seen = load_model(path), seen
        self.names = {id(layer): name for name, layer in projections(self.model).items()}
        self.flipped = self.codes = 0

    def logits(self, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
        real, visited = Linear.__call__, []

        def call(layer: Linear, x: Any) -> Any:
            name = self.names[id(layer)]
            visited.append(name)
            given, expected = self.seen[module_of(name)]
            assert worst(jnp.reshape(x, given.shape), given) < EXACT, f"input of {name}"
            if layer.stored is not None and layer.stored.format == "int8_channel":
                self.count_ties(np.asarray(x).reshape(given.shape), given)
            found = real(layer, jnp.asarray(given).reshape(x.shape))
            assert worst(found.reshape(expected.shape), expected) < EXACT, name
            return found

        with monkeypatch.context() as patch:
            patch.setattr(Linear, "__call__", call)
            logits = np.asarray(self.model(jnp.asarray(IDS)))
        assert sorted(visited) == sorted(self.names.values())
        return logits

    def count_ties(self, own: np.ndarray, given: np.ndarray) -> None:
        """Counts the codes that differ; each of them must lie on a tie."""
        scale = dynamic_scale(jnp.asarray(given), INT8_HALF_RANGE)
        mine = to_int8(jnp.asarray(own), dynamic_scale(jnp.asarray(own), INT8_HALF_RANGE))
        differ = np.asarray(mine != to_int8(jnp.asarray(given), scale))
        beyond = np.abs(np.abs(given / np.asarray(scale)) % 1 - 0.5)[differ]
        assert (beyond < TIE).all(), beyond.max()
        self.flipped, self.codes = self.flipped + int(differ.sum()), self.codes + differ.size


@BY_CASE
def test_a_model_gives_what_transformers_gives_with_rounded_activations(
    folder: Path, kind: str, stored: LinearFormat, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    path = written(folder, stored, kind)
    model = theirs(path, stored)
    if stored.format == "nvfp4":
        widen(model, projections(load_model(path)))
    seen, expected = seen_by_projections(model)
    assert len(seen) == 14
    forced = Forced(path, seen)
    assert worst(forced.logits(monkeypatch), expected) < EXACT
    if forced.codes:
        record_property("codes that differ by a tie", f"{forced.flipped} of {forced.codes}")
    if stored.activations != "none":  # so that the comparison means much
        assert worst(our_logits(path, activations="plain"), expected) > 1e-3


@BY_CASE
def test_transformers_dequantises_to_our_logits(folder: Path, kind: str, stored: LinearFormat) -> None:
    transformers = pytest.importorskip("transformers")
    path = written(folder, stored, kind)
    model = theirs(path, stored, quantization_config=transformers.CompressedTensorsConfig(dequantize=True))
    assert worst(our_logits(path, activations="plain"), logits_of(model)) < CLOSE.get(stored.format, EXACT)


@pytest.mark.parametrize("kind", DENSE_KINDS)
def test_int8_by_way_of_the_mistral_layout_is_the_same_file(folder: Path, kind: str) -> None:
    """The file that the tests above load in transformers."""
    direct = written(folder, STORED[0], kind)
    convert(ours(folder, STORED[0], kind, "mistral"), folder / f"{kind}-converted", to="hf")
    one, other = (json.loads((path / "config.json").read_text()) for path in (direct, folder / f"{kind}-converted"))
    assert other == one
    assert (folder / f"{kind}-converted/model.safetensors").read_bytes() == (direct / "model.safetensors").read_bytes()


@pytest.mark.parametrize("activations", ["static", "dynamic"])
@pytest.mark.parametrize("kind", DENSE_KINDS)
def test_fp8_converted_from_the_mistral_layout_is_read_with_our_logits(
    folder: Path, kind: str, activations: str
) -> None:
    pytest.importorskip("accelerate")
    stored = LinearFormat("fp8_tensor", activations)  # type: ignore[arg-type]
    path = folder / f"{kind}-{activations}-converted"
    convert(ours(folder, stored, kind, "mistral"), path, to="hf")
    assert worst(our_logits(path, activations="plain"), logits_of(theirs(path, stored))) < EXACT


def test_fp8_of_a_bfloat16_checkpoint_is_multiplied_out_in_bfloat16_only(tmp_path: Path) -> None:
    """A limit of transformers: asked for float32, it has both dtypes in one product."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    write_tiny_checkpoint(tmp_path / "dense", a_config("mistral"), "mistral", dtype="bfloat16")
    quantize(tmp_path / "dense", tmp_path / "fp8", stored=LinearFormat("fp8_tensor", "dynamic"), to="mistral")
    convert(tmp_path / "fp8", tmp_path / "hf", to="hf")
    loader = transformers.AutoModelForCausalLM.from_pretrained
    assert worst(our_logits(tmp_path / "hf", activations="plain"), logits_of(loader(tmp_path / "hf").eval())) < 3e-2
    with pytest.raises(RuntimeError, match="expected m1 and m2 to have the same dtype, but got: c10::BFloat16"):
        logits_of(loader(tmp_path / "hf", dtype=torch.float32).eval())
