"""What a training step minimises: cross-entropy of trained tokens, or the loss of preferences. No gradients here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ministral_jax.errors import ConfigError
from ministral_jax.lora import without_adapters
from ministral_jax.stacked import StackedTransformer

from .loss import cross_entropy, row_log_probs

Values = Mapping[str, Array]


@runtime_checkable
class Objective(Protocol):
    """A loss that is a weighted sum over the examples of a batch, tokens or pairs of rows.

    Attributes:
        rows: rows of a batch that belong together, and lie on one device.
        names: what it computes beside the loss, as weighted sums too.
    """

    rows: ClassVar[int]
    names: ClassVar[tuple[str, ...]]

    def weights(self, batch: Any) -> Float[Array, "..."]:
        """What each example of a Batch [..., B, T] counts, with its leading axes."""
        ...

    def shares(self, weights: Float[Array, "A ..."]) -> Float[Array, "A ..."]:
        """The weights of a step's microbatches, divided so that the loss is the step's mean."""
        ...

    def sums(
        self, model: StackedTransformer, batch: Any, weights: Float[Array, "..."]
    ) -> tuple[Float[Array, ""], Values]:
        """The loss of a Batch [B, T] and `names`, each a sum over its examples times `weights`."""
        ...


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy: every trained token of a step counts the same.

    With `rows_per_mean` it is the plain mean over groups of so many rows of a microbatch of each group's own mean: with
    the rows that one device has, that is what mistral-finetune minimises. `chunk` is as in `cross_entropy`.
    """

    rows_per_mean: int | None = None
    chunk: int | None = None
    rows: ClassVar[int] = 1
    names: ClassVar[tuple[str, ...]] = ()

    def weights(self, batch: Any) -> Float[Array, "*A B T"]:
        """Of each token."""
        return batch.loss_weights

    def shares(self, weights: Float[Array, "A B T"]) -> Float[Array, "A B T"]:
        """Weights that add up to 1 over the step, or over each group of rows to the same.

        A group without weight adds nothing, but counts.
        """
        n_micro, rows, length = weights.shape
        if self.rows_per_mean is None:
            return weights / _or_one(weights.sum())
        if rows % self.rows_per_mean:
            raise ConfigError(f"a microbatch of {rows} rows does not divide into groups of {self.rows_per_mean}")
        groups = weights.reshape(n_micro, rows // self.rows_per_mean, self.rows_per_mean * length)
        means = groups / _or_one(groups.sum(axis=-1, keepdims=True))
        return (means / np.prod(groups.shape[:2])).reshape(weights.shape)

    def sums(
        self, model: StackedTransformer, batch: Any, weights: Float[Array, "B T"]
    ) -> tuple[Float[Array, ""], Values]:
        """The cross-entropy, and nothing else."""
        hidden = model.hidden(batch.tokens, batch.positions, batch.segment_ids)  # [B, T, D]
        head = model.head.weight[...]
        return cross_entropy(hidden, head, batch.targets, weights, chunk=self.chunk, layout=model.layout)[0], {}


@dataclass(frozen=True)
class PreferenceConfig:
    """DPO's `beta`, how far the policy may move from the base, and the share of pairs taken to be the wrong way round.

    Raises ConfigError naming the field.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise ConfigError(f"preference.beta: {self.beta!r}, expected a number above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"preference.label_smoothing: {self.label_smoothing!r}, expected 0 up to, not with, 0.5")


@dataclass(frozen=True)
class Preference:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, equation 7) of adapters.

    Rows 2 i and 2 i + 1 of a batch are the chosen and the rejected conversation of pair i. The reference is the model
    without its adapters, around the same arrays. With the log-probabilities p of both answers under the policy and r
    under the reference, the loss of a pair is `-log sigmoid(beta ((p_c - r_c) - (p_r - r_r)))`, and with
    `label_smoothing` e `(1 - e)` times that and `e` times the same of the pair turned round (Mitchell 2023, cDPO).
    Rewards are `beta (p - r)`; `accuracy` is the share of pairs whose chosen reward is the larger.
    """

    config: PreferenceConfig
    chunk: int | None = None
    rows: ClassVar[int] = 2
    names: ClassVar[tuple[str, ...]] = ("chosen_reward", "rejected_reward", "accuracy")

    def weights(self, batch: Any) -> Float[Array, "*A B"]:
        """1 of each pair, 0 of those that only fill up the batch."""
        *leading, rows, length = batch.loss_weights.shape
        pairs = batch.loss_weights.reshape(*leading, rows // 2, 2 * length)
        return (pairs > 0).any(axis=-1).astype(jnp.float32)

    def shares(self, weights: Float[Array, "A B"]) -> Float[Array, "A B"]:
        """Weights that add up to 1 over the step."""
        return weights / _or_one(weights.sum())

    def sums(
        self, model: StackedTransformer, batch: Any, weights: Float[Array, "B"]
    ) -> tuple[Float[Array, ""], Values]:
        """The loss, and the rewards and accuracy beside it."""
        moved = self._log_probs(model, batch) - jax.lax.stop_gradient(self._log_probs(without_adapters(model), batch))
        rewards = self.config.beta * moved.reshape(-1, 2)  # [B, 2]: chosen, rejected
        margin = rewards[:, 0] - rewards[:, 1]
        smoothing = self.config.label_smoothing
        losses = -(1 - smoothing) * jax.nn.log_sigmoid(margin) - smoothing * jax.nn.log_sigmoid(-margin)
        beside = (rewards[:, 0], rewards[:, 1], (margin > 0).astype(jnp.float32))
        values = {name: jnp.sum(weights * value) for name, value in zip(self.names, beside, strict=True)}
        return jnp.sum(weights * losses), values

    def _log_probs(self, model: StackedTransformer, batch: Any) -> Float[Array, "rows"]:
        hidden = model.hidden(batch.tokens, batch.positions, batch.segment_ids)  # [2 B, T, D]
        head = model.head.weight[...]
        return row_log_probs(hidden, head, batch.targets, batch.loss_weights, chunk=self.chunk, layout=model.layout)


def _or_one(total: Array) -> Array:
    return jnp.where(total > 0, total, 1.0)
