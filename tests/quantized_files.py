"""Quantised matrices by formulas of their own, in numpy: encoders, float64 values, products, and tiny checkpoints.

Nothing here uses ministral_jax.quantization, which it is there to judge.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from ministral_jax.config import ModelConfig, QuantizationConfig
from ministral_jax.config_files import Layout, write_config_json, write_params_json

from .checkpoint_files import layout_tensors, random_weights

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
# The quantiles of QLoRA, appendix E, to the digits printed there.
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32
)  # fmt: skip

Parts = dict[str, np.ndarray]

# format, activations, and what the tensors are called.
CASES = (
    ("int8_channel", "dynamic", "compressed"),
    ("fp8_tensor", "static", "mistral"),
    ("fp8_tensor", "static", "hf"),
    ("fp8_tensor", "static", "compressed"),
    ("fp8_tensor", "dynamic", "mistral"),
    ("fp8_tensor", "dynamic", "hf"),
    ("fp8_channel", "dynamic", "compressed"),
    ("fp8_block", "dynamic", "hf"),
    ("fp8_block", "dynamic", "compressed"),
    ("nvfp4", "dynamic", "compressed"),
    ("nvfp4", "none", "compressed"),
    ("nf4", "none", "compressed"),
    ("nf4", "none", "double"),
)
SPELLINGS = {
    "compressed": {"weight_scale": "weight_scale", "input_scale": "input_scale"},
    "mistral": {"weight_scale": "qscale_weight", "input_scale": "qscale_act"},
    "hf": {"weight_scale": "weight_scale_inv", "input_scale": "activation_scale"},
}


def nearest_e2m1(x: np.ndarray) -> np.ndarray:
    """Codes of the nearest four-bit floats; half way, the one with an even code."""
    distance = np.abs(np.abs(x)[..., None].astype(np.float64) - E2M1)
    best = distance.min(-1, keepdims=True)
    candidates = distance == best
    even = candidates & (np.arange(8) % 2 == 0)
    code = np.where(even.any(-1), even.argmax(-1), candidates.argmax(-1))
    return (code | np.where(np.signbit(x), 8, 0)).astype(np.uint8)


def pack(codes: np.ndarray) -> np.ndarray:
    return (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)


def unpack(packed: np.ndarray) -> np.ndarray:
    codes = np.zeros((packed.shape[0], 2 * packed.shape[1]), np.int64)
    codes[:, 0::2], codes[:, 1::2] = packed & 15, packed >> 4
    return codes


def spread(scale: np.ndarray, rows: int, columns: int, shape: tuple[int, int]) -> np.ndarray:
    """`scale[o // rows, i // columns]` for every o and i."""
    o, i = np.indices(shape)
    return scale[o // rows, i // columns]


def encode(weight: np.ndarray, name: str, activations: str = "none", spelling: str = "compressed") -> Parts:
    """The parts of a quantised float32 matrix, called as in compressed-tensors."""
    weight = weight.astype(np.float32)
    if name == "int8_channel":
        scale = np.abs(weight).max(1, keepdims=True) / np.float32(127.5)
        return {"weight": np.clip(np.rint(weight / scale), -128, 127).astype(np.int8), "weight_scale": scale}
    if name in ("fp8_tensor", "fp8_channel"):
        largest = np.abs(weight).max() if name == "fp8_tensor" else np.abs(weight).max(1, keepdims=True)
        scale = np.asarray(largest / np.float32(448), np.float32)
        parts = {"weight": np.clip(weight / scale, -448, 448).astype(E4M3), "weight_scale": scale}
        return parts | ({"input_scale": np.asarray(0.011, np.float32)} if activations == "static" else {})
    if name == "fp8_block":
        grid = -(-np.array(weight.shape) // 128)
        scale = np.zeros(grid, np.float32)
        for i, j in np.ndindex(*grid):
            scale[i, j] = np.abs(weight[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]).max() / np.float32(448)
        return {"weight": (weight / spread(scale, 128, 128, weight.shape)).astype(E4M3), "weight_scale": scale}
    if name == "nvfp4":
        divisor = np.float32(448 * 6) / np.abs(weight).max()
        groups = np.abs(weight.reshape(len(weight), -1, 16)).max(-1) / np.float32(6)
        scale = (groups * divisor).astype(E4M3)
        local = spread(scale.astype(np.float32) / divisor, 1, 16, weight.shape)
        parts = {
            "weight_packed": pack(nearest_e2m1(weight / local)),
            "weight_scale": scale,
            "weight_global_scale": divisor.reshape(1),
        }
        return parts | ({} if activations == "none" else {"input_global_scale": np.array([611.5], np.float32)})
    return _encode_nf4(weight, double=spelling == "double")


def _encode_nf4(weight: np.ndarray, *, double: bool) -> Parts:
    rows, columns = weight.shape
    blocks = [slice(i, i + 64) for i in range(0, columns, 64)]
    absmax = np.stack([np.abs(weight[:, block]).max(1) for block in blocks], 1)
    constants = {"weight_absmax": absmax}
    if double:
        offset = absmax.mean(1, dtype=np.float32)
        step = (np.abs(absmax - offset[:, None]).max(1) / np.float32(127)).astype(ml_dtypes.bfloat16)
        step[step == 0] = 1
        small = np.rint((absmax - offset[:, None]) / step[:, None].astype(np.float32))
        small = np.clip(small, -127, 127).astype(np.int8)
        constants = {"weight_absmax": small, "weight_absmax_scale": step, "weight_absmax_offset": offset}
        absmax = offset[:, None] + step[:, None].astype(np.float32) * small.astype(np.float32)
    relative = weight / spread(absmax, 1, 64, (rows, columns))
    codes = np.abs(relative[..., None] - NF4).argmin(-1)
    return {"weight_packed": pack(codes), **constants}


def values(parts: Parts, name: str) -> np.ndarray:
    """The matrix that the parts mean, in float64 (nvfp4's and nf4's scales are combined in float32, as is the rule)."""
    if name == "int8_channel" or name in ("fp8_tensor", "fp8_channel"):
        return parts["weight"].astype(np.float64) * parts["weight_scale"].astype(np.float64)
    if name == "fp8_block":
        payload = parts["weight"].astype(np.float64)
        return payload * spread(parts["weight_scale"].astype(np.float64), 128, 128, payload.shape)
    codes = unpack(parts["weight_packed"])
    if name == "nvfp4":
        scale = parts["weight_scale"].astype(np.float32) / parts["weight_global_scale"][0]
        signed = np.where(codes & 8, -E2M1[codes & 7], E2M1[codes & 7])
        return signed.astype(np.float64) * spread(scale, 1, 16, codes.shape)
    absmax = parts["weight_absmax"].astype(np.float32)
    if "weight_absmax_scale" in parts:
        absmax = (
            parts["weight_absmax_offset"][:, None] + parts["weight_absmax_scale"][:, None].astype(np.float32) * absmax
        )
    return NF4[codes].astype(np.float64) * spread(absmax, 1, 64, codes.shape)


def rounded_activations(x: np.ndarray, name: str, parts: Parts) -> np.ndarray:
    """What the format makes of activations [T, I]: scales and quotients in float32, values in float64."""
    if name == "int8_channel":
        scale = np.abs(x).max(1, keepdims=True) / np.float32(127.5)
        return np.clip(np.rint(x / scale), -128, 127).astype(np.float64) * scale
    if name in ("fp8_tensor", "fp8_channel"):
        dynamic = np.abs(x).max(1, keepdims=True) / np.float32(448)
        scale = parts.get("input_scale", dynamic)
        return np.clip(x / scale, -448, 448).astype(E4M3).astype(np.float64) * scale
    out = np.zeros(x.shape, np.float64)
    size = 128 if name == "fp8_block" else 16
    for i in range(0, x.shape[1], size):
        group = x[:, i : i + size]
        largest = np.abs(group).max(1, keepdims=True)
        if name == "fp8_block":
            scale = largest / np.float32(448)
            out[:, i : i + size] = (group / scale).astype(E4M3).astype(np.float64) * scale
        else:
            divisor = parts["input_global_scale"][0]
            scale = np.clip(divisor * (largest / np.float32(6)), 0, 448).astype(E4M3).astype(np.float32)
            scale = np.where(scale == 0, np.float32(0.125), scale) / divisor
            codes = nearest_e2m1(np.clip(group / scale, -6, 6))
            out[:, i : i + size] = np.where(codes & 8, -E2M1[codes & 7], E2M1[codes & 7]).astype(np.float64) * scale
    return out


def compressed_block(name: str, activations: str) -> dict[str, Any]:
    """A quantization_config of llm-compressor."""
    bits, kind = (4, "float") if name == "nvfp4" else (8, "int" if name == "int8_channel" else "float")
    weights: dict[str, Any] = {"num_bits": bits, "type": kind, "symmetric": True, "dynamic": False}
    inputs: dict[str, Any] = {"num_bits": bits, "type": kind, "symmetric": True, "dynamic": activations == "dynamic"}
    if name == "nvfp4":
        weights |= {"strategy": "tensor_group", "group_size": 16}
        inputs |= {"strategy": "tensor_group", "group_size": 16, "dynamic": "local"}
    elif name == "fp8_block":
        weights |= {"strategy": "block", "block_structure": [128, 128]}
        inputs |= {"strategy": "group", "group_size": 128}
    else:
        weights["strategy"] = "tensor" if name == "fp8_tensor" else "channel"
        inputs["strategy"] = "token" if activations == "dynamic" else "tensor"
    formats = {"int8_channel": "int-quantized", "nvfp4": "nvfp4-pack-quantized"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None if activations == "none" else inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.get(name, "float-quantized"),
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def quantization_of(name: str, activations: str, spelling: str) -> QuantizationConfig:
    raw: dict[str, Any] = {}
    if name == "nf4":
        raw = {"quant_method": "ministral_jax_nf4", "block_size": 64, "double_quantization": spelling == "double"}
    elif spelling == "compressed":
        raw = compressed_block(name, activations)
    return QuantizationConfig(format=name, activations=activations, raw=raw)  # type: ignore[arg-type]


def is_projection(name: str) -> bool:
    return ".attention.w" in name or ".feed_forward.w" in name


def write_quantized_checkpoint(
    folder: Path,
    config: ModelConfig,
    layout: Layout,
    case: tuple[str, str, str],
    skip: tuple[str, ...] = (),
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Writes a tiny quantised checkpoint; returns its dense float64 weights in memory order.

    Projections named in `skip` stay dense. A file's rows are quantised in the order of that file.
    """
    name, activations, spelling = case
    folder.mkdir(parents=True, exist_ok=True)
    words = SPELLINGS.get(spelling, {})
    meant: dict[str, np.ndarray] = {}
    tensors: dict[str, np.ndarray] = {}
    for parameter, weight in random_weights(config, seed).items():
        if not is_projection(parameter) or parameter in skip:
            meant[parameter] = weight
            tensors |= layout_tensors({parameter: weight}, config, layout)
            continue
        ((stem, rows),) = layout_tensors({parameter: weight}, config, layout).items()
        parts = encode(rows, name, activations, spelling)
        meant[parameter] = _in_memory_order(values(parts, name), parameter, config, layout)
        module = stem.removesuffix(".weight")
        tensors |= {f"{module}.{words.get(part, part)}": array for part, array in parts.items()}
    _write(folder, layout, tensors, config, quantization_of(name, activations, spelling))
    return meant


def _in_memory_order(rows: np.ndarray, parameter: str, config: ModelConfig, layout: Layout) -> np.ndarray:
    if layout == "hf" or not parameter.endswith(("wq.weight", "wk.weight")):
        return rows
    out = np.empty_like(rows)
    for row in range(len(rows)):  # HF[h*d + c*d/2 + j] = mistral[h*d + 2j + c]
        head, place = divmod(row, config.head_dim)
        pair, component = divmod(place, 2)
        out[head * config.head_dim + component * (config.head_dim // 2) + pair] = rows[row]
    return out


def _write(
    folder: Path, layout: Layout, tensors: Mapping[str, np.ndarray], config: ModelConfig, stored: QuantizationConfig
) -> None:
    import dataclasses

    config = dataclasses.replace(config, quantization=stored)
    if layout == "mistral":
        save_file(dict(tensors), folder / "consolidated.safetensors")
        write_params_json(config, folder / "params.json")
    else:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        write_config_json(config, folder / "config.json")
