"""What a model takes: parameters by part, bytes of its weights in each format, bytes of its cache. Makes no arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from pallas_kernels.dispatch import target

from .cache import entry_numbers, pages_held
from .config import LatentAttentionConfig, ModelConfig, MoEConfig, VisionConfig, Window
from .errors import RequestError
from .quantization.formats import DENSE_LATENT

_BYTES_PER_SCALE = 4
_BLOCK = 128
_NVFP4_GROUP = 16
_NF4_BLOCK = 64
_FOUR_BITS = ("nvfp4", "nf4")

# Formats that a weight file may have, in the order a table shows them.
QUANTIZED_FORMATS = ("int8_channel", "fp8_tensor", "fp8_channel", "fp8_block", "nvfp4", "nf4")
WEIGHT_FORMATS = ("float32", "bfloat16", *QUANTIZED_FORMATS)


@dataclass(frozen=True)
class _Matrices:
    """`count` matrices [rows, columns] of one `part` of the decoder, of which a token passes `active`.

    `compact` are the quantised formats in which they are stored so; in the others they stay as they are.
    """

    part: str
    count: int
    rows: int
    columns: int
    active: int
    compact: tuple[str, ...] = QUANTIZED_FORMATS

    def n_bytes(self, weight_format: str) -> int:
        numbers = self.rows * self.columns
        if weight_format == "float32":
            return self.count * 4 * numbers
        if weight_format not in self.compact:
            return self.count * 2 * numbers
        return self.count * (self._payload(weight_format) + self._scales(weight_format))

    def _payload(self, weight_format: str) -> int:
        return self.rows * _ceil_div(self.columns, 2 if weight_format in _FOUR_BITS else 1)

    def _scales(self, weight_format: str) -> int:
        if weight_format == "nvfp4":  # one byte for each group, one float32 for all
            return self.rows * _ceil_div(self.columns, _NVFP4_GROUP) + _BYTES_PER_SCALE
        scales = {
            "fp8_tensor": 1,
            "int8_channel": self.rows,
            "fp8_channel": self.rows,
            "nf4": self.rows * _ceil_div(self.columns, _NF4_BLOCK),
            "fp8_block": _ceil_div(self.rows, _BLOCK) * _ceil_div(self.columns, _BLOCK),
        }
        return _BYTES_PER_SCALE * scales[weight_format]


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters by part. `active` is what one token of text passes: of the experts, the chosen and the shared ones."""

    embeddings: int
    attention: int
    feed_forward: int
    experts: int
    norms: int
    output: int
    vision: int
    projector: int
    active: int

    @property
    def text(self) -> int:
        """The text decoder, embeddings and output head included; a tied head counts once."""
        parts = (self.embeddings, self.attention, self.feed_forward, self.experts, self.norms, self.output)
        return sum(parts)

    @property
    def total(self) -> int:
        return self.text + self.vision + self.projector


@dataclass(frozen=True, kw_only=True)
class GroupMemory:
    """What the layers of one window keep: `pages` in each layer's pool, for `tokens` positions of every sequence."""

    window: Window
    layers: tuple[int, ...]
    tokens: int
    pages: int
    n_bytes: int


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of a model at work on `batch` sequences of up to `length` tokens that grow by up to `chunk` tokens a call.

    `weight_bytes` is by format: all numbers in float32 or bfloat16, or the projections of the text decoder quantised,
    with their scales, and the rest in bfloat16. Activations are not counted.
    """

    parameters: ParameterCount
    weight_bytes: dict[str, int]
    batch: int
    length: int
    chunk: int
    page_size: int
    cache_dtype: str
    groups: tuple[GroupMemory, ...]
    full_cache_bytes: int

    @property
    def cache_bytes(self) -> int:
        """Of all groups; `full_cache_bytes` is what it would be if no layer had a window."""
        return sum(group.n_bytes for group in self.groups)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values, totals included."""
        totals = {"text": self.parameters.text, "total": self.parameters.total}
        document = dataclasses.asdict(self)
        document["parameters"] |= totals
        return document | {"cache_bytes": self.cache_bytes}


def plan_memory(
    config: ModelConfig,
    *,
    length: int | None = None,
    batch: int = 1,
    chunk: int = 512,
    page_size: int = 64,
    cache_dtype: str = "bfloat16",
    platform: str | None = None,
) -> MemoryPlan:
    """The memory of `config` for a batch and a context, by default the longest that it was published for.

    A windowed group keeps min(length, window + chunk) tokens rounded up to pages, as `cache.plan_cache` allocates it; a
    latent-attention layer keeps its latent and the rotated part of one key, on a TPU filled up. `platform` is that of
    the devices, by default jax's. Raises RequestError for a size that is not
    positive.
    """
    length = config.max_length if length is None else length
    for name, value in (("length", length), ("batch", batch), ("chunk", chunk), ("page_size", page_size)):
        if value < 1:
            raise RequestError(f"{name}={value}: expected a positive number")
    token_bytes = entry_numbers(config, platform or target().platform) * jnp.dtype(cache_dtype).itemsize

    def group(window: Window, layers: tuple[int, ...]) -> GroupMemory:
        held = pages_held(length, window, chunk, page_size)
        pages = batch * held + 1  # with the null page
        n_bytes = pages * page_size * token_bytes * len(layers)
        return GroupMemory(window=window, layers=layers, tokens=held * page_size, pages=pages, n_bytes=n_bytes)

    return MemoryPlan(
        parameters=count_parameters(config),
        weight_bytes={name: weight_bytes(config, name) for name in WEIGHT_FORMATS},
        batch=batch,
        length=length,
        chunk=chunk,
        page_size=page_size,
        cache_dtype=cache_dtype,
        groups=tuple(group(window, layers) for window, layers in config.window_groups),
        full_cache_bytes=group(None, tuple(range(config.n_layers))).n_bytes,
    )


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Parameters of every part, from the shapes of the published checkpoints."""
    matrices = list(_matrices(config))

    def of(part: str) -> int:
        return sum(m.count * m.rows * m.columns for m in matrices if m.part == part)

    embeddings, norms = config.vocab_size * config.dim, _norms(config)
    output = 0 if config.tied_embeddings else embeddings
    active = sum(m.active * m.rows * m.columns for m in matrices)
    return ParameterCount(
        embeddings=embeddings,
        attention=of("attention"),
        feed_forward=of("feed_forward"),
        experts=of("experts"),
        norms=norms,
        output=output,
        vision=_vision_tower(config.vision) if config.vision else 0,
        projector=_projector(config.vision, config.dim) if config.vision else 0,
        active=embeddings + active + norms + output,
    )


def weight_bytes(config: ModelConfig, weight_format: str) -> int:
    """Bytes of all weights in one of WEIGHT_FORMATS; scales are counted as float32."""
    matrices = list(_matrices(config))
    in_matrices = sum(m.count * m.rows * m.columns for m in matrices)
    rest = count_parameters(config).total - in_matrices
    bytes_of_rest = rest * (4 if weight_format == "float32" else 2)
    return bytes_of_rest + sum(m.n_bytes(weight_format) for m in matrices)


def _matrices(config: ModelConfig) -> Iterator[_Matrices]:
    """The projections of the text decoder: everything but embeddings, norms and output head."""
    yield from _latent_attention(config, config.latent) if config.latent else _attention(config)
    n_dense = config.moe.first_dense_layers if config.moe else config.n_layers
    yield from _feed_forward("feed_forward", config.dim, config.hidden_dim, n_dense, n_dense)
    if config.moe:
        yield from _experts(config.moe, config.dim, config.n_layers - n_dense)


def _attention(config: ModelConfig) -> Iterator[_Matrices]:
    n = config.n_layers
    for rows, columns in (
        (config.n_heads * config.head_dim, config.dim),
        (config.n_kv_heads * config.head_dim, config.dim),
        (config.n_kv_heads * config.head_dim, config.dim),
        (config.dim, config.n_heads * config.head_dim),
    ):
        yield _Matrices("attention", n, rows, columns, n)


def _latent_attention(config: ModelConfig, latent: LatentAttentionConfig) -> Iterator[_Matrices]:
    n = config.n_layers
    shapes = {
        "wq_a": (latent.q_rank, config.dim),
        "wq_b": (config.n_heads * config.head_dim, latent.q_rank),
        "wkv_a_with_mqa": (latent.kv_rank + latent.rope_head_dim, config.dim),
        "wkv_b": (config.n_heads * (latent.nope_head_dim + latent.v_head_dim), latent.kv_rank),
        "wo": (config.dim, config.n_heads * latent.v_head_dim),
    }
    for name, (rows, columns) in shapes.items():
        compact = tuple(kind for kind, dense in DENSE_LATENT.items() if name not in dense)
        yield _Matrices("attention", n, rows, columns, n, compact)


def _feed_forward(part: str, dim: int, hidden_dim: int, count: int, active: int) -> Iterator[_Matrices]:
    yield _Matrices(part, 2 * count, hidden_dim, dim, 2 * active)
    yield _Matrices(part, count, dim, hidden_dim, active)


def _experts(moe: MoEConfig, dim: int, n_layers: int) -> Iterator[_Matrices]:
    yield _Matrices("experts", n_layers, moe.n_experts, dim, n_layers, compact=())  # the router
    chosen, all_of_them = n_layers * moe.experts_per_token, n_layers * moe.n_experts
    yield from _feed_forward("experts", dim, moe.expert_hidden_dim, all_of_them, chosen)
    if moe.n_shared_experts:  # one feed-forward, as wide as all shared experts together
        yield from _feed_forward("experts", dim, moe.n_shared_experts * moe.expert_hidden_dim, n_layers, n_layers)


def _norms(config: ModelConfig) -> int:
    in_attention = config.latent.q_rank + config.latent.kv_rank if config.latent else 0
    return config.n_layers * (2 * config.dim + in_attention) + config.dim


def _vision_tower(vision: VisionConfig) -> int:
    layer = 4 * vision.dim**2 + 3 * vision.dim * vision.hidden_dim + 2 * vision.dim
    return vision.dim * vision.n_channels * vision.patch_size**2 + vision.dim + vision.n_layers * layer


def _projector(vision: VisionConfig, dim: int) -> int:
    norm = vision.dim if vision.pre_projector_norm else 0
    merger = (vision.dim * vision.spatial_merge_size) ** 2 if vision.patch_merge else 0
    biases = 2 * dim if vision.adapter_bias else 0
    return norm + merger + vision.dim * dim + dim**2 + biases
