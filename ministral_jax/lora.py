"""Low-rank adapters on a model: which projections get one, of what rank and factor. Reads no files, trains nothing.

Hu et al. 2021, arXiv 2106.09685. What an adapter computes is in linear.py.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import jax
from flax import nnx

from .checkpoints.translate import HF_PARTS
from .errors import ConfigError
from .linear import DropoutKey, Linear, LowRank, projections
from .module_patterns import first_match, pattern_problem
from .parameters import ParameterSpec, parameter_specs, parameters

Module = TypeVar("Module", bound=nnx.Module)

PROJECTIONS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
# As transformers and PEFT call them.
HF_PROJECTIONS = {
    theirs.rpartition(".")[2]: ours.rpartition(".")[2]
    for ours, theirs in HF_PARTS.items()
    if ours.rpartition(".")[2] in PROJECTIONS
}
# What mistral-finetune multiplies by when it is not told.
DEFAULT_SCALING = 2.0

# Modules of the text decoder: a vision tower has layers too, under a name of its own.
_TEXT = re.compile(r"layers\.[0-9]+\.")


@dataclass(frozen=True)
class LoraConfig:
    """Which projections are adapted and how.

    `targets` are names of projections, ours (wq) or those of transformers (q_proj). What `B A x` is multiplied by is
    `scaling`, whatever the rank, or follows from `alpha`: `alpha / rank`, with `rslora` `alpha / sqrt(rank)`
    (Kalajdzievski 2023, arXiv 2312.03732); by neither, 2. `rank_pattern` and `alpha_pattern` give other values to
    modules whose name, ours or transformers', ends in a match; the first counts. Raises ConfigError naming the field.
    """

    targets: tuple[str, ...] = PROJECTIONS
    rank: int = 16
    alpha: float | int | None = None
    scaling: float | int | None = None
    rslora: bool = False
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float | int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(HF_PROJECTIONS.get(name, name) for name in self.targets))
        unknown = [name for name in self.targets if name not in PROJECTIONS]
        if unknown or not self.targets:
            found = repr(unknown[0]) if unknown else "none"
            names = ", ".join((*PROJECTIONS, *HF_PROJECTIONS))
            raise ConfigError(f"lora.targets: found {found}, expected some of {names}")
        _require_rank("rank", self.rank)
        _require_positive("alpha", self.alpha)
        _require_positive("scaling", self.scaling)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout={self.dropout!r}: expected a share from 0 up to, not including, 1")
        if self.scaling is not None and self.alpha is not None:
            raise ConfigError(f"lora.scaling={self.scaling!r}: alpha={self.alpha!r} is given too; expected one of them")
        if self.alpha is None and (self.rslora or self.alpha_pattern):
            raise ConfigError(f"lora.{'rslora' if self.rslora else 'alpha_pattern'}: has no meaning without alpha")
        self._require_patterns()

    def _require_patterns(self) -> None:
        for key, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for pattern, value in patterns.items():
                problem = pattern_problem(pattern)
                if problem:
                    raise ConfigError(f"lora.{key}: {problem}")
                require = _require_rank if key == "rank_pattern" else _require_positive
                require(f"{key}[{pattern!r}]", value)

    def adapter_of(self, module: str) -> LowRank | None:
        """The adapter of the projection `module`, such as "layers.0.attention.wq"; None where it gets none."""
        if not _TEXT.match(module) or module.rpartition(".")[2] not in self.targets:
            return None
        names = (module, hf_module(module))
        rank = first_match(self.rank_pattern, names, self.rank)
        if self.alpha is None:
            scale = DEFAULT_SCALING if self.scaling is None else self.scaling
        else:
            alpha = first_match(self.alpha_pattern, names, self.alpha)
            scale = alpha / (math.sqrt(rank) if self.rslora else rank)
        return LowRank(rank, float(scale), self.dropout)


def hf_module(module: str) -> str:
    """The name in transformers of a projection of the text decoder."""
    _, number, part = module.split(".", 2)
    return f"model.layers.{number}.{HF_PARTS.get(part, part)}"


def _require_rank(name: str, value: float | int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"lora.{name}={value!r}: expected a whole number from 1 up")


def _require_positive(name: str, value: float | int | None) -> None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ConfigError(f"lora.{name}={value!r}: expected a number above 0")


def attach(model: nnx.Module, config: LoraConfig) -> None:
    """Gives the model's projections their adapters, as placeholders, whatever format the projections are stored in.

    `initialize_adapters` draws them, or `parameters.fill` fills them with all else. Raises ConfigError for a target
    that the model does not have, and for a model that has adapters.
    """
    linears = {name: linear for name, linear in projections(model).items() if _TEXT.match(name)}
    if any(linear.adapter for linear in linears.values()):
        raise ConfigError("lora: the model has an adapter already; load it without one, or merge that first")
    there = {name.rpartition(".")[2] for name in linears}
    absent = [target for target in config.targets if target not in there]
    if absent and (config.targets != PROJECTIONS or not there):
        raise ConfigError(
            f"lora.targets: {absent[0]!r} is no projection of this model; it has {', '.join(sorted(there))}"
        )
    for name, linear in linears.items():
        adapter = config.adapter_of(name)
        if adapter is not None:
            linear.adapt(adapter)


def initialize_adapters(
    model: nnx.Module, key: jax.Array, *, place: Callable[[str, ParameterSpec], jax.sharding.Sharding] | None = None
) -> None:
    """Draws the adapters of `model`: A uniform within 1/sqrt(columns), B zero, so that the model computes what it did.

    Each matrix depends on `key` and its own name alone. `place(name, spec)` gives the sharding of each (default: the
    default device).
    """
    specs = parameter_specs(model)
    for name, linear in adapted(model).items():
        for part in ("lora_a", "lora_b"):
            spec = specs[f"{name}.{part}"]
            drawn = spec.draw(_named_key(key, f"{name}.{part}"), 0.0)
            placed = drawn if place is None else jax.device_put(drawn, place(f"{name}.{part}", spec))
            setattr(linear, part, getattr(linear, part).replace(placed))


def adapted(model: nnx.Module) -> dict[str, Linear]:
    """Name -> every projection that has an adapter."""
    return {name: linear for name, linear in projections(model).items() if linear.adapter is not None}


def adapter_parameters(model: nnx.Module) -> dict[str, jax.Array]:
    """Name -> array, `layers.0.attention.wq.lora_a` and so on: what is trained, alone."""
    specs = parameter_specs(model)
    return {name: array for name, array in parameters(model).items() if specs[name].adapter}


def without_adapters(model: Module) -> Module:
    """The base model: a second one around the same arrays. Nothing is copied, and `model` keeps its adapters.

    Under `jax.jit`, and on a stack of layers, as well: the reference of preference training is the policy without them.
    """
    bare = nnx.merge(*nnx.split(model))
    for linear in adapted(bare).values():
        linear.remove_adapter()
    return bare


def set_dropout_keys(model: nnx.Module, key: jax.Array | None) -> None:
    """Turns the adapters' dropout on, with a key of its own for every projection drawn from `key`; None turns it off.

    On a stack of layers, whose matrices have leading axes, keys have the same axes. A step that trains sets new ones
    each time, on the model that it has merged.
    """
    for name, linear in adapted(model).items():
        assert linear.adapter is not None
        if key is None or not linear.adapter.dropout:
            linear.dropout_key = None
            continue
        own, stack = _named_key(key, name), linear.lora_a.shape[:-2]
        linear.dropout_key = DropoutKey(jax.random.split(own, stack) if stack else own)


def _named_key(key: jax.Array, name: str) -> jax.Array:
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
