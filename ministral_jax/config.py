"""What a Mistral model is: a tree of frozen dataclasses, validated when built. Reading files is config_files' work."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import ConfigError

# What keys and values may be kept as; float8 halves a bfloat16 cache and rounds them to 3 bits of mantissa.
CACHE_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn")

Window = int | None


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{name}={value!r} is not allowed: expected {expected}")


# Positions and sizes travel as int32.
INT32_MAX = 2**31 - 1
# Beyond these, products overflow or vanish in float32.
LARGEST_NUMBER = 1e18
SMALLEST_NUMBER = 1e-18


def _is_whole(value: object, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= INT32_MAX


def _require_positive_int(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        _require(_is_whole(value, 1), name, value, "a positive integer below 2**31")


def _require_count(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        _require(_is_whole(value, 0), name, value, "a whole number, 0 or more, below 2**31")


def _require_positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        real = isinstance(value, int | float) and not isinstance(value, bool)
        allowed = real and SMALLEST_NUMBER <= value <= LARGEST_NUMBER
        _require(allowed, name, value, f"a number from {SMALLEST_NUMBER:g} to {LARGEST_NUMBER:g}")


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """Context extension of RoPE by parts (YaRN, arXiv 2309.00071).

    Frequencies that turn more than `beta_fast` times within `original_length` tokens are kept, those that turn fewer
    than `beta_slow` times are divided by `factor`, and between the two a linear ramp blends them. `attention_factor`
    multiplies cosine and sine; 1.0 where a file says `apply_scale: false`.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        _require_positive(self, "factor", "beta_fast", "beta_slow", "attention_factor")
        _require_positive_int(self, "original_length")
        _require(self.factor >= 1.0, "yarn.factor", self.factor, "a number of at least 1")
        _require(self.beta_fast >= self.beta_slow, "yarn.beta_fast", self.beta_fast,
                 f"at least beta_slow={self.beta_slow}")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: base `theta` and, where the model has it, YaRN."""

    theta: float
    yarn: YarnConfig | None = None

    def __post_init__(self) -> None:
        _require_positive(self, "theta")
        _require(self.theta > 1.0, "rope_theta", self.theta, "a number greater than 1")


@dataclass(frozen=True, kw_only=True)
class TemperatureConfig:
    """Attention temperature of Llama 4: a query at position p is multiplied by 1 + beta * ln(1 + floor(p / length))."""

    beta: float
    original_length: int

    def __post_init__(self) -> None:
        _require_positive(self, "beta")
        _require_positive_int(self, "original_length")


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Mixture of experts. Layers before `first_dense_layers` keep the dense feed-forward of `hidden_dim`."""

    n_experts: int
    experts_per_token: int
    expert_hidden_dim: int
    n_shared_experts: int = 0
    first_dense_layers: int = 0
    routed_scale: float = 1.0

    def __post_init__(self) -> None:
        _require_positive_int(self, "n_experts", "experts_per_token", "expert_hidden_dim")
        _require_count(self, "n_shared_experts", "first_dense_layers")
        _require(self.experts_per_token <= self.n_experts, "experts_per_token", self.experts_per_token,
                 f"at most n_experts={self.n_experts}")  # fmt: skip
        _require_positive(self, "routed_scale")


@dataclass(frozen=True, kw_only=True)
class LatentAttentionConfig:
    """Latent attention (DeepSeek-V2, arXiv 2405.04434): low-rank queries, and keys and values from one latent."""

    q_rank: int
    kv_rank: int
    rope_head_dim: int
    nope_head_dim: int
    v_head_dim: int

    def __post_init__(self) -> None:
        _require_positive_int(self, "q_rank", "kv_rank", "rope_head_dim", "nope_head_dim", "v_head_dim")
        _require(self.rope_head_dim % 2 == 0, "qk_rope_head_dim", self.rope_head_dim, "an even number")


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The Pixtral vision tower and the adapter that turns its patches into token embeddings.

    With `patch_merge`, blocks of `spatial_merge_size` squared patches become one token. A break or end token of -1
    means that the model has none.
    """

    dim: int
    n_layers: int
    n_heads: int
    hidden_dim: int
    patch_size: int
    image_size: int
    n_channels: int = 3
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    patch_merge: bool = False
    spatial_merge_size: int = 1
    pre_projector_norm: bool = False
    adapter_bias: bool = False
    image_token: int = 10
    image_break_token: int = 12
    image_end_token: int = 13

    def __post_init__(self) -> None:
        _require_positive_int(
            self,
            "dim",
            "n_layers",
            "n_heads",
            "hidden_dim",
            "patch_size",
            "image_size",
            "n_channels",
            "spatial_merge_size",
        )
        _require_positive(self, "rope_theta", "norm_eps")
        _require(
            self.dim % self.n_heads == 0,
            "vision hidden size",
            self.dim,
            f"a multiple of its {self.n_heads} heads",
        )
        _require(
            self.head_dim % 2 == 0,
            "vision hidden size",
            self.dim,
            f"an even number for each of its {self.n_heads} heads, since RoPE turns pairs",
        )
        if self.spatial_merge_size != 1 and not self.patch_merge:
            raise ConfigError(
                f"spatial_merge_size={self.spatial_merge_size} without patch_merge: expected 1, nothing merges patches"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


QuantizationFormat = Literal["fp8_tensor", "fp8_channel", "fp8_block", "int8_channel", "nvfp4", "nf4"]


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """How the projections are stored. `raw` is the file's own block, kept to be written back; `==` ignores it."""

    format: QuantizationFormat
    activations: Literal["none", "static", "dynamic"]
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that decides shapes and mathematics of one model.

    `windows[i]` is the attention window of layer i in tokens, the current one included, or None for full
    attention. `max_length` is the longest context the model was published for. `extra` is {"mistral": document} or
    {"hf": document}, the parsed source file, from which keys that we do not interpret are written back; `==`
    ignores it.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    norm_eps: float
    rope: RopeConfig
    windows: tuple[Window, ...]
    max_length: int
    tied_embeddings: bool = False
    temperature: TemperatureConfig | None = None
    moe: MoEConfig | None = None
    latent: LatentAttentionConfig | None = None
    vision: VisionConfig | None = None
    quantization: QuantizationConfig | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        _require_positive_int(
            self,
            "dim",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "head_dim",
            "hidden_dim",
            "vocab_size",
            "max_length",
        )
        _require_positive(self, "norm_eps")
        _require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number, since RoPE turns pairs")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"n_heads={self.n_heads} is not divisible by n_kv_heads={self.n_kv_heads}: "
                "every key head serves the same number of query heads"
            )
        if len(self.windows) != self.n_layers:
            raise ConfigError(
                f"windows has {len(self.windows)} entries, expected one for each of n_layers={self.n_layers}"
            )
        odd = [i for i, window in enumerate(self.windows) if window is not None and not _is_whole(window, 1)]
        if odd:
            _require(False, f"windows[{odd[0]}]", self.windows[odd[0]], "None or a positive integer below 2**31")
        if self.moe and self.moe.first_dense_layers > self.n_layers:
            raise ConfigError(
                f"first_dense_layers={self.moe.first_dense_layers} is more than there are layers: "
                f"n_layers={self.n_layers}"
            )
        if self.latent and self.latent.nope_head_dim + self.latent.rope_head_dim != self.head_dim:
            raise ConfigError(
                f"head_dim={self.head_dim} is not qk_nope_head_dim={self.latent.nope_head_dim} + "
                f"qk_rope_head_dim={self.latent.rope_head_dim}: a latent attention head is both parts side by side"
            )

    @property
    def group_size(self) -> int:
        """Query heads that share one key head."""
        return self.n_heads // self.n_kv_heads

    @property
    def window_groups(self) -> tuple[tuple[Window, tuple[int, ...]], ...]:
        """Layers by window, in order of first appearance: `((None, (0, 4)), (32, (1, 2, 3, 5, 6, 7)))`."""
        groups: dict[Window, list[int]] = {}
        for layer, window in enumerate(self.windows):
            groups.setdefault(window, []).append(layer)
        return tuple((window, tuple(layers)) for window, layers in groups.items())

    def with_windows(self, *pattern: Window) -> ModelConfig:
        """The same model with `pattern` repeated over its layers; the layer count must be a multiple of its length."""
        if not pattern or self.n_layers % len(pattern):
            raise ConfigError(
                f"a window pattern of length {len(pattern)} does not tile n_layers={self.n_layers}: "
                "give a list whose length divides the number of layers"
            )
        return dataclasses.replace(self, windows=tuple(pattern) * (self.n_layers // len(pattern)))
