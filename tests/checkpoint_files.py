"""Tiny checkpoints of several architectures, in either layout, for tests: configs, wide random weights, and the files.

The files are written by the safetensors library and by formulas of their own, so that they can judge our reader.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import numpy as np
from safetensors.numpy import save_file

from ministral_jax.config import ModelConfig, RopeConfig, TemperatureConfig, YarnConfig
from ministral_jax.config_files import Layout, write_config_json, write_params_json
from ministral_jax.parameters import parameter_specs
from ministral_jax.transformer import Transformer

Kind = Literal["mistral", "mistral_window", "ministral", "ministral3", "ministral3_tied", "wide_heads"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Wide enough that a mistake anywhere shows in the logits.
WEIGHT_STD, NORM_STD = 0.3, 0.1


def tiny_config(kind: Kind = "mistral", **changes: object) -> ModelConfig:
    """A decoder of a few thousand parameters. `wide_heads` has heads x head_dim != dim; windows are 5 tokens."""
    fields: dict[str, object] = {
        "dim": 64,
        "n_layers": 3,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 16,
        "hidden_dim": 96,
        "vocab_size": 128,
        "norm_eps": 1e-5,
        "rope": RopeConfig(theta=1e4),
        "windows": (None, None, None),
        "max_length": 256,
    }
    if kind == "mistral_window":
        fields |= {"windows": (5, 5, 5)}
    if kind == "ministral":
        fields |= {"n_layers": 4, "windows": (None, 5, 5, 5), "rope": RopeConfig(theta=1e8)}
    if kind.startswith("ministral3"):
        fields |= {
            "rope": RopeConfig(theta=1e6, yarn=YarnConfig(factor=16.0, original_length=8)),
            "temperature": TemperatureConfig(beta=0.1, original_length=8),
            "tied_embeddings": kind == "ministral3_tied",
        }
    if kind == "wide_heads":
        fields |= {"head_dim": 24, "n_heads": 6, "n_kv_heads": 3}
    if "n_layers" in changes and "windows" not in changes:
        pattern = fields["windows"]
        changes["windows"] = tuple(pattern[i % len(pattern)] for i in range(changes["n_layers"]))  # type: ignore[index,arg-type,call-overload]
    return ModelConfig(**(fields | changes))  # type: ignore[arg-type]


def random_weights(config: ModelConfig, seed: int = 0, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Parameter name -> values in memory order: normal, norms around one."""
    generator = np.random.default_rng(seed)
    weights = {}
    for name, spec in parameter_specs(Transformer(config)).items():
        values = generator.standard_normal(spec.shape).astype(np.float32)
        values = 1 + NORM_STD * values if spec.init == "ones" else WEIGHT_STD * values
        weights[name] = values.astype(np.dtype(dtype))
    return weights


def interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of q or k as mistral files have them, index by index: `HF[h*d + c*d/2 + j] = mistral[h*d + 2j + c]`."""
    out = np.empty_like(rows)
    for row in range(len(rows)):
        head, place = divmod(row, head_dim)
        component, pair = divmod(place, head_dim // 2)
        out[head * head_dim + 2 * pair + component] = rows[row]
    return out


_HF_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "tok_embeddings": "embed_tokens",
}


def layout_tensors(
    weights: dict[str, np.ndarray], config: ModelConfig, layout: Layout, prefix: str = "model."
) -> dict[str, np.ndarray]:
    """The tensors of a file in `layout` that holds `weights`; `prefix` is where an HF file keeps its decoder."""
    tensors = {}
    for name, values in weights.items():
        if layout == "mistral":
            rotary = name.endswith(("wq.weight", "wk.weight"))
            tensors[name] = interleaved(values, config.head_dim) if rotary else values
        elif name == "output.weight":
            tensors["language_model.lm_head.weight" if prefix.startswith("language") else "lm_head.weight"] = values
        else:
            stem = name
            for ours, theirs in _HF_NAMES.items():
                stem = stem.replace(f"{ours}.", f"{theirs}.")
            tensors[prefix + stem] = values
    return tensors


def write_tiny_checkpoint(
    directory: Path, config: ModelConfig, layout: Layout = "mistral", seed: int = 0, dtype: str = "float32"
) -> dict[str, np.ndarray]:
    """Writes config and weights of a random model into `directory`; returns the weights in memory order."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = random_weights(config, seed, dtype)
    tensors = layout_tensors(weights, config, layout)
    if layout == "mistral":
        save_file(tensors, directory / "consolidated.safetensors")
        write_params_json(config, directory / "params.json")
    else:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        write_config_json(config, directory / "config.json")
    return weights
