"""The tiny models of the golden values: configs spelled for params.json and for transformers, and drawn weights.

Needs numpy alone: whoever compares with the golden values draws the same weights again, and only results are stored.
Names, shapes and row orders of both layouts are written out here once more: nothing of the project checks itself.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

WEIGHT_STD, NORM_STD = 0.3, 0.1  # wide: transformers' own 0.02 gives flat logits, which hide errors
VOCAB = 96
MAX_LENGTH = 512


@dataclass(frozen=True, kw_only=True)
class GoldenModel:
    """One tiny model. `native` is params.json, `arguments` what the transformers config takes beyond the sizes."""

    name: str
    config_class: str
    model_class: str
    native: dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def tied(self) -> bool:
        return self.native.get("tied_embeddings", False)

    def transformers_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the transformers config class."""
        sizes = {
            "hidden_size": self.native["dim"],
            "num_hidden_layers": self.native["n_layers"],
            "head_dim": self.native["head_dim"],
            "intermediate_size": self.native["hidden_dim"],
            "num_attention_heads": self.native["n_heads"],
            "num_key_value_heads": self.native["n_kv_heads"],
            "rms_norm_eps": self.native["norm_eps"],
            "vocab_size": self.native["vocab_size"],
            "max_position_embeddings": self.native["max_position_embeddings"],
            "tie_word_embeddings": self.tied,
        }
        return sizes | self.arguments


def _sizes(*, layers: int, heads: int, kv_heads: int, head_dim: int = 16) -> dict[str, Any]:
    return {
        "dim": 64,
        "n_layers": layers,
        "head_dim": head_dim,
        "hidden_dim": 80,
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "norm_eps": 1e-5,
        "vocab_size": VOCAB,
        "max_position_embeddings": MAX_LENGTH,
    }


def _plain_rope(theta: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def _yarn(theta: float, length: int, fast: float, slow: float, beta: float, *, apply_scale: bool) -> dict[str, Any]:
    return {
        "rope_parameters": {
            "rope_type": "yarn",
            "type": "yarn",
            "rope_theta": theta,
            "factor": 16.0,
            "original_max_position_embeddings": length,
            "beta_fast": fast,
            "beta_slow": slow,
            "mscale": 1.0,
            "mscale_all_dim": 0.0 if apply_scale else 1.0,
            "llama_4_scaling_beta": beta,
        },
        "pad_token_id": 11,
    }


def _native_yarn(
    theta: float, length: int, fast: float, slow: float, beta: float, *, apply_scale: bool
) -> dict[str, Any]:
    return {
        "rope_theta": theta,
        "yarn": {
            "factor": 16.0,
            "original_max_position_embeddings": length,
            "beta": fast,
            "alpha": slow,
            "apply_scale": apply_scale,
        },
        "llama_4_scaling": {"original_max_position_embeddings": length, "beta": beta},
    }


MODELS = (
    GoldenModel(
        name="mistral",
        config_class="MistralConfig",
        model_class="MistralForCausalLM",
        native=_sizes(layers=3, heads=4, kv_heads=2) | {"rope_theta": 1e6},
        arguments=_plain_rope(1e6) | {"sliding_window": None},
    ),
    # As 7B v0.1: params.json has a window and no theta, which then is 1e4. Heads times head_dim is 96, not 64.
    GoldenModel(
        name="mistral_window",
        config_class="MistralConfig",
        model_class="MistralForCausalLM",
        native=_sizes(layers=3, heads=6, kv_heads=2) | {"sliding_window": 7},
        arguments=_plain_rope(1e4) | {"sliding_window": 7},
    ),
    # As Ministral 8B: the list of params.json repeats over the layers.
    GoldenModel(
        name="ministral",
        config_class="MinistralConfig",
        model_class="MinistralForCausalLM",
        native=_sizes(layers=8, heads=4, kv_heads=1) | {"rope_theta": 1e8, "sliding_window": [None, 8, 8, 8]},
        arguments=_plain_rope(1e8)
        | {"sliding_window": 8, "layer_types": ["full_attention", *["sliding_attention"] * 3] * 2},
    ),
    # As Ministral 3 3B: tied, YaRN's scale not applied. The betas put the ramp over 8 of 16 pairs.
    GoldenModel(
        name="ministral3_tied",
        config_class="Ministral3Config",
        model_class="Ministral3ForCausalLM",
        native=_sizes(layers=3, heads=4, kv_heads=2, head_dim=32)
        | _native_yarn(100.0, 32, 3.0, 0.5, 0.1, apply_scale=False)
        | {"tied_embeddings": True},
        arguments=_yarn(100.0, 32, 3.0, 0.5, 0.1, apply_scale=False),
    ),
    # As Ministral 3 8B, with the published betas; a larger temperature, four original lengths long.
    GoldenModel(
        name="ministral3",
        config_class="Ministral3Config",
        model_class="Ministral3ForCausalLM",
        native=_sizes(layers=3, heads=4, kv_heads=4) | _native_yarn(1e6, 20, 32.0, 1.0, 0.4, apply_scale=False),
        arguments=_yarn(1e6, 20, 32.0, 1.0, 0.4, apply_scale=False),
    ),
    # As Devstral 2: YaRN's scale applied to cosine and sine, no temperature.
    GoldenModel(
        name="yarn_scaled",
        config_class="Ministral3Config",
        model_class="Ministral3ForCausalLM",
        native=_sizes(layers=2, heads=8, kv_heads=2, head_dim=32)
        | _native_yarn(100.0, 32, 4.0, 1.0, 0.0, apply_scale=True),
        arguments=_yarn(100.0, 32, 4.0, 1.0, 0.0, apply_scale=True),
    ),
)


def by_name(name: str) -> GoldenModel:
    return next(model for model in MODELS if model.name == name)


def native_shapes(model: GoldenModel) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the mistral layout; no `output.weight` where embeddings are tied."""
    p = model.native
    D, F, q, kv = p["dim"], p["hidden_dim"], p["n_heads"] * p["head_dim"], p["n_kv_heads"] * p["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (p["vocab_size"], D), "norm.weight": (D,)}
    for n in range(p["n_layers"]):
        shapes |= {
            f"layers.{n}.attention.wq.weight": (q, D),
            f"layers.{n}.attention.wk.weight": (kv, D),
            f"layers.{n}.attention.wv.weight": (kv, D),
            f"layers.{n}.attention.wo.weight": (D, q),
            f"layers.{n}.attention_norm.weight": (D,),
            f"layers.{n}.ffn_norm.weight": (D,),
            f"layers.{n}.feed_forward.w1.weight": (F, D),
            f"layers.{n}.feed_forward.w2.weight": (D, F),
            f"layers.{n}.feed_forward.w3.weight": (F, D),
        }
    return shapes if model.tied else shapes | {"output.weight": (p["vocab_size"], D)}


def native_weights(model: GoldenModel) -> dict[str, np.ndarray]:
    """Float32 weights in mistral order, each drawn from its own stream: N(0, 0.3^2), norms 1 + N(0, 0.1^2)."""

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng(zlib.crc32(f"{model.name}/{name}".encode()))
        values = rng.standard_normal(shape)
        return (1.0 + NORM_STD * values if len(shape) == 1 else WEIGHT_STD * values).astype(np.float32)

    return {name: draw(name, shape) for name, shape in native_shapes(model).items()}


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
}


def hf_weights(model: GoldenModel) -> dict[str, np.ndarray]:
    """The same weights as transformers names and orders them."""
    return {_hf_name(name): _hf_rows(model, name, w) for name, w in native_weights(model).items()}


def _hf_name(name: str) -> str:
    fixed = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    stem = name.removesuffix(".weight")
    if stem in fixed:
        return f"{fixed[stem]}.weight"
    _, layer, part = stem.split(".", 2)
    return f"model.layers.{layer}.{_HF_NAMES[part]}.weight"


def _hf_rows(model: GoldenModel, name: str, weight: np.ndarray) -> np.ndarray:
    """Rows of wq and wk regrouped per head: HF row `c * H/2 + j` is native row `2j + c`."""
    if not name.endswith(("wq.weight", "wk.weight")):
        return weight
    H = model.native["head_dim"]
    order = [head + 2 * j + c for head in range(0, len(weight), H) for c in (0, 1) for j in range(H // 2)]
    return weight[order]


def token_ids(model: GoldenModel) -> np.ndarray:
    """Two sequences of token ids, int32 [2, 80]."""
    rng = np.random.default_rng(zlib.crc32(f"{model.name}/tokens".encode()))
    return rng.integers(0, VOCAB, (2, 80), dtype=np.int32)
