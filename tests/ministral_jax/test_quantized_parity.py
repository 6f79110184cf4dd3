"""Quantised checkpoints against transformers and compressed-tensors: they read ours, we read theirs.

A whole model with rounded activations is no fair comparison: the largest activation of a token lies on a tie of int8,
so that one unit in the last place of a norm moves a whole step. Each projection is compared on the very inputs that it
had in the other implementation instead, and whole models with activations as they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ministral_jax.calibration import input_maxima
from ministral_jax.checkpoints.conversion.quantize import _block, quantize
from ministral_jax.checkpoints.layouts import hf_name
from ministral_jax.checkpoints.load import load_model
from ministral_jax.linear import Linear, projections
from ministral_jax.quantization import LinearFormat
from tests.checkpoint_files import tiny_config, write_tiny_checkpoint
from tests.quantized_files import write_quantized_checkpoint

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

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


def a_config(kind: str) -> Any:
    # Blocks of 128 must be whole for compressed-tensors.
    return tiny_config(kind, n_layers=2, dim=128, n_heads=4, n_kv_heads=4, head_dim=32, hidden_dim=256)  # type: ignore[arg-type]


def ours(folder: Path, stored: LinearFormat, kind: str = "ministral3") -> Path:
    """A checkpoint in the HF layout that we quantised."""
    write_tiny_checkpoint(folder / "dense", a_config(kind), "mistral")
    maxima = input_maxima(load_model(folder / "dense"), IDS)
    quantize(folder / "dense", folder / "quantized", stored=stored, to="hf", input_maxima=maxima)
    return folder / "quantized"


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
    model = load_model(folder, **options)
    return np.asarray(jax.jit(model.__call__)(jnp.asarray(IDS)))


def seen_by_projections(model: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Module -> what it got and gave in one pass over IDS."""
    seen = {}

    def hook(name: str) -> Any:
        return lambda _, inputs, output: seen.update({name: (inputs[0].float().numpy(), output.float().numpy())})

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(hook(name))
    logits_of(model)
    return seen


@BY_FORMAT
def test_every_projection_gives_what_transformers_gives_for_its_inputs(tmp_path: Path, stored: LinearFormat) -> None:
    folder = ours(tmp_path, stored)
    layers, model = projections(load_model(folder)), theirs(folder, stored)
    if stored.format == "nvfp4":
        widen(model, layers)
    seen = seen_by_projections(model)
    assert len(seen) == len(layers) == 14
    plain = projections(load_model(folder, activations="plain"))
    for name, layer in layers.items():
        given, expected = seen[module_of(name)]
        assert worst(layer(jnp.asarray(given)), expected) < EXACT, name
        if stored.activations != "none":
            assert worst(plain[name](jnp.asarray(given)), expected) > 1e-3, name  # so that the comparison means much


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


@BY_FORMAT
@pytest.mark.parametrize("kind", ["mistral_window", "ministral", "ministral3_tied"])
def test_transformers_dequantises_to_our_logits(tmp_path: Path, stored: LinearFormat, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    if kind != "mistral_window" and stored.format not in ("int8_channel", "fp8_tensor"):
        pytest.skip("every architecture in int8 and FP8, every format in one architecture")
    folder = ours(tmp_path, stored, kind)
    model = theirs(folder, stored, quantization_config=transformers.CompressedTensorsConfig(dequantize=True))
    assert worst(our_logits(folder, activations="plain"), logits_of(model)) < CLOSE.get(stored.format, EXACT)


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_transformers_reads_the_published_spelling_of_fp8(tmp_path: Path, activations: str) -> None:
    pytest.importorskip("accelerate")
    config = tiny_config("ministral3", n_layers=2)
    write_quantized_checkpoint(tmp_path, config, "hf", ("fp8_tensor", activations, "hf"))
    assert worst(our_logits(tmp_path, activations="plain"), logits_of(theirs(tmp_path, STORED[1]))) < EXACT


@BY_FORMAT
def test_we_read_what_compressed_tensors_writes(tmp_path: Path, stored: LinearFormat) -> None:
    torch = pytest.importorskip("torch")
    quantized = compressed_by_them(tmp_path, stored)
    layers = projections(load_model(tmp_path / "theirs"))
    for name, layer in layers.items():
        assert layer.stored == stored
        expected = quantized[module_of(name)]
        found = np.asarray(layer.quantized_weight().dequantize())
        if stored.format == "nvfp4":
            found = np.asarray(jnp.asarray(found, jnp.bfloat16), np.float32)
        np.testing.assert_array_equal(found, expected.to(torch.float32).numpy(), err_msg=name)


def compressed_by_them(folder: Path, stored: LinearFormat) -> dict[str, Any]:
    """Writes folder/theirs with compressed-tensors and transformers; returns its own dequantised weights by module."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from transformers import AutoModelForCausalLM

    write_tiny_checkpoint(folder / "dense", a_config("ministral3"), "hf")
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32)
    block = _block(stored, ["lm_head"]) | {"quantization_status": "initialized"}
    del block["quant_method"]
    apply_quantization_config(model, QuantizationConfig(**block))
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            observe(module)
    compressor = ModelCompressor.from_pretrained_model(model, block["format"])
    compressor.compress_model(model)
    dequantised = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            state = {key: value.detach() for key, value in module.state_dict().items()}
            dequantised[name] = BaseCompressor.load_from_registry(block["format"]).decompress(state, scheme)["weight"]
    model.save_pretrained(folder / "theirs")
    compressor.update_config(folder / "theirs")
    assert json.loads((folder / "theirs" / "config.json").read_text())["quantization_config"]["format"]
    return dequantised


def observe(module: Any) -> None:
    """Fills in the scales of a module, by compressed-tensors' own formulas, from the extremes of its weights."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args, weight = module.quantization_scheme.weights, module.weight.data
    strategy, rows = str(args.strategy), len(weight)
    if "group" in strategy:
        module.weight_global_scale.data = generate_gparam(weight.min(), weight.max())
        view = weight.reshape(rows, -1, args.group_size)
        low, high = view.amin(-1), view.amax(-1)
    elif "block" in strategy:
        height, width = args.block_structure
        view = weight.reshape(rows // height, height, -1, width)
        low, high = view.amin((1, 3)), view.amax((1, 3))
    elif "channel" in strategy:
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    else:
        low, high = weight.min(), weight.max()
    scale, _ = calculate_qparams(low, high, args, global_scale=getattr(module, "weight_global_scale", None))
    module.weight_scale.data = scale.to(module.weight_scale.dtype)
    for name in ("input_scale", "input_global_scale"):
        if hasattr(module, name):
            getattr(module, name).data.fill_(0.01 if name == "input_scale" else 300.0)
