"""Names of a model's parameters in both published layouts, and which rows differ. Opens no files.

Parameters are called as in the mistral layout (`layers.0.attention.wq.weight`). The HF layout has other names, under
one of several prefixes, and holds the rows of q and k as memory does; mistral files hold them interleaved.

In memory the experts of a layer are one parameter, `layers.0.feed_forward.experts.w1.weight`. Files hold a tensor for
each, here called `layers.0.feed_forward.experts.3.w1.weight`, or all of them in one, with w3 behind w1.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from ..config import ModelConfig
from ..config_files.layout import Layout
from ..quantization import LinearFormat
from .translate import Name, hf_module
from .translate import hf_name as translated

EMBEDDINGS = "tok_embeddings.weight"
HEAD = "output.weight"

# Of a text model, of the text decoder beside a vision tower, and of that in older files.
HF_PREFIXES = ("model.", "model.language_model.", "language_model.model.")
_OLD_PREFIX = HF_PREFIXES[2]
HF_HEADS = ("lm_head.weight", "language_model.lm_head.weight")

_EXPERTS = ".feed_forward.experts."
_EXPERT = re.compile(r"(layers\.[0-9]+)\.feed_forward\.experts\.([0-9]+)\.(w[123])\.weight")
_ROUTER = re.compile(r"(layers\.[0-9]+)\.feed_forward\.gate\.weight")
# Beside latent attention, experts hang under the layer itself.
_UNDER_LAYER = re.compile(r"(?<=\d\.)feed_forward\.(?=gate\.|experts\.|shared_experts\.)")

# What a text model leaves in the file, by prefix; and buffers that are computed, not stored.
_VISION: Mapping[str, re.Pattern[str]] = {
    "vision encoder": re.compile(r"vision_encoder\.|(model\.)?vision_tower\."),
    "vision adapter": re.compile(
        r"(vision_language_adapter|patch_merger|pre_mm_projector_norm|(model\.)?multi_modal_projector)\."
    ),
}
_UNREAD: Mapping[str, re.Pattern[str]] = {
    "fake quantizer": re.compile(r".*fake_quantizer"),
    "rotary buffer": re.compile(r".*\.rotary_emb\.inv_freq$"),
}


@dataclass(frozen=True)
class Entry:
    """Which part of a tensor of all experts, of `shape`, is one expert's: `rows` (first, end) of its `expert`.

    Of lone numbers `rows` say which of an expert's it is, in a tensor of any shape.
    """

    expert: int
    rows: tuple[int, int]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """The tensor that holds a parameter, or has it as an `entry`.

    With `heads`, its rows are interleaved within each of that many heads.
    """

    name: str
    heads: int | None = None
    entry: Entry | None = None


@dataclass(frozen=True)
class ReadPlan:
    """Where each parameter but the output head lies, and what is odd about the tensors that were found.

    `sources` has the parameters of each expert by themselves (see `expert_parts`). `head` is the output head's own
    tensor, if there is one. `missing` tensors are expected and not found, `extra` ones are found and in no model of
    this config, `unread` counts those that a text model leaves alone, by kind. `formats` has the projections that are
    quantised, by their names in memory; their parts are among the sources in place of their weight.
    """

    sources: Mapping[str, Source]
    head: Source | None
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    unread: Mapping[str, int]
    formats: Mapping[str, LinearFormat] = field(default_factory=dict)


def is_vision(name: str) -> bool:
    """Whether a tensor of either layout, or a parameter, belongs to what reads images."""
    return any(pattern.match(name) for pattern in _VISION.values())


def expert_parts(parameter: str, config: ModelConfig) -> list[str]:
    """The parameters of each expert that `parameter` holds, in their order; itself if it is not of experts."""
    stem, found, part = parameter.partition(_EXPERTS)
    n_experts = config.moe.n_experts if config.moe else 0
    return [f"{stem}{_EXPERTS}{expert}.{part}" for expert in range(n_experts)] if found else [parameter]


def whole_module(part: str) -> str:
    """The projection in memory that a module of one expert is a part of; itself if it is not of an expert."""
    return re.sub(r"(?<=\.feed_forward\.experts)\.[0-9]+(?=\.)", "", part)


def mistral_name(parameter: str, config: ModelConfig) -> str:
    """Name in a mistral-layout file of a parameter, of one expert if it is of experts."""
    return _UNDER_LAYER.sub("", parameter) if config.latent else parameter


def file_module(module: str, config: ModelConfig) -> str:
    """Name in a mistral-layout file of a projection, of one expert if it is of experts."""
    return mistral_name(f"{module}.weight", config).removesuffix(".weight")


def hf_name(parameter: str, prefix: str = HF_PREFIXES[0]) -> str:
    """Name in the HF layout of what `mistral_name` gives, but for the output head, which is outside `prefix`."""
    if is_vision(parameter):
        name = translated(Name(*parameter.rsplit(".", 1)), wrapped=True)
        return name.removeprefix("model.") if prefix == _OLD_PREFIX else name
    module, suffix = parameter.rsplit(".", 1)
    return f"{prefix}{hf_module(module)}.{suffix}"


def hf_source(parameter: str, found: Collection[str], config: ModelConfig, prefix: str) -> Source:
    """Where a parameter, of one expert if it is of experts, lies in an HF file with the tensor names `found`."""
    expert, router = _EXPERT.fullmatch(parameter), _ROUTER.fullmatch(parameter)
    plain = hf_name(mistral_name(parameter, config), prefix)
    as_in_memory = f"{prefix}{router[1]}.mlp.gate.weight" if router else ""  # of transformers 5
    if plain not in found and as_in_memory in found:
        return Source(as_in_memory)
    if expert is None or plain in found:
        return Source(plain)
    fused = fused_hf_name(expert[1], expert[3], prefix)
    if fused not in found and config.latent is None:
        return Source(plain)
    return Source(fused, entry=_fused_entry(int(expert[2]), expert[3], config))


def _fused_entry(expert: int, part: str, config: ModelConfig) -> Entry:
    assert config.moe is not None, "experts in a model without"
    dim, hidden, n_experts = config.dim, config.moe.expert_hidden_dim, config.moe.n_experts
    if part == "w2":
        return Entry(expert, (0, dim), (n_experts, dim, hidden))
    return Entry(expert, (0, hidden) if part == "w1" else (hidden, 2 * hidden), (n_experts, 2 * hidden, dim))


def fused_hf_name(layer: str, part: str, prefix: str = HF_PREFIXES[0]) -> str:
    """The tensor of all experts of `layers.0` that has their w1 and w3, [E, 2F, D], or their w2, [E, D, F]."""
    return f"{prefix}{layer}.mlp.experts.{'down_proj' if part == 'w2' else 'gate_up_proj'}"


def rotary_heads(parameter: str, config: ModelConfig) -> int | None:
    """Heads of a parameter whose rows differ between the layouts: queries and keys, unless attention is latent."""
    if config.vision is not None and is_vision(parameter):
        return config.vision.n_heads if parameter.endswith((".attention.wq.weight", ".attention.wk.weight")) else None
    if config.latent is not None:
        return None
    if parameter.endswith(".attention.wq.weight"):
        return config.n_heads
    return config.n_kv_heads if parameter.endswith(".attention.wk.weight") else None


def mistral_source(parameter: str, config: ModelConfig) -> Source:
    """Where a parameter, of one expert if it is of experts, lies in a mistral file."""
    return Source(mistral_name(parameter, config), rotary_heads(parameter, config))


def plan_reading(parameters: Iterable[str], found: Collection[str], config: ModelConfig, layout: Layout) -> ReadPlan:
    """Where each of `parameters` lies among the tensor names `found`."""
    body = [part for name in parameters if name != HEAD for part in expert_parts(name, config)]
    if layout == "mistral":
        sources = {name: mistral_source(name, config) for name in body}
        heads = (HEAD,)
    else:
        by_prefix = [{name: hf_source(name, found, config, prefix) for name in body} for prefix in HF_PREFIXES]
        sources = max(by_prefix, key=lambda candidate: sum(source.name in found for source in candidate.values()))
        heads = HF_HEADS
    head = next((Source(name) for name in heads if name in found), None)
    read = {source.name for source in sources.values()} | ({head.name} if head else set())
    kinds = _UNREAD if any(map(is_vision, body)) else {**_VISION, **_UNREAD}
    groups = {name: _unread_group(name, kinds) for name in found if name not in read}
    return ReadPlan(
        sources,
        head,
        missing=tuple(dict.fromkeys(source.name for source in sources.values() if source.name not in found)),
        extra=tuple(name for name, group in groups.items() if group is None),
        unread=Counter(group for group in groups.values() if group is not None),
    )


def _unread_group(name: str, kinds: Mapping[str, re.Pattern[str]]) -> str | None:
    return next((group for group, pattern in kinds.items() if pattern.match(name)), None)
