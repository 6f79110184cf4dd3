"""Quantisation blocks of files: mistral's own, transformers' fp8, compressed-tensors, and this project's nf4."""

from __future__ import annotations

from typing import Any, Literal

from ..config import QuantizationConfig, QuantizationFormat
from ..errors import ConfigError
from .fields import Fields

Activations = Literal["none", "static", "dynamic"]

BLOCK = [128, 128]
NF4_METHOD = "ministral_jax_nf4"

# What the HF fp8 copy of a model leaves unquantised.
_UNQUANTIZED_IN_HF = {True: ["model.vision_tower", "model.multi_modal_projector", "lm_head"], False: ["lm_head"]}


def quantization_of_params(fields: Fields) -> QuantizationConfig | None:
    """From `quantization` (mistral's fp8, or a compressed-tensors block) or `quantization_config` of a params.json."""
    own, shared = fields.block("quantization"), fields.block("quantization_config")
    if own is not None and own.has("qformat_weight"):
        own.choice("qformat_weight", ("fp8_e4m3",))
        dynamic = own.choice("qscheme_act", ("TENSOR", "NO_SCALES"), "TENSOR") == "NO_SCALES"
        return QuantizationConfig(
            format="fp8_tensor", activations="dynamic" if dynamic else "static", raw=own.as_dict()
        )
    block = own if own is not None else shared
    if block is None:
        return None
    return _nf4(block) if block.value("quant_method") == NF4_METHOD else _compressed_tensors(block)


def quantization_of_hf(fields: Fields) -> QuantizationConfig | None:
    """From `quantization_config` of a config.json: transformers' fp8, or compressed-tensors."""
    block = fields.block("quantization_config")
    if block is None:
        return None
    method = block.choice("quant_method", ("fp8", "compressed-tensors", NF4_METHOD))
    if method == NF4_METHOD:
        return _nf4(block)
    if method == "compressed-tensors":
        return _compressed_tensors(block)
    activations: Activations = "static" if _is_static(block) else "dynamic"
    if not block.has("weight_block_size") or block.value("weight_block_size") == BLOCK:
        return QuantizationConfig(format="fp8_block", activations=activations, raw=block.as_dict())
    if block.value("weight_block_size") is not None:
        raise block.error("weight_block_size", f"null or {BLOCK}")
    return QuantizationConfig(format="fp8_tensor", activations=activations, raw=block.as_dict())


def _is_static(block: Fields) -> bool:
    return block.choice("activation_scheme", ("static", "dynamic"), "dynamic") == "static"


def _nf4(block: Fields) -> QuantizationConfig:
    block.must_be("block_size", 64, "the constants of nf4 are for 64 columns each")
    block.boolean("double_quantization", False)
    return QuantizationConfig(format="nf4", activations="none", raw=block.as_dict())


def _compressed_tensors(block: Fields) -> QuantizationConfig:
    """A block of llm-compressor; every group of it must say the same."""
    block.choice("quant_method", ("compressed-tensors",), "compressed-tensors")
    kind = block.choice("format", ("int-quantized", "float-quantized", "nvfp4-pack-quantized"))
    groups = block.required_block("config_groups")
    found = {_group_scheme(groups.required_block(name), kind) for name in groups.keys()}  # noqa: SIM118
    if len(found) != 1:
        raise block.error("config_groups", f"one scheme for all groups, not {len(found)}")
    ((name, activations),) = found
    return QuantizationConfig(format=name, activations=activations, raw=block.as_dict())


def _group_scheme(group: Fields, kind: str) -> tuple[QuantizationFormat, Activations]:
    weights = group.required_block("weights")
    weights.must_be("symmetric", True, "zero points are not supported")
    inputs = group.block("input_activations")
    activations: Activations = "none"
    if inputs is not None:
        activations = "dynamic" if inputs.value("dynamic") in (True, "local") else "static"
    name = _weight_format(weights, kind)
    if inputs is not None:
        _require_known_activations(inputs, name, activations)
    return name, activations


def _require_known_activations(inputs: Fields, name: QuantizationFormat, activations: Activations) -> None:
    """Activations are rounded as weights are: per token or with a static scale, in groups if weights have them."""
    inputs.must_be("symmetric", True, "zero points are not supported")
    inputs.must_be("num_bits", 4 if name == "nvfp4" else 8, f"the weights are {name}")
    of_group = {"fp8_block": ("group", 128), "nvfp4": ("tensor_group", 16)}.get(name)
    if of_group:
        inputs.must_be("strategy", of_group[0], f"the weights are {name}")
        inputs.must_be("group_size", of_group[1], f"the weights are {name}")
    elif activations == "dynamic":
        inputs.must_be("strategy", "token", "a scale over a whole batch would make one sequence depend on another")
    else:
        inputs.must_be("strategy", "tensor", "a static scale is one number")
    if activations == "static" and name not in ("fp8_tensor", "fp8_channel"):
        raise inputs.error("dynamic", f"true, since the weights are {name}")


def _weight_format(weights: Fields, kind: str) -> QuantizationFormat:
    if kind == "nvfp4-pack-quantized":
        weights.must_be("num_bits", 4, "NVFP4 has four bits")
        weights.must_be("group_size", 16, "NVFP4 scales 16 columns at a time")
        return "nvfp4"
    weights.must_be("num_bits", 8, f"{kind} has eight bits")
    if kind == "int-quantized":
        weights.choice("strategy", ("channel",))
        return "int8_channel"
    strategy = weights.choice("strategy", ("tensor", "channel", "block"))
    if strategy != "block":
        return "fp8_tensor" if strategy == "tensor" else "fp8_channel"
    if weights.value("block_structure") != BLOCK:
        raise weights.error("block_structure", f"{BLOCK}")
    return "fp8_block"


def params_of_quantization(quantization: QuantizationConfig) -> dict[str, Any]:
    """The keys of params.json for `quantization`."""
    if "config_groups" in quantization.raw or quantization.format == "nf4":
        return {"quantization_config": dict(quantization.raw)}
    if quantization.format != "fp8_tensor" or quantization.activations == "none":
        raise _no_spelling(quantization, "params.json")
    scheme = "NO_SCALES" if quantization.activations == "dynamic" else "TENSOR"
    return {"quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": scheme}}


def hf_of_quantization(quantization: QuantizationConfig, *, has_vision: bool) -> dict[str, Any]:
    """The keys of config.json for `quantization`."""
    if "config_groups" in quantization.raw:
        block = {"quant_method": "compressed-tensors", **quantization.raw}
    elif quantization.format == "nf4":
        block = dict(quantization.raw)
    elif quantization.format in ("fp8_tensor", "fp8_block") and quantization.activations != "none":
        block = {
            "quant_method": "fp8",
            "activation_scheme": quantization.activations,
            "weight_block_size": BLOCK if quantization.format == "fp8_block" else None,
            "dequantize": False,
            "modules_to_not_convert": _UNQUANTIZED_IN_HF[has_vision],
        }
    else:
        raise _no_spelling(quantization, "config.json")
    return {"quantization_config": block}


def _no_spelling(quantization: QuantizationConfig, file_name: str) -> ConfigError:
    return ConfigError(
        f"quantization={quantization.format} without a compressed-tensors block has no spelling in {file_name}: "
        "quantise from the bfloat16 checkpoint in the other layout"
    )
