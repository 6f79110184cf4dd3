"""Names of a model's parameters in both published layouts, and which rows differ. Opens no files.

Parameters are called as in the mistral layout (`layers.0.attention.wq.weight`). The HF layout has other names, under
one of several prefixes, and holds the rows of q and k as memory does; mistral files hold them interleaved.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from ..config import ModelConfig
from ..config_files.layout import Layout
from ..quantization import LinearFormat
from .translate import HF_PARTS

EMBEDDINGS = "tok_embeddings.weight"
HEAD = "output.weight"

HF_PREFIXES = ("model.", "model.language_model.", "language_model.model.")
HF_HEADS = ("lm_head.weight", "language_model.lm_head.weight")

# What a text model leaves in the file: whole towers by prefix, and buffers that are computed, not stored.
_UNREAD: Mapping[str, re.Pattern[str]] = {
    "vision encoder": re.compile(r"vision_encoder\.|(model\.)?vision_tower\."),
    "vision adapter": re.compile(
        r"(vision_language_adapter|patch_merger|pre_mm_projector_norm|(model\.)?multi_modal_projector)\."
    ),
    "fake quantizer": re.compile(r".*fake_quantizer"),
    "rotary buffer": re.compile(r".*\.rotary_emb\.inv_freq$"),
}


@dataclass(frozen=True)
class Source:
    """The tensor that holds a parameter. With `heads`, its rows are interleaved within each of that many heads."""

    name: str
    heads: int | None = None


@dataclass(frozen=True)
class ReadPlan:
    """Where each parameter but the output head lies, and what is odd about the tensors that were found.

    `head` is the output head's own tensor, if there is one. `missing` tensors are expected and not found, `extra` ones
    are found and in no model of this config, `unread` counts those that a text model leaves alone, by kind. `formats`
    has the projections that are quantised, whose parts are among the sources in place of their weight.
    """

    sources: Mapping[str, Source]
    head: Source | None
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    unread: Mapping[str, int]
    formats: Mapping[str, LinearFormat] = field(default_factory=dict)


def hf_name(parameter: str, prefix: str = HF_PREFIXES[0]) -> str:
    """Name in the HF layout of anything but the output head, which is outside `prefix`."""
    layer, rest = re.fullmatch(r"(layers\.\d+\.)?(.*)", parameter).groups(default="")  # type: ignore[union-attr]
    part, suffix = rest.rsplit(".", 1)
    return f"{prefix}{layer}{HF_PARTS[part]}.{suffix}"


def rotary_heads(parameter: str, config: ModelConfig) -> int | None:
    """Heads of a parameter whose rows differ between the layouts: queries and keys, unless attention is latent."""
    if config.latent is not None:
        return None
    if parameter.endswith(".attention.wq.weight"):
        return config.n_heads
    return config.n_kv_heads if parameter.endswith(".attention.wk.weight") else None


def mistral_source(parameter: str, config: ModelConfig) -> Source:
    return Source(parameter, rotary_heads(parameter, config))


def plan_reading(parameters: Iterable[str], found: Collection[str], config: ModelConfig, layout: Layout) -> ReadPlan:
    """Where each of `parameters` lies among the tensor names `found`."""
    body = [name for name in parameters if name != HEAD]
    if layout == "mistral":
        sources = {name: mistral_source(name, config) for name in body}
        heads = (HEAD,)
    else:
        prefix = max(HF_PREFIXES, key=lambda candidate: sum(hf_name(name, candidate) in found for name in body))
        sources = {name: Source(hf_name(name, prefix)) for name in body}
        heads = HF_HEADS
    head = next((Source(name) for name in heads if name in found), None)
    read = {source.name for source in sources.values()} | ({head.name} if head else set())
    groups = {name: _unread_group(name) for name in found if name not in read}
    return ReadPlan(
        sources,
        head,
        missing=tuple(source.name for source in sources.values() if source.name not in found),
        extra=tuple(name for name, group in groups.items() if group is None),
        unread=Counter(group for group in groups.values() if group is not None),
    )


def _unread_group(name: str) -> str | None:
    return next((group for group, pattern in _UNREAD.items() if pattern.match(name)), None)
