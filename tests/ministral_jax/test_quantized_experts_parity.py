"""Experts and latent attention that we quantised, in transformers with compressed-tensors: what it loads, what not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ministral_jax.calibration import input_maxima
from ministral_jax.checkpoints.conversion.convert import convert
from ministral_jax.checkpoints.conversion.quantize import quantize
from ministral_jax.checkpoints.load import load_model
from ministral_jax.linear import projections
from ministral_jax.quantization import LinearFormat
from tests.architecture_files import EXPERTS, LATENT, MIXTRAL, SMALL_4, make, write_example
from tests.quantized_parity import EXACT, IDS, STORED, logits_of, our_logits, worst

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

INT8, STATIC, PER_ROW, BLOCK, NVFP4, _ = STORED
# Blocks of 128 must be whole for transformers.
_ATTENTION = {"dim": 128, "n_heads": 8, "n_kv_heads": 4, "head_dim": 32, "hidden_dim": 256}
CONFIGS = {
    "mixtral": dataclasses.replace(MIXTRAL, **_ATTENTION, moe=dataclasses.replace(MIXTRAL.moe, expert_hidden_dim=256)),
    "small_4": dataclasses.replace(
        SMALL_4,
        dim=128,
        latent=dataclasses.replace(LATENT, q_rank=128, kv_rank=128),
        moe=dataclasses.replace(EXPERTS, expert_hidden_dim=128),
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models")
    for kind, config in CONFIGS.items():
        example = make(config, dtype=np.dtype(np.float32))
        for name, array in example.tensors.items():
            example.tensors[name] = array * np.float32(0.3) if array.ndim > 1 else 1 + array / 10
        write_example(made / kind, example, "mistral")
    return made


def written(folder: Path, kind: str, stored: LinearFormat, by: str = "hf") -> Path:
    """Quantised into the HF layout, or into the mistral layout and converted; made once."""
    target = folder / f"{kind}-{stored.format}-{stored.activations}-{by}"
    if not target.exists():
        maxima = input_maxima(load_model(folder / kind), IDS) if stored.activations == "static" else None
        if by == "hf":
            quantize(folder / kind, target, stored=stored, to="hf", input_maxima=maxima)
        else:
            native = target.with_name(f"{target.name}-native")
            quantize(folder / kind, native, stored=stored, to="mistral", input_maxima=maxima)
            convert(native, target, to="hf", verify=True)
    return target


def theirs(folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    loader = transformers.Mistral4ForCausalLM if "small" in folder.name else transformers.MixtralForCausalLM
    model, report = loader.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **options
    )
    return model.eval(), report


def dequantising() -> dict[str, Any]:
    transformers: Any = pytest.importorskip("transformers")
    return {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}


@pytest.mark.parametrize("stored", [STATIC, PER_ROW], ids=lambda stored: stored.format)
def test_transformers_dequantises_fp8_of_mixtral_to_our_logits(folder: Path, stored: LinearFormat) -> None:
    path = written(folder, "mixtral", stored)
    model, report = theirs(path, **dequantising())
    assert not report["missing_keys"]
    assert not [key for key in report["unexpected_keys"] if not key.endswith(".input_scale")]
    assert worst(our_logits(path, activations="plain"), logits_of(model)) < EXACT


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_fp8_of_mixtral_converted_from_the_mistral_layout_is_read_with_our_logits(
    folder: Path, activations: str
) -> None:
    pytest.importorskip("accelerate")
    path = written(folder, "mixtral", LinearFormat("fp8_tensor", activations), "mistral")
    model, report = theirs(path)
    assert not report["missing_keys"]
    assert worst(our_logits(path, activations="plain"), logits_of(model)) < EXACT


@pytest.mark.parametrize("stored", [INT8, BLOCK], ids=lambda stored: stored.format)
def test_other_experts_in_eight_bits_stop_transformers(folder: Path, stored: LinearFormat) -> None:
    """A limit of transformers: it merges experts of FP8 whose scale multiplies a whole matrix or its rows, and int4."""
    with pytest.raises(RuntimeError, match="automatic conversion of the weights"):
        theirs(written(folder, "mixtral", stored), **dequantising())


def test_the_divisor_of_four_bit_experts_is_forgotten_by_transformers(folder: Path) -> None:
    """A limit of transformers, which says nothing: its experts are larger by the divisor than ours are."""
    path = written(folder, "mixtral", NVFP4)
    model, report = theirs(path, **dequantising())
    assert not report["missing_keys"]
    experts = projections(load_model(path))["layers.0.feed_forward.experts.w2"]
    parts = {name: getattr(experts, name)[...] for name in experts.stored.parts(*experts.shape)}  # type: ignore[union-attr]
    one = {name: array[1] for name, array in parts.items()}
    ours = np.asarray(experts.stored.weight(one).dequantize())  # type: ignore[union-attr]
    found = model.model.layers[0].mlp.experts.down_proj[1].detach().float().numpy()
    divisor = float(one["weight_global_scale"])
    assert divisor > 100
    assert worst(found / divisor, ours) < 1 / 256  # unpacked to bfloat16
    assert worst(our_logits(path), logits_of(model)) > 0.1


def test_single_experts_of_small_4_are_not_known_to_transformers(folder: Path) -> None:
    """A limit of transformers: it merges experts of Mixtral alone."""
    _, report = theirs(written(folder, "small_4", PER_ROW), **dequantising())
    assert {key.rpartition(".")[2] for key in report["missing_keys"]} == {"gate_up_proj", "down_proj"}


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_fp8_of_all_experts_of_small_4_has_the_names_that_transformers_gives_it(folder: Path, activations: str) -> None:
    """In its module for GPUs; on a CPU its loader knows of no scale of experts. Beside them, attention and the shared
    expert are as everywhere."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    from safetensors.torch import load_file

    path = written(folder, "small_4", LinearFormat("fp8_tensor", activations), "mistral")
    config = transformers.AutoConfig.from_pretrained(path)
    module = finegrained.FP8Experts(config, block_size=None, activation_scheme=activations)
    prefix = "model.layers.1.mlp.experts."
    state = {
        name.removeprefix(prefix): t for name, t in load_file(path / "model.safetensors").items() if prefix in name
    }
    expected = dict(module.state_dict())
    assert state.keys() == expected.keys()
    assert all(state[name].dtype == expected[name].dtype for name in state)
    # This version's parameter has room for a scale of w1 and one of w3, which published files have one of.
    assert expected["gate_up_proj_scale_inv"].shape == (4, 2, 1)
    assert state["gate_up_proj_scale_inv"].shape == state["down_proj_scale_inv"].shape == (4, 1, 1)
    shapes = {name: tuple(t.shape) for name, t in expected.items() if name != "gate_up_proj_scale_inv"}
    assert {name: tuple(t.shape) for name, t in state.items() if name in shapes} == shapes
    model = load_model(path, activations="plain")
    for part, rows in (("w1", slice(0, 128)), ("w3", slice(128, 256))):
        linear = projections(model)[f"layers.1.feed_forward.experts.{part}"]
        meant = state["gate_up_proj"].to(torch.float32) * state["gate_up_proj_scale_inv"]
        ours = np.asarray(linear.weight[...].astype("float32") * linear.weight_scale[...][:, None, None])
        np.testing.assert_array_equal(ours, meant[:, rows].numpy())
