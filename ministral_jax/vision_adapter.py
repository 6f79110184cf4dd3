"""From the vision tower's patches to rows beside token embeddings: norm, patch merger, two projections."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from pallas_kernels.flash_attention import Implementation

from .config import VisionConfig
from .linear import Linear
from .norm import RMSNorm
from .parameters import ParameterSpec
from .sharding.layout import Layout
from .vision import WHOLE, Patches, VisionEncoder


class ImageRows(NamedTuple):
    """What stands in for the embeddings of image tokens: `rows` where `present`, the tokens' own elsewhere."""

    rows: Float[Array | np.ndarray, "*T D"]
    present: Bool[Array | np.ndarray, "*T"]


class AdapterLinear(Linear):
    """A projection with the bias that some adapters have."""

    def __init__(self, n_out: int, n_in: int, dtype: DTypeLike, *, has_bias: bool) -> None:
        super().__init__(n_out, n_in, WHOLE, dtype)
        self.bias = ParameterSpec((n_out,), WHOLE[:1], dtype, init="zeros").placeholder() if has_bias else None

    def __call__(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        product = super().__call__(x)
        return product if self.bias is None else product + self.bias[...]


class PatchMerger(nnx.Module):
    """Squares of patches into one: their states side by side, channel by channel, and a projection."""

    def __init__(self, config: VisionConfig, dtype: DTypeLike) -> None:
        self.square = config.spatial_merge_size**2
        self.merging_layer = Linear(config.dim, config.dim * self.square, WHOLE, dtype)

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "rows D"]:
        """`x` as `Patches` orders it: the patches of a square follow each other."""
        squares = x.reshape(-1, self.square, x.shape[-1])  # [rows, square, D]
        return self.merging_layer(squares.swapaxes(1, 2).reshape(len(squares), -1))  # feature c * square + place


class VisionLanguageAdapter(nnx.Module):
    """`w_out(gelu(w_in(x)))`, the exact Gaussian error unit (Hendrycks and Gimpel 2016, arXiv 1606.08415)."""

    def __init__(self, config: VisionConfig, dim: int, dtype: DTypeLike) -> None:
        self.w_in = AdapterLinear(dim, config.dim, dtype, has_bias=config.adapter_bias)
        self.w_out = AdapterLinear(dim, dim, dtype, has_bias=config.adapter_bias)

    def __call__(self, x: Float[Array, "rows D"]) -> Float[Array, "rows text"]:
        return self.w_out(jax.nn.gelu(self.w_in(x), approximate=False))


class Vision(nnx.Module):
    """All that a model reads images with. Its parts belong to the model; this only puts them in order."""

    def __init__(
        self,
        encoder: VisionEncoder,
        norm: RMSNorm | None,
        merger: PatchMerger | None,
        adapter: VisionLanguageAdapter,
        implementation: Implementation,
    ) -> None:
        self.encoder, self.norm, self.merger, self.adapter = encoder, norm, merger, adapter
        self.implementation: Implementation = implementation

    @property
    def config(self) -> VisionConfig:
        return self.encoder.config

    def __call__(self, patches: Patches) -> Float[Array, "rows text"]:
        """A row for each image token, in the order of the patches, padding last."""
        x = self.encoder(patches, self.implementation)  # [T, D]
        x = x if self.norm is None else self.norm(x)
        x = x if self.merger is None else self.merger(x)  # [rows, D]
        return self.adapter(x)  # [rows, text]


def on_every_device(vision: Vision, patches: Patches, layout: Layout) -> Float[Array, "rows text"]:
    """`vision(patches)` on a mesh: every device computes all of it, without talking to the others."""
    graph, weights = nnx.split(vision)
    everywhere = PartitionSpec()
    return jax.shard_map(
        lambda weights, patches: nnx.merge(graph, weights)(patches),
        mesh=layout.mesh,
        in_specs=(everywhere, everywhere),
        out_specs=everywhere,
        check_vma=False,
    )(weights, patches)
