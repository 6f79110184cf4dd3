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


# As Large 3 and Small 4: the first layer dense, then experts with a shared one; interleaved rope heads; no scale of
# YaRN's. With `mscale` keys transformers squares mscale into the scores, which the published models do not want.
_LATENT = {"q_lora_rank": 40, "kv_lora_rank": 24, "qk_rope_head_dim": 16, "qk_nope_head_dim": 8, "v_head_dim": 20}
_NATIVE_EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "expert_hidden_dim": 32,
    "num_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scale": 1.5,
}
_EXPERTS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}


def _latent_rope(theta: float, length: int, fast: float, slow: float, beta: float) -> dict[str, Any]:
    block = _yarn(theta, length, fast, slow, beta, apply_scale=False)["rope_parameters"]
    scaled = {"mscale", "mscale_all_dim"}
    kept = {key: value for key, value in block.items() if key not in scaled}
    return {"rope_parameters": kept | {"attention_factor": 1.0}, "pad_token_id": 11}


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
    GoldenModel(
        name="mixtral",
        config_class="MixtralConfig",
        model_class="MixtralForCausalLM",
        native=_sizes(layers=2, heads=4, kv_heads=2)
        | {"rope_theta": 1e6, "moe": {"num_experts": 8, "num_experts_per_tok": 2}},
        arguments=_plain_rope(1e6) | {"sliding_window": None, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    # 80 tokens are two original lengths of YaRN and of the temperature.
    GoldenModel(
        name="mistral4",
        config_class="Mistral4Config",
        model_class="Mistral4ForCausalLM",
        native=_sizes(layers=3, heads=4, kv_heads=4, head_dim=24)
        | _native_yarn(100.0, 32, 3.0, 0.5, 0.4, apply_scale=False)
        | _LATENT
        | {"norm_eps": 1e-6, "moe": _NATIVE_EXPERTS},
        arguments=_latent_rope(100.0, 32, 3.0, 0.5, 0.4) | _LATENT | _EXPERTS,
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
        attention = {"wq": (q, D), "wk": (kv, D), "wv": (kv, D), "wo": (D, q)}
        if "kv_lora_rank" in p:
            attention = _latent_shapes(p)
        layer = {f"attention.{name}": shape for name, shape in attention.items()}
        layer |= {"attention_norm": (D,), "ffn_norm": (D,)}
        moe = p.get("moe")
        layer |= _expert_shapes(p) if moe and n >= moe.get("first_k_dense_replace", 0) else _ffn("feed_forward", F, D)
        shapes |= {f"layers.{n}.{name}.weight": shape for name, shape in layer.items()}
    return shapes if model.tied else shapes | {"output.weight": (p["vocab_size"], D)}


def _ffn(stem: str, F: int, D: int) -> dict[str, tuple[int, ...]]:
    return {f"{stem}.w1": (F, D), f"{stem}.w2": (D, F), f"{stem}.w3": (F, D)}


def _latent_shapes(p: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    D, N, v = p["dim"], p["n_heads"], p["v_head_dim"]
    return {
        "wq_a": (p["q_lora_rank"], D),
        "q_a_norm": (p["q_lora_rank"],),
        "wq_b": (N * (p["qk_nope_head_dim"] + p["qk_rope_head_dim"]), p["q_lora_rank"]),
        "wkv_a_with_mqa": (p["kv_lora_rank"] + p["qk_rope_head_dim"], D),
        "kv_a_norm": (p["kv_lora_rank"],),
        "wkv_b": (N * (p["qk_nope_head_dim"] + v), p["kv_lora_rank"]),
        "wo": (D, N * v),
    }


def _expert_shapes(p: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """A router, experts, and a shared expert; under `feed_forward` in Mixtral, else under the layer itself."""
    D, moe = p["dim"], p["moe"]
    stem, F = "" if "kv_lora_rank" in p else "feed_forward.", moe.get("expert_hidden_dim", p["hidden_dim"])
    shapes: dict[str, tuple[int, ...]] = {f"{stem}gate": (moe["num_experts"], D)}
    for e in range(moe["num_experts"]):
        shapes |= _ffn(f"{stem}experts.{e}", F, D)
    shared = moe.get("num_shared_experts", 0)
    return shapes | (_ffn(f"{stem}shared_experts", F * shared, D) if shared else {})


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
    "attention.wq_a": "self_attn.q_a_proj",
    "attention.q_a_norm": "self_attn.q_a_layernorm",
    "attention.wq_b": "self_attn.q_b_proj",
    "attention.wkv_a_with_mqa": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_a_norm": "self_attn.kv_a_layernorm",
    "attention.wkv_b": "self_attn.kv_b_proj",
    "feed_forward.gate": "block_sparse_moe.gate",
    "gate": "mlp.gate",
    "shared_experts.w1": "mlp.shared_experts.gate_proj",
    "shared_experts.w2": "mlp.shared_experts.down_proj",
    "shared_experts.w3": "mlp.shared_experts.up_proj",
}


def hf_weights(model: GoldenModel) -> dict[str, np.ndarray]:
    """The same weights as transformers writes them: Mixtral's experts one by one, Mistral 4's in one tensor."""
    weights = native_weights(model)
    experts = [name for name in weights if ".experts." in name]
    tensors = {_hf_name(name): _hf_rows(model, name, w) for name, w in weights.items() if name not in experts}
    if "kv_lora_rank" in model.native:
        return tensors | _fused(model, weights)
    return tensors | {f"model.{name.replace('feed_forward', 'block_sparse_moe')}": weights[name] for name in experts}


def memory_weights(model: GoldenModel) -> dict[str, np.ndarray]:
    """The same as transformers holds them in memory, where Mixtral's experts are one tensor too."""
    weights, tensors = native_weights(model), hf_weights(model)
    kept = {n.replace("block_sparse_moe.gate", "mlp.gate"): w for n, w in tensors.items() if ".experts." not in n}
    return kept | (_fused(model, weights) if "moe" in model.native else {})


def _fused(model: GoldenModel, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All experts of a layer in one tensor: [E, w1 then w3, D] and [E, D, F]."""
    tensors, n_experts = {}, model.native["moe"]["num_experts"]
    for stem in sorted({name.split("experts.")[0] for name in weights if ".experts.0." in name}):
        of = lambda e, part, stem=stem: weights[f"{stem}experts.{e}.{part}.weight"]  # noqa: E731
        layer = f"model.{stem.removesuffix('feed_forward.')}mlp.experts"
        tensors[f"{layer}.gate_up_proj"] = np.stack(
            [np.concatenate([of(e, "w1"), of(e, "w3")]) for e in range(n_experts)]
        )
        tensors[f"{layer}.down_proj"] = np.stack([of(e, "w2") for e in range(n_experts)])
    return tensors


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
