"""Every published model by name: its config, hub repository, variant and tokenizer. Facts only; no files, no network.

Where a fact was not seen in a published file, the entry's note says so.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .config import (
    LatentAttentionConfig,
    ModelConfig,
    MoEConfig,
    QuantizationConfig,
    RopeConfig,
    TemperatureConfig,
    VisionConfig,
    Window,
    YarnConfig,
)
from .errors import ConfigError

Variant = Literal["base", "instruct", "reasoning"]
TokenizerVersion = Literal["spm-v1", "spm-v3", "tekken-v3", "tekken-v13", "tekken-v15"]
PublishedLayout = Literal["mistral", "hf"]


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One published model. `layouts` are its hub repository's; `note` says what was not seen in a published file."""

    name: str
    repo_id: str
    variant: Variant
    tokenizer: TokenizerVersion
    config: ModelConfig
    layouts: tuple[PublishedLayout, ...]
    note: str = ""


def _dense(
    dim: int,
    n_layers: int,
    hidden_dim: int,
    vocab_size: int,
    rope: RopeConfig,
    max_length: int,
    windows: Sequence[Window] = (None,),
) -> ModelConfig:
    """What all dense models share: 32 query heads of 128 numbers, 8 key heads, epsilon 1e-5."""
    return ModelConfig(
        dim=dim,
        n_layers=n_layers,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        hidden_dim=hidden_dim,
        vocab_size=vocab_size,
        norm_eps=1e-5,
        rope=rope,
        windows=tuple(windows) * (n_layers // len(windows)),
        max_length=max_length,
    )


_7B_V1 = _dense(4096, 32, 14336, 32000, RopeConfig(theta=1e4), 32768, windows=[4096])
_7B_V2 = _dense(4096, 32, 14336, 32000, RopeConfig(theta=1e6), 32768)
_7B_V3 = dataclasses.replace(_7B_V2, vocab_size=32768)

_8X7B = dataclasses.replace(_7B_V2, moe=MoEConfig(n_experts=8, experts_per_token=2, expert_hidden_dim=14336))
_8X22B = dataclasses.replace(
    _dense(6144, 56, 16384, 32000, RopeConfig(theta=1e6), 65536),
    n_heads=48,
    moe=MoEConfig(n_experts=8, experts_per_token=2, expert_hidden_dim=16384),
)
_8X22B_V3 = dataclasses.replace(_8X22B, vocab_size=32768)

_MINISTRAL_8B_PATTERN = (None, 32768, 32768, 32768)
_MINISTRAL_8B = _dense(4096, 36, 12288, 131072, RopeConfig(theta=1e8), 131072, windows=_MINISTRAL_8B_PATTERN)


_FP8 = QuantizationConfig(format="fp8_tensor", activations="static")
_FP8_BLOCK = QuantizationConfig(format="fp8_block", activations="dynamic")


def _ministral_3(dim: int, n_layers: int, hidden_dim: int, theta: float, *, tied: bool) -> ModelConfig:
    yarn = YarnConfig(factor=16.0, original_length=16384)
    text = _dense(dim, n_layers, hidden_dim, 131072, RopeConfig(theta=theta, yarn=yarn), 262144)
    return dataclasses.replace(
        text,
        tied_embeddings=tied,
        temperature=TemperatureConfig(beta=0.1, original_length=16384),
        vision=_vision(dim=1024, n_layers=24, hidden_dim=4096),
    )


def _vision(dim: int, n_layers: int, hidden_dim: int) -> VisionConfig:
    return VisionConfig(
        dim=dim,
        n_layers=n_layers,
        n_heads=16,
        hidden_dim=hidden_dim,
        patch_size=14,
        image_size=1540,
        patch_merge=True,
        spatial_merge_size=2,
        pre_projector_norm=True,
    )


_LARGE_3 = ModelConfig(
    dim=7168,
    n_layers=61,
    n_heads=128,
    n_kv_heads=128,
    head_dim=192,
    hidden_dim=16384,
    vocab_size=131072,
    norm_eps=1e-6,
    rope=RopeConfig(theta=1e4, yarn=YarnConfig(factor=36.0, original_length=8192)),
    windows=(None,) * 61,
    max_length=294912,
    temperature=TemperatureConfig(beta=0.1, original_length=8192),
    moe=MoEConfig(n_experts=128, experts_per_token=4, expert_hidden_dim=4096, n_shared_experts=1, first_dense_layers=3),
    latent=LatentAttentionConfig(q_rank=1536, kv_rank=512, rope_head_dim=64, nope_head_dim=128, v_head_dim=128),
    vision=_vision(dim=1664, n_layers=48, hidden_dim=8192),
)
_SMALL_4 = ModelConfig(
    dim=4096,
    n_layers=36,
    n_heads=32,
    n_kv_heads=32,
    head_dim=128,
    hidden_dim=12288,
    vocab_size=131072,
    norm_eps=1e-6,
    rope=RopeConfig(theta=1e4, yarn=YarnConfig(factor=128.0, original_length=8192)),
    windows=(None,) * 36,
    max_length=1048576,
    temperature=TemperatureConfig(beta=0.1, original_length=8192),
    moe=MoEConfig(n_experts=128, experts_per_token=4, expert_hidden_dim=2048, n_shared_experts=1),
    latent=LatentAttentionConfig(q_rank=1024, kv_rank=256, rope_head_dim=64, nope_head_dim=64, v_head_dim=128),
)

_HF: tuple[PublishedLayout, ...] = ("hf",)
_BOTH: tuple[PublishedLayout, ...] = ("mistral", "hf")

_PARAMS_NOT_SEEN = "the text of its params.json was not seen"
_ARCHIVE = "published as an archive on Mistral's own server; the repository is a community copy that was not seen"
_REASONING = "its config.json was not seen and is taken to be that of the base model; the paper gives a context of 128k"
_TEKKEN_NOT_SEEN = "the tokenizer's version was not seen in its file"
_LARGE_3_NOTE = (
    "norm_eps is 1e-6 in one source and 1e-5 in another; the vision tower's sizes were not seen and are inferred "
    f"from its 2.5 B parameters; {_TEKKEN_NOT_SEEN}"
)


def _entry(
    name: str,
    repo_id: str,
    tokenizer: TokenizerVersion,
    config: ModelConfig,
    layouts: tuple[PublishedLayout, ...],
    note: str = "",
) -> ModelEntry:
    variant: Variant = "instruct" if "instruct" in name else "reasoning" if "reasoning" in name else "base"
    return ModelEntry(
        name=name,
        repo_id=repo_id,
        variant=variant,
        tokenizer=tokenizer,
        config=config,
        layouts=layouts,
        note=note,
    )


def _ministral_3_family() -> tuple[ModelEntry, ...]:
    entries = []
    sizes: tuple[tuple[str, int, int, int, float], ...] = (
        ("3B", 3072, 26, 9216, 1e6),
        ("8B", 4096, 34, 14336, 1e6),
        ("14B", 5120, 40, 16384, 1e9),
    )
    for size, dim, n_layers, hidden_dim, theta in sizes:
        base = _ministral_3(dim, n_layers, hidden_dim, theta, tied=size == "3B")
        fp8 = dataclasses.replace(base, quantization=_FP8)
        for variant, config, note in (
            ("Base", base, _TEKKEN_NOT_SEEN),
            ("Instruct", fp8, f"also published in BF16; {_TEKKEN_NOT_SEEN}"),
            ("Reasoning", base, f"{_REASONING}; {_TEKKEN_NOT_SEEN}"),
        ):
            repo = f"Ministral-3-{size}-{variant}-2512"
            entries.append(_entry(repo.lower(), f"mistralai/{repo}", "tekken-v13", config, _BOTH, note))
    return tuple(entries)


MODELS: tuple[ModelEntry, ...] = (
    _entry("mistral-7b-v0.1", "mistralai/Mistral-7B-v0.1", "spm-v1", _7B_V1, _HF, _PARAMS_NOT_SEEN),
    _entry("mistral-7b-instruct-v0.1", "mistralai/Mistral-7B-Instruct-v0.1", "spm-v1", _7B_V1, _HF, _PARAMS_NOT_SEEN),
    _entry("mistral-7b-v0.2", "mistral-community/Mistral-7B-v0.2", "spm-v1", _7B_V2, _HF, _ARCHIVE),
    _entry("mistral-7b-instruct-v0.2", "mistralai/Mistral-7B-Instruct-v0.2", "spm-v1", _7B_V2, _HF),
    _entry("mistral-7b-v0.3", "mistralai/Mistral-7B-v0.3", "spm-v3", _7B_V3, _BOTH),
    _entry("mistral-7b-instruct-v0.3", "mistralai/Mistral-7B-Instruct-v0.3", "spm-v3", _7B_V3, _BOTH),
    _entry("mixtral-8x7b-v0.1", "mistralai/Mixtral-8x7B-v0.1", "spm-v1", _8X7B, _HF, _PARAMS_NOT_SEEN),
    _entry(
        "mixtral-8x7b-instruct-v0.1",
        "mistralai/Mixtral-8x7B-Instruct-v0.1",
        "spm-v1",
        _8X7B,
        _HF,
        _PARAMS_NOT_SEEN,
    ),
    _entry("mixtral-8x22b-v0.1", "mistralai/Mixtral-8x22B-v0.1", "spm-v1", _8X22B, _HF, _PARAMS_NOT_SEEN),
    _entry(
        "mixtral-8x22b-instruct-v0.1",
        "mistralai/Mixtral-8x22B-Instruct-v0.1",
        "spm-v3",
        _8X22B_V3,
        _HF,
        f"{_PARAMS_NOT_SEEN}; Instruct v0.3 is the same model in safetensors",
    ),
    _entry(
        "mixtral-8x22b-v0.3",
        "mistral-community/mixtral-8x22B-v0.3",
        "spm-v3",
        _8X22B_V3,
        _BOTH,
        f"v0.1 with its vocabulary extended; {_ARCHIVE}; {_PARAMS_NOT_SEEN}",
    ),
    _entry(
        "ministral-8b-instruct-2410",
        "mistralai/Ministral-8B-Instruct-2410",
        "tekken-v3",
        _MINISTRAL_8B,
        _BOTH,
        f"{_PARAMS_NOT_SEEN}; its config.json has the window on every layer and a maximal length of 32768, which is "
        "the same model up to that length",
    ),
    *_ministral_3_family(),
    _entry(
        "mistral-large-3-675b-base-2512",
        "mistralai/Mistral-Large-3-675B-Base-2512",
        "tekken-v13",
        _LARGE_3,
        ("mistral",),
        _LARGE_3_NOTE,
    ),
    _entry(
        "mistral-large-3-675b-instruct-2512",
        "mistralai/Mistral-Large-3-675B-Instruct-2512",
        "tekken-v13",
        dataclasses.replace(_LARGE_3, quantization=_FP8_BLOCK),
        ("mistral",),
        f"{_LARGE_3_NOTE}; also published in NVFP4 and BF16",
    ),
    _entry(
        "mistral-small-4-119b-instruct-2603",
        "mistralai/Mistral-Small-4-119B-2603",
        "tekken-v15",
        _SMALL_4,
        _BOTH,
        "hidden_dim, epsilon and temperature are the defaults of its class in transformers; whether it has a vision "
        f"tower was not seen; {_TEKKEN_NOT_SEEN}; also published in NVFP4",
    ),
)

# The names of a window pattern that a user may ask for, and what they stand for.
WINDOW_PATTERNS: dict[str, str] = {
    "full": "full attention in every layer",
    "interleaved": "one layer of full attention, then three with the window that the config has, repeated",
    "ministral-8b": "one layer of full attention, then three with a window of 32768, repeated",
}


def find(name: str) -> ModelEntry:
    """The published model called `name`: its name here, its hub id, or either without the variant where one fits.

    Raises ConfigError with the nearest names, or, for Ministral 3B of October 2024, that its weights were never
    published.
    """
    wanted = name.strip().lower().rpartition("/")[2]
    if _without_variant(wanted) in ("ministral-3b-2410", "ministral-3b"):
        raise ConfigError(
            f"{name!r}: the weights of Ministral 3B (2410) were never published; "
            "the nearest are ministral-8b-instruct-2410 and ministral-3-3b-instruct-2512"
        )
    for entry in MODELS:
        if wanted in (entry.name, entry.repo_id.rpartition("/")[2].lower()):
            return entry
    fitting = [entry for entry in MODELS if _without_variant(entry.name) == wanted]
    if len(fitting) == 1:
        return fitting[0]
    names = [entry.name for entry in fitting] or _nearest(wanted)
    raise ConfigError(f"{name!r}: no published model has this name; the nearest are {', '.join(names)}")


def _without_variant(name: str) -> str:
    for variant in ("base", "instruct", "reasoning"):
        name = name.replace(f"-{variant}", "")
    return name


def _nearest(wanted: str) -> list[str]:
    return difflib.get_close_matches(wanted, [entry.name for entry in MODELS], n=3, cutoff=0.0)


def published_length(config: ModelConfig) -> int | None:
    """Maximal length of the published text decoder that is `config` in everything but the vocabulary, or None."""
    same = (entry for entry in MODELS if _differences(config, entry.config) <= _NOT_THE_DECODER)
    entry = next(same, None)
    return None if entry is None else entry.config.max_length


_NOT_THE_DECODER = {"max_length", "vocab_size", "vision", "quantization", "extra"}


def _differences(one: ModelConfig, other: ModelConfig) -> set[str]:
    names = (field.name for field in dataclasses.fields(ModelConfig))
    return {name for name in names if getattr(one, name) != getattr(other, name)}


def is_ministral_8b_windowed_everywhere(config: ModelConfig) -> bool:
    """Whether `config` is what the published config.json of Ministral 8B 2410 says, vocabulary and length apart."""
    if set(config.windows) != {32768}:
        return False
    return _differences(config, _MINISTRAL_8B) <= _NOT_THE_DECODER | {"windows"}


def with_windows(config: ModelConfig, windows: str | Sequence[Window]) -> ModelConfig:
    """`config` with other windows: a name of WINDOW_PATTERNS, or a list that is repeated over the layers.

    What thereby becomes a published model gets its maximal length, where that is longer: the config.json of Ministral
    8B stops at its window, the model with the trained pattern does not.

    Raises ConfigError for an unknown name, for a pattern that does not tile the layers, and for "interleaved" on a
    model that has no window or more than one.
    """
    changed = config.with_windows(*(_pattern(config, windows) if isinstance(windows, str) else windows))
    length = published_length(changed)
    return changed if length is None else dataclasses.replace(changed, max_length=max(length, config.max_length))


def parse_windows(text: str) -> str | list[Window]:
    """What options say of windows: a name of a pattern, or widths such as "none,32768". Raises ConfigError."""
    parts = text.replace(",", " ").split()
    if len(parts) == 1 and not parts[0].isdigit() and parts[0] != "none":
        return parts[0]
    if not parts or not all(part == "none" or part.isdigit() for part in parts):
        raise ConfigError(f"windows {text!r}: expected a pattern's name, or widths and none separated by commas")
    return [None if part == "none" else int(part) for part in parts]


def _pattern(config: ModelConfig, name: str) -> tuple[Window, ...]:
    if name == "full":
        return (None,)
    if name == "ministral-8b":
        return _MINISTRAL_8B_PATTERN
    if name != "interleaved":
        raise ConfigError(f"windows={name!r} is not known: expected one of {', '.join(WINDOW_PATTERNS)}")
    widths = sorted({window for window in config.windows if window is not None})
    if len(widths) != 1:
        found = ", ".join(map(str, widths)) or "none"
        raise ConfigError(f"windows='interleaved' needs a model with one window width, this one has: {found}")
    return (None, widths[0], widths[0], widths[0])
