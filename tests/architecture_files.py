"""Tiny checkpoints of every published architecture and quantisation, in both layouts, by formulas of their own.

Beside checkpoint_files, which writes what the built models read, this writes what conversion alone has to carry: expert
and latent layers, vision towers, scales. Names and rows are worked out here from the published tables, not by the code
under test. Holds no tests.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from ministral_jax.config import LatentAttentionConfig, ModelConfig, MoEConfig, QuantizationConfig, VisionConfig
from ministral_jax.config_files import Layout, hf_from_config, params_from_config
from tests.checkpoint_files import interleaved, tiny_config
from tests.published_configs import FP8_BLOCK, INT8, NVFP4

Tensors = dict[str, np.ndarray]

BF16, FP8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)

VISION = VisionConfig(
    dim=32, n_layers=2, n_heads=2, hidden_dim=48, patch_size=4, image_size=56, patch_merge=True, spatial_merge_size=2,
    pre_projector_norm=True,
)  # fmt: skip
LATENT = LatentAttentionConfig(q_rank=40, kv_rank=24, rope_head_dim=8, nope_head_dim=16, v_head_dim=16)
EXPERTS = MoEConfig(n_experts=4, experts_per_token=2, expert_hidden_dim=32, n_shared_experts=1)


@dataclass
class Example:
    """A model's config and its tensors in half-split rows, by their mistral names."""

    config: ModelConfig
    tensors: Tensors = field(default_factory=dict)


def random_values(shape: tuple[int, ...], dtype: np.dtype, generator: np.random.Generator) -> np.ndarray:
    """Any bytes for one-byte dtypes, moderate numbers else."""
    if dtype.itemsize == 1:
        return generator.integers(0, 120, shape, np.uint8).view(dtype)
    return generator.standard_normal(shape).astype(np.float32).astype(dtype)


def dense_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Weights of the text decoder by name, worked out from the published tables."""
    c, shapes = config, {"tok_embeddings": (config.vocab_size, config.dim), "norm": (config.dim,)}
    for i in range(c.n_layers):
        layer = {"attention_norm": (c.dim,), "ffn_norm": (c.dim,)}
        if c.latent:
            m, n = c.latent, c.n_heads
            layer |= {
                "attention.wq_a": (m.q_rank, c.dim), "attention.q_a_norm": (m.q_rank,),
                "attention.wq_b": (n * c.head_dim, m.q_rank),
                "attention.wkv_a_with_mqa": (m.kv_rank + m.rope_head_dim, c.dim), "attention.kv_a_norm": (m.kv_rank,),
                "attention.wkv_b": (n * (m.nope_head_dim + m.v_head_dim), m.kv_rank),
                "attention.wo": (c.dim, n * m.v_head_dim),
            }  # fmt: skip
        else:
            q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
            layer |= {"attention.wq": (q, c.dim), "attention.wk": (kv, c.dim), "attention.wv": (kv, c.dim)}
            layer |= {"attention.wo": (c.dim, q)}
        if c.moe and i >= c.moe.first_dense_layers:
            stem = "" if c.latent else "feed_forward."
            layer[f"{stem}gate"] = (c.moe.n_experts, c.dim)
            for e in range(c.moe.n_experts):
                layer |= _ffn(f"{stem}experts.{e}", c.dim, c.moe.expert_hidden_dim)
            if c.moe.n_shared_experts:
                layer |= _ffn(f"{stem}shared_experts", c.dim, c.moe.expert_hidden_dim)
        else:
            layer |= _ffn("feed_forward", c.dim, c.hidden_dim)
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes if c.tied_embeddings else shapes | {"output": (c.vocab_size, c.dim)}


def _ffn(stem: str, dim: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {f"{stem}.w1": (hidden, dim), f"{stem}.w3": (hidden, dim), f"{stem}.w2": (dim, hidden)}


def vision_shapes(v: VisionConfig, dim: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "vision_encoder.patch_conv": (v.dim, 3, v.patch_size, v.patch_size),
        "vision_encoder.ln_pre": (v.dim,),
        "pre_mm_projector_norm": (v.dim,),
        "patch_merger.merging_layer": (v.dim, 4 * v.dim),
        "vision_language_adapter.w_in": (dim, v.dim),
        "vision_language_adapter.w_out": (dim, dim),
    }
    for i in range(v.n_layers):
        stem = f"vision_encoder.transformer.layers.{i}"
        shapes |= {f"{stem}.attention.w{part}": (v.dim, v.dim) for part in "qkvo"}
        shapes |= {f"{stem}.attention_norm": (v.dim,), f"{stem}.ffn_norm": (v.dim,)}
        shapes |= _ffn(f"{stem}.feed_forward", v.dim, v.hidden_dim)
    return shapes


def _is_projection(name: str) -> bool:
    return name.startswith("layers.") and name.rsplit(".", 1)[-1] in ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


Quantise = Callable[[str, tuple[int, ...]], dict[str, tuple[tuple[int, ...], np.dtype]] | None]


def fp8_static(name: str, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype]] | None:
    if not _is_projection(name):
        return None
    return {"weight": (shape, FP8), "qscale_weight": ((), BF16), "qscale_act": ((), BF16)}


def fp8_block(name: str, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype]] | None:
    if not _is_projection(name):
        return None
    blocks = (-(-shape[0] // 128), -(-shape[1] // 128))
    return {"weight": (shape, FP8), "weight_scale": (blocks, BF16)}


def int8(name: str, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype]] | None:
    if not _is_projection(name):
        return None
    return {"weight": (shape, np.dtype(np.int8)), "weight_scale": ((shape[0], 1), BF16)}


def nvfp4(name: str, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype]] | None:
    if not _is_projection(name):
        return None
    one = ((1,), np.dtype(np.float32))
    return {
        "weight_packed": ((shape[0], shape[1] // 2), np.dtype(np.uint8)),
        "weight_scale": ((shape[0], shape[1] // 16), FP8),
        "weight_global_scale": one,
        "input_global_scale": one,
    }


def make(config: ModelConfig, quantise: Quantise | None = None, seed: int = 0, dtype: np.dtype = BF16) -> Example:
    """Random tensors for every module of `config`."""
    generator = np.random.default_rng(seed)
    shapes = dense_shapes(config) | (vision_shapes(config.vision, config.dim) if config.vision else {})
    example = Example(config)
    for name, shape in shapes.items():
        leaves = quantise(name, shape) if quantise else None
        for leaf, (leaf_shape, leaf_dtype) in (leaves or {"weight": (shape, dtype)}).items():
            example.tensors[f"{name}.{leaf}"] = random_values(leaf_shape, leaf_dtype, generator)
    return example


def _quantised(config: ModelConfig, kind: Any, activations: Any, raw: dict[str, Any]) -> ModelConfig:
    return dataclasses.replace(config, quantization=QuantizationConfig(format=kind, activations=activations, raw=raw))


_WITH_VISION = tiny_config("ministral3", vision=VISION, n_layers=2)
_FP8 = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
# Small 4's proportions: latent attention, experts in every layer, one shared.
SMALL_4 = tiny_config("ministral3", n_layers=2, latent=LATENT, head_dim=24, n_kv_heads=4, moe=EXPERTS)
LARGE_3 = dataclasses.replace(SMALL_4, moe=dataclasses.replace(EXPERTS, first_dense_layers=1))
MIXTRAL = tiny_config("mistral", n_layers=2, moe=MoEConfig(n_experts=4, experts_per_token=2, expert_hidden_dim=96))

EXAMPLES: dict[str, Callable[[], Example]] = {
    "mistral": lambda: make(tiny_config("mistral")),
    "mistral_window": lambda: make(tiny_config("mistral_window")),
    "ministral": lambda: make(tiny_config("ministral")),
    "ministral3": lambda: make(tiny_config("ministral3")),
    "ministral3_tied": lambda: make(tiny_config("ministral3_tied")),
    "wide_heads": lambda: make(tiny_config("wide_heads")),
    "mixtral": lambda: make(MIXTRAL),
    "small_4": lambda: make(SMALL_4),
    "vision": lambda: make(_WITH_VISION),
    "vision_tied": lambda: make(dataclasses.replace(_WITH_VISION, tied_embeddings=True)),
    "vision_fp8": lambda: make(_quantised(_WITH_VISION, "fp8_tensor", "static", _FP8), fp8_static),
    "fp8_block": lambda: make(_quantised(tiny_config("ministral3"), "fp8_block", "dynamic", FP8_BLOCK), fp8_block),
    "int8": lambda: make(_quantised(tiny_config("mistral"), "int8_channel", "dynamic", INT8), int8),
    "nvfp4": lambda: make(_quantised(tiny_config("ministral3"), "nvfp4", "dynamic", NVFP4), nvfp4),
    "small_4_nvfp4": lambda: make(_quantised(SMALL_4, "nvfp4", "dynamic", NVFP4), nvfp4),
}  # fmt: skip

_HF_WORDS = [
    ("attention.wq_a.", "self_attn.q_a_proj."), ("attention.q_a_norm.", "self_attn.q_a_layernorm."),
    ("attention.wq_b.", "self_attn.q_b_proj."), ("attention.wkv_a_with_mqa.", "self_attn.kv_a_proj_with_mqa."),
    ("attention.kv_a_norm.", "self_attn.kv_a_layernorm."), ("attention.wkv_b.", "self_attn.kv_b_proj."),
    ("attention.wq.", "self_attn.q_proj."), ("attention.wk.", "self_attn.k_proj."),
    ("attention.wv.", "self_attn.v_proj."), ("attention.wo.", "self_attn.o_proj."),
    ("attention_norm.", "input_layernorm."), ("ffn_norm.", "post_attention_layernorm."),
    ("tok_embeddings.", "embed_tokens."),
    ("qscale_weight", "weight_scale_inv"), ("qscale_act", "activation_scale"),
]  # fmt: skip


def hf_tensors(example: Example) -> Tensors:
    """The tensors as an HF file holds them: names, fused experts; rows are half-split there too."""
    tensors: Tensors = {}
    outer = "model.language_model." if example.config.vision else "model."
    for name, values in example.tensors.items():
        if name.startswith(("vision_encoder.", "pre_mm_", "patch_merger.", "vision_language_")):
            tensors[_hf_vision(name)] = values
        elif name.startswith("output."):
            tensors[name.replace("output.", "lm_head.")] = values
        else:
            stem = name
            for ours, theirs in _HF_WORDS:
                stem = stem.replace(ours, theirs)
            tensors[outer + _hf_experts(stem)] = values
    return _fused(tensors)


def _hf_experts(stem: str) -> str:
    if ".feed_forward.experts." in stem or ".feed_forward.gate." in stem:
        return stem.replace("feed_forward", "block_sparse_moe")
    for ours, theirs in (("w1.", "gate_proj."), ("w2.", "down_proj."), ("w3.", "up_proj.")):
        stem = stem.replace(f".{ours}", f".{theirs}")
    for part in (".experts.", ".shared_experts.", ".gate."):
        stem = stem.replace(part, f".mlp{part}")
    return stem.replace("feed_forward.", "mlp.")


def _hf_vision(name: str) -> str:
    words = [
        ("vision_encoder.", "vision_tower."), ("pre_mm_projector_norm.", "multi_modal_projector.norm."),
        ("patch_merger.", "multi_modal_projector.patch_merger."),
        ("vision_language_adapter.w_in.", "multi_modal_projector.linear_1."),
        ("vision_language_adapter.w_out.", "multi_modal_projector.linear_2."),
        (".wq.", ".q_proj."), (".wk.", ".k_proj."), (".wv.", ".v_proj."), (".wo.", ".o_proj."),
        (".w1.", ".gate_proj."), (".w2.", ".down_proj."), (".w3.", ".up_proj."),
    ]  # fmt: skip
    for ours, theirs in words:
        name = name.replace(ours, theirs)
    return f"model.{name}"


def _fused(tensors: Tensors) -> Tensors:
    """Experts of Mistral 4 in dense dtypes as transformers keeps them: [E, w1 then w3, D] and [E, D, F]."""
    out: Tensors = {}
    for name, values in tensors.items():
        if ".mlp.experts." not in name or not name.endswith("_proj.weight"):
            out[name] = values
            continue
        layer, rest = name.split(".mlp.experts.")
        if rest == "0.gate_proj.weight":
            others = [other for other in tensors if other.startswith(f"{layer}.mlp.experts.")]
            n = sum(1 for other in others if other.endswith("down_proj.weight"))
            get = lambda e, part, layer=layer: tensors[f"{layer}.mlp.experts.{e}.{part}_proj.weight"]  # noqa: E731
            gate_up = [np.concatenate([get(e, "gate"), get(e, "up")]) for e in range(n)]
            out[f"{layer}.mlp.experts.gate_up_proj"] = np.stack(gate_up)
            out[f"{layer}.mlp.experts.down_proj"] = np.stack([get(e, "down") for e in range(n)])
    return out


def mistral_tensors(example: Example) -> Tensors:
    """The tensors as a mistral file holds them: rows of q and k interleaved, with whatever has an entry per row."""
    tensors: Tensors = {}
    for name, values in example.tensors.items():
        tower = example.config.vision if name.startswith("vision_encoder.") else None
        head_dim = tower.head_dim if tower else example.config.head_dim
        rotary = ".attention.wq." in name or ".attention.wk." in name
        by_row = values.ndim == 2 and values.shape[0] % head_dim == 0 and not name.endswith("lora_A.weight")
        tensors[name] = interleaved(values, head_dim) if rotary and by_row else values
    return tensors


_DTYPES = {
    "F32": np.float32, "F16": np.float16, "BF16": BF16, "F8_E4M3": FP8, "I8": np.int8, "U8": np.uint8,
}  # fmt: skip


def read_file(path: Path) -> Tensors:
    """The tensors of a safetensors file, by the format's own description: 8 bytes of length, JSON, data."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, info in header.items():
        begin, end = (start + offset for offset in info["data_offsets"])
        tensors[name] = np.frombuffer(raw[begin:end], _DTYPES[info["dtype"]]).reshape(info["shape"])
    return tensors


def write_example(folder: Path, example: Example, layout: Layout, extra_keys: dict[str, Any] | None = None) -> Tensors:
    """Writes the example in `layout`, with `extra_keys` in its config; returns the tensors of the file."""
    folder.mkdir(parents=True)
    tensors = mistral_tensors(example) if layout == "mistral" else hf_tensors(example)
    write = params_from_config if layout == "mistral" else hf_from_config
    document = {**write(example.config), **(extra_keys or {})}
    if layout == "mistral":
        save_file(tensors, folder / "consolidated.safetensors")
        (folder / "params.json").write_text(json.dumps(document))
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(document))
    return tensors
