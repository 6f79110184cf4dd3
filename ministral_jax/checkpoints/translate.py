"""Names of tensors of every published architecture, from one layout to the other. Opens no files, moves no rows.

Canonical names are the mistral layout's: a module (`layers.0.attention.wq`) and a leaf (`weight`, `qscale_weight`,
`lora_B.weight`). Text decoders, dense and with experts, latent attention, the vision tower and its projector.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# A dense decoder's modules, those of a layer without its number.
HF_PARTS = {
    "tok_embeddings": "embed_tokens",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "norm": "norm",
}
_MOE_PARTS = {
    "feed_forward.gate": "block_sparse_moe.gate",
    "feed_forward.experts.#.w1": "block_sparse_moe.experts.#.w1",
    "feed_forward.experts.#.w2": "block_sparse_moe.experts.#.w2",
    "feed_forward.experts.#.w3": "block_sparse_moe.experts.#.w3",
    "gate": "mlp.gate",
    "experts.#.w1": "mlp.experts.#.gate_proj",
    "experts.#.w2": "mlp.experts.#.down_proj",
    "experts.#.w3": "mlp.experts.#.up_proj",
    "shared_experts.w1": "mlp.shared_experts.gate_proj",
    "shared_experts.w2": "mlp.shared_experts.down_proj",
    "shared_experts.w3": "mlp.shared_experts.up_proj",
}
_LATENT_PARTS = {
    "attention.wq_a": "self_attn.q_a_proj",
    "attention.q_a_norm": "self_attn.q_a_layernorm",
    "attention.wq_b": "self_attn.q_b_proj",
    "attention.wkv_a_with_mqa": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_a_norm": "self_attn.kv_a_layernorm",
    "attention.wkv_b": "self_attn.kv_b_proj",
}
_OUTSIDE_LAYERS = ("tok_embeddings", "norm")
_LAYER = {ours: theirs for ours, theirs in HF_PARTS.items() if ours not in _OUTSIDE_LAYERS}
_LAYER |= _MOE_PARTS | _LATENT_PARTS
_TEXT = {f"layers.#.{ours}": f"layers.#.{theirs}" for ours, theirs in _LAYER.items()}
_TEXT |= {name: HF_PARTS[name] for name in _OUTSIDE_LAYERS}

_TOWER_LAYER = {
    "attention.wq": "attention.q_proj",
    "attention.wk": "attention.k_proj",
    "attention.wv": "attention.v_proj",
    "attention.wo": "attention.o_proj",
    "attention_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "feed_forward.gate_proj",
    "feed_forward.w2": "feed_forward.down_proj",
    "feed_forward.w3": "feed_forward.up_proj",
}
_VISION = {f"vision_encoder.{name}": f"vision_tower.{name}" for name in ("patch_conv", "ln_pre")}
_VISION |= {
    f"vision_encoder.transformer.layers.#.{ours}": f"vision_tower.transformer.layers.#.{theirs}"
    for ours, theirs in _TOWER_LAYER.items()
}
_VISION |= {
    "pre_mm_projector_norm": "multi_modal_projector.norm",
    "patch_merger.merging_layer": "multi_modal_projector.patch_merger.merging_layer",
    "vision_language_adapter.w_in": "multi_modal_projector.linear_1",
    "vision_language_adapter.w_out": "multi_modal_projector.linear_2",
}

_MISTRAL = {**_TEXT, **_VISION, "output": "lm_head"}

# Leaves spelled differently; all others have one name in both layouts.
_HF_LEAVES = {"qscale_weight": "weight_scale_inv", "qscale_act": "activation_scale"}
_OUR_LEAVES = {theirs: ours for ours, theirs in _HF_LEAVES.items()}
_LEAVES = {
    *("weight", "bias", "lora_A.weight", "lora_B.weight"),
    *_HF_LEAVES,  # FP8 as Mistral publishes it
    *("weight_scale", "input_scale", "weight_zero_point", "weight_shape"),  # compressed-tensors
    *("weight_packed", "weight_global_scale", "input_global_scale"),  # NVFP4
    *("weight_absmax", "weight_absmax_scale", "weight_absmax_offset"),  # NF4, our own
}

_OURS_OF_TEXT = {theirs: ours for ours, theirs in _TEXT.items()}
_OURS_OF_VISION = {theirs: ours for ours, theirs in _VISION.items()}
_TEXT_PREFIX = re.compile(r"(model\.language_model\.|language_model\.model\.|model\.)(?=embed_tokens|layers|norm)")
_VISION_PREFIX = re.compile(r"(model\.)?(?=vision_tower|multi_modal_projector)")
_HEAD_PREFIX = re.compile(r"(language_model\.|model\.)?lm_head\.")
# What hangs on a parameter of all experts, and the leaf that it is of a single one.
FUSED_LEAVES = {"": "weight", "_scale_inv": "qscale_weight", "_activation_scale": "qscale_act"}
_FUSED = re.compile(rf"(layers\.[0-9]+)\.mlp\.experts\.(gate_up_proj|down_proj)({'|'.join(FUSED_LEAVES)})")
# At most as many digits as a layer or an expert can have; a number with a leading zero is another name.
_NUMBER = re.compile(r"(?<=\.)(0|[1-9][0-9]{0,5})(?=\.|$)")

# No name of any layout is half as long; a hostile one of megabytes would be searched over and over.
MAX_NAME_CHARACTERS = 256

_DROPPED = {
    "rotary buffer": re.compile(r".*\.rotary_emb\.inv_freq"),
    "fake quantizer": re.compile(r".*fake_quantizer.*"),
}


@dataclass(frozen=True)
class Name:
    """A canonical name in its parts."""

    module: str
    leaf: str

    def __str__(self) -> str:
        return f"{self.module}.{self.leaf}"

    @property
    def is_expert_of_fused(self) -> bool:
        """Whether transformers keeps this in one tensor with those of all other experts (Mistral 4)."""
        expert = re.fullmatch(r"layers\.[0-9]+\.experts\.[0-9]+\.w[123]", self.module)
        return self.leaf in FUSED_LEAVES.values() and expert is not None


def dropped_kind(name: str) -> str | None:
    """What kind of tensor `name` is, if it is one that no conversion carries: computed buffers, cache quantizers."""
    if len(name) > MAX_NAME_CHARACTERS:
        return None
    return next((kind for kind, pattern in _DROPPED.items() if pattern.fullmatch(name)), None)


def parse_mistral(name: str) -> Name | None:
    """A name of the mistral layout, or None for any other."""
    found = _split(name, _MISTRAL, same=True)
    return None if found and found.leaf in _OUR_LEAVES else found


def parse_hf(name: str) -> Name | None:
    """A name of the HF layout under any of its prefixes; None for others and for fused experts."""
    head = _HEAD_PREFIX.match(name)
    if head:
        found = _split(f"output.{name[head.end() :]}", {"output": ""}, same=True)
    elif prefix := _TEXT_PREFIX.match(name):
        found = _split(name[prefix.end() :], _OURS_OF_TEXT)
    elif prefix := _VISION_PREFIX.match(name):
        found = _split(name[prefix.end() :], _OURS_OF_VISION)
    else:
        return None
    return Name(found.module, _OUR_LEAVES.get(found.leaf, found.leaf)) if found else None


def parse_fused(name: str) -> tuple[str, tuple[str, ...], str] | None:
    """Layer, parts in their order, and leaf of what a fused tensor of all experts holds; None for other names."""
    prefix = _TEXT_PREFIX.match(name)
    found = prefix and len(name) <= MAX_NAME_CHARACTERS and _FUSED.fullmatch(name[prefix.end() :])
    if not found:
        return None
    return found[1], ("w1", "w3") if found[2] == "gate_up_proj" else ("w2",), FUSED_LEAVES[found[3]]


def hf_name(name: Name, *, wrapped: bool) -> str:
    """The name in the HF layout; `wrapped` is the spelling of models with a vision tower."""
    leaf = _HF_LEAVES.get(name.leaf, name.leaf)
    if name.module == "output":
        return f"lm_head.{leaf}"
    template, numbers = _template(name.module)
    if template in _VISION:
        return f"model.{_filled(_VISION[template], numbers)}.{leaf}"
    return f"{'model.language_model.' if wrapped else 'model.'}{_filled(_TEXT[template], numbers)}.{leaf}"


def hf_module(module: str) -> str:
    """The name in the HF layout of a module of the text decoder, without any prefix. Raises KeyError for others."""
    template, numbers = _template(module)
    return _filled(_TEXT[template], numbers)


def fused_hf_name(name: Name, *, wrapped: bool) -> str:
    """The tensor of all experts that holds the weight, or a scale, of one."""
    layer, part = name.module.split(".experts.")[0], name.module.rsplit(".", 1)[1]
    whole = "down_proj" if part == "w2" else "gate_up_proj"
    suffix = next(suffix for suffix, leaf in FUSED_LEAVES.items() if leaf == name.leaf)
    return f"{'model.language_model.' if wrapped else 'model.'}{layer}.mlp.experts.{whole}{suffix}"


def layer_of(module: str) -> int | None:
    """The number of the text layer a module is in."""
    found = re.match(r"layers\.([0-9]+)\.", module)
    return int(found[1]) if found else None


def _split(name: str, table: dict[str, str], *, same: bool = False) -> Name | None:
    """`name` as a module of `table` and a leaf; the module in the table's words, or its own if they are the `same`."""
    if "#" in name or len(name) > MAX_NAME_CHARACTERS:  # the first stands for numbers in the tables
        return None
    at = len(name)
    while (at := name.rfind(".", 0, at)) > 0:
        template, numbers = _template(name[:at])
        if template in table:
            leaf = name[at + 1 :]
            module = template if same else table[template]
            return Name(_filled(module, numbers), leaf) if leaf in _LEAVES or leaf in _OUR_LEAVES else None
    return None


def _template(module: str) -> tuple[str, list[str]]:
    return _NUMBER.sub("#", module), _NUMBER.findall(module)


def _filled(template: str, numbers: list[str]) -> str:
    parts = iter(numbers)
    return re.sub("#", lambda _: next(parts), template)
