"""Files of compressed-tensors and of published spellings: what they wrote, we read, with the weights that they mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from ministral_jax.checkpoints.conversion.scheme import compressed_block
from ministral_jax.checkpoints.load import load_model
from ministral_jax.linear import projections
from ministral_jax.quantization import LinearFormat
from tests.checkpoint_files import tiny_config, write_tiny_checkpoint
from tests.quantized_files import write_quantized_checkpoint
from tests.quantized_parity import BY_FORMAT, EXACT, STORED, a_config, logits_of, module_of, our_logits, theirs, worst

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]


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
    block = compressed_block(stored, ["lm_head"]) | {"quantization_status": "initialized"}
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
