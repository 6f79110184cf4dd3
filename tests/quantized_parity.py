"""Models that we quantised, here and in transformers, and what each projection saw there. For parity tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from ministral_jax.calibration import input_maxima
from ministral_jax.checkpoints.conversion.quantize import quantize
from ministral_jax.checkpoints.layouts import hf_name
from ministral_jax.checkpoints.load import load_model
from ministral_jax.config_files import Layout
from ministral_jax.linear import Linear
from ministral_jax.quantization import LinearFormat
from tests.checkpoint_files import tiny_config, write_tiny_checkpoint

IDS = [[1, 5, 9, 2, 77, 31, 8, 64, 100, 3, 50, 60]]
STORED = [
    LinearFormat("int8_channel", "dynamic"),
    LinearFormat("fp8_tensor", "static"),
    LinearFormat("fp8_channel", "dynamic"),
    LinearFormat("fp8_block", "dynamic"),
    LinearFormat("nvfp4", "none"),
    LinearFormat("nvfp4", "dynamic"),
]
BY_FORMAT = pytest.mark.parametrize("stored", STORED, ids=lambda stored: f"{stored.format}-{stored.activations}")
# Of the range. compressed-tensors unpacks four-bit weights to bfloat16, whatever it is asked for.
CLOSE = {"nvfp4": 3e-2}
EXACT = 1e-5

# Module of transformers -> its input and its output.
Seen = dict[str, tuple[np.ndarray, np.ndarray]]


def a_config(kind: str) -> Any:
    # Blocks of 128 must be whole for compressed-tensors.
    return tiny_config(kind, n_layers=2, dim=128, n_heads=8, n_kv_heads=4, head_dim=32, hidden_dim=256)  # type: ignore[arg-type]


def ours(folder: Path, stored: LinearFormat, kind: str = "ministral3", to: Layout = "hf") -> Path:
    """A checkpoint that we quantised, in the layout `to`."""
    # transformers has what is beside weights of four bits in bfloat16, and multiplies FP8 out in the config's dtype.
    dtype = "bfloat16" if stored.format == "nvfp4" else "float32"
    dense, target = folder / f"{kind}-{dtype}", folder / f"{kind}-{stored.format}-{stored.activations}-{to}"
    if not dense.exists():
        write_tiny_checkpoint(dense, a_config(kind), "mistral", dtype=dtype)
    calibrated = stored.activations == "static" or stored.format == "nvfp4"
    maxima = input_maxima(load_model(dense), IDS) if calibrated else None
    quantize(dense, target, stored=stored, to=to, input_maxima=maxima)
    return target


def theirs(folder: Path, stored: LinearFormat, **options: Any) -> Any:
    """The checkpoint as transformers loads it."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    dtype = torch.bfloat16 if stored.format == "nvfp4" and not options else torch.float32
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True, **options
    )
    assert not report["missing_keys"]
    # A model dequantised on loading has no use for the scales of activations.
    assert not [key for key in report["unexpected_keys"] if not (options and ".input_" in key)]
    return model.eval()


def logits_of(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.float().numpy()


def worst(found: Any, expected: np.ndarray) -> float:
    return float(np.abs(np.asarray(found, np.float32) - expected).max() / np.ptp(expected))


def our_logits(folder: Path, **options: Any) -> np.ndarray:
    """Of one operation after the other, which are compiled once for all models of these shapes."""
    return np.asarray(load_model(folder, **options)(jnp.asarray(IDS)))


def seen_by_projections(model: Any) -> tuple[Seen, np.ndarray]:
    """What each module got and gave in one pass over IDS, and the logits of that pass."""
    seen: Seen = {}

    def hook(name: str) -> Any:
        return lambda _, inputs, output: seen.update({name: (inputs[0].float().numpy(), output.float().numpy())})

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(hook(name))
    return seen, logits_of(model)


def module_of(projection: str) -> str:
    return hf_name(f"{projection}.weight").removesuffix(".weight")


def widen(model: Any, layers: dict[str, Linear]) -> None:
    """A model that was unpacked to bfloat16 in float32 instead, its four-bit weights as they were before rounding.

    Those are compared with the float64 of other tests to the bit; here it is the rounding of activations that counts.
    """
    import torch

    logits_of(model)  # the first pass unpacks
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    for name, layer in layers.items():
        exact = np.array(layer.quantized_weight().dequantize())
        weight = model.get_submodule(module_of(name)).weight
        assert worst(weight.data.numpy(), exact) < 1 / 256
        weight.data = torch.from_numpy(exact)
