"""The programs of whole models for meshes of chips that are not here, traced: decode, prefill, training, images.

Weights, cache and batch are abstract: nothing is allocated, nothing is run. Each program comes with its FLOPs by
formula.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from infer.decoding import DecodeState, Ends, decode, prefill
from infer.images import compiled_tower, text_alone
from infer.sampling import SamplingParams, batch_arrays, batch_mode, start_history
from ministral_jax.cache import PagedBatch, PagedCache, allocate_cache, plan_cache, pool_axes
from ministral_jax.catalog import find
from ministral_jax.config import ModelConfig
from ministral_jax.lora import LoraConfig, attach
from ministral_jax.memory import count_parameters
from ministral_jax.parameters import fill
from ministral_jax.patches import padded_patches
from ministral_jax.sharding.layout import Layout, layout_for
from ministral_jax.sharding.meshes import make_mesh
from ministral_jax.sharding.plan import planned_model
from ministral_jax.stacked import StackedTransformer, pattern
from ministral_jax.transformer import Transformer
from ministral_jax.vision import Patches
from ministral_jax.vision_adapter import ImageRows

BFLOAT16 = jnp.dtype(jnp.bfloat16)
PAGE, CHUNK = 64, 512
TOPOLOGIES = {4: "2x2", 8: "2x4", 64: "8x8"}
HOST_GPUS = 8  # GPUs that share a host
Struct: Any = jax.ShapeDtypeStruct  # stands for arrays

Kind = Literal["decode", "prefill", "train", "long", "tower"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One program: `batch` sequences of up to `length` tokens; for "train" and "long" exactly so many.

    With `images` the model reads images too: its tower lies on every device, and a chunk of prefill has image rows. A
    "tower" row is the tower's own program, for one image of `length` patches.
    """

    name: str
    kind: Kind
    model: str
    chip: str
    devices: int
    mesh: str
    batch: int
    length: int
    images: bool = False


class Program(NamedTuple):
    """A staged program, not compiled yet, and of one device: FLOPs, bytes held at full depth, bytes of unread experts.

    What is held is the whole model and its cache, whatever of it the program takes. Routing to any expert is taken to
    be as likely as to any other.
    """

    lowered: jax.stages.Lowered
    flops: float
    held: int
    unread: int


def devices_of(row: Row) -> Sequence[Any]:
    """The chips of a row, from their makers' descriptions."""
    if row.chip == "h200":
        from pallas_kernels.gpu.ahead_of_time import absent_gpus

        return absent_gpus(row.devices, hosts=-(-row.devices // HOST_GPUS))
    from pallas_kernels.tpu.ahead_of_time import absent_slice

    return absent_slice(f"{row.chip}:{TOPOLOGIES[row.devices]}")


def config_of(row: Row, *, short: bool) -> ModelConfig:
    """The model in its published format, whole or its first two periods (of the tower, two layers).

    A long prompt gets the context it needs.
    """
    config = find(row.model).config
    vision, layers = config.vision if row.images else None, config.n_layers
    if short:
        repeating = pattern(config)
        layers = repeating.prefix + 2 * repeating.period
        vision = vision and dataclasses.replace(vision, n_layers=2)
    return dataclasses.replace(
        config, n_layers=layers, windows=config.windows[:layers], vision=vision,
        max_length=max(config.max_length, row.length),
    )  # fmt: skip


def layers_of(row: Row, *, short: bool) -> int:
    """How many layers the program of a row has."""
    config = config_of(row, short=short)
    return config.vision.n_layers if row.kind == "tower" and config.vision else config.n_layers


def stage(row: Row, *, short: bool = False) -> Program:
    """The program of a row, traced for its mesh."""
    config = config_of(row, short=short)
    layout = layout_for(config, make_mesh(row.mesh, devices_of(row)))
    program = {"decode": _decode, "prefill": _prefill, "train": _train, "long": _long, "tower": _tower}[row.kind]
    lowered, flops = program(row, config, layout)
    return Program(lowered, flops / row.devices, held_bytes(row, layout), _unread_bytes(row, config, layout))


def held_bytes(row: Row, layout: Layout) -> int:
    """Of the whole model and its cache on one device, at full depth; 0 for programs without a cache."""
    if row.kind in ("train", "long"):
        return 0
    config = config_of(row, short=False)
    return _device_bytes((_model(config, layout), _cache(row, config, layout)))


def _unread_bytes(row: Row, config: ModelConfig, layout: Layout) -> int:
    """Of experts on one device that no token is expected to go to."""
    moe = config.moe
    if moe is None:
        return 0
    tokens = row.batch if row.kind == "decode" else CHUNK * layout.ways("rows")
    numbers = 3 * (config.n_layers - moe.first_dense_layers) * moe.n_experts * moe.expert_hidden_dim * config.dim
    n_bytes = numbers * (1 if config.quantization else BFLOAT16.itemsize) // row.devices
    return int(n_bytes * (1 - moe.experts_per_token / moe.n_experts) ** tokens)


def _model(config: ModelConfig, layout: Layout) -> Transformer:
    """The model with shapes in the place of arrays, each where the layout puts it."""
    model = planned_model(config, BFLOAT16, layout)
    return fill(model, lambda name, spec: Struct(spec.shape, spec.dtype, sharding=layout.placement(name, spec)))


def _device_bytes(tree: Any) -> int:
    """Of abstract arrays, on one device."""
    return sum(jnp.dtype(x.dtype).itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))


def _rows_of(layout: Layout, tree: Any, *axes: str) -> Any:
    sharding = layout.sharding(("rows", *axes))
    return jax.tree.map(lambda x: Struct(x.shape, x.dtype, sharding=sharding), tree)


def _cache(row: Row, config: ModelConfig, layout: Layout) -> tuple[PagedCache, tuple[Any, ...]]:
    """The pools and the page tables of the row's sequences."""
    plan = plan_cache(
        config, batch=row.batch // layout.ways("rows"), length=row.length, chunk=CHUNK, page_size=PAGE,
        dtype=BFLOAT16, layout=layout,
    )  # fmt: skip
    cache = jax.eval_shape(lambda: allocate_cache(config, plan, BFLOAT16, layout))

    def placed(pools: tuple[Any, ...]) -> tuple[Any, ...]:
        shardings = [layout.sharding(pool_axes(config, window)) for window in config.windows]
        return tuple(
            None if x is None else Struct(x.shape, x.dtype, sharding=s) for x, s in zip(pools, shardings, strict=True)
        )

    cache = PagedCache(placed(cache.keys), placed(cache.values), cache.group_of_layer)
    tables = tuple(_rows_of(layout, Struct((row.batch, plan.table_width), jnp.int32)) for _ in plan.groups)
    return cache, tables


def _decode(row: Row, config: ModelConfig, layout: Layout) -> tuple[jax.stages.Lowered, float]:
    model = _model(config, layout)
    graph, weights = nnx.split(text_alone(model))
    cache, tables = _cache(row, config, layout)
    params = [SamplingParams()] * row.batch
    mode = batch_mode(params)
    history = jax.eval_shape(lambda: start_history([[0]] * row.batch, config.vocab_size, mode))
    of_batch, active = Struct((row.batch,), jnp.int32), Struct((row.batch,), jnp.bool_)
    rest = (
        DecodeState(of_batch, of_batch, of_batch, active, history),
        tables,
        Ends(Struct((row.batch, 1), jnp.int32), of_batch),
        jax.eval_shape(lambda: batch_arrays(params)),
    )
    arguments = (weights, cache, *_rows_of(layout, rest), Struct((), jnp.int32))
    step = jax.jit(functools.partial(decode, graph, mode=mode), donate_argnums=(1, 2))
    return step.lower(*arguments), row.batch * _token_flops(config, row.length)


def _prefill(row: Row, config: ModelConfig, layout: Layout) -> tuple[jax.stages.Lowered, float]:
    """A chunk of one sequence's prompt that ends at the last token it has room for; of image rows, if it has any."""
    model = _model(config, layout)
    graph, weights = nnx.split(text_alone(model))
    cache, tables = _cache(row, config, layout)
    shards = layout.ways("rows")
    ints = functools.partial(Struct, dtype=jnp.int32)
    hidden, tokens, starts, of_batch = _rows_of(
        layout, (Struct((row.batch, config.dim), BFLOAT16), ints((shards * CHUNK,)), ints((row.batch + shards,)),
                 ints((row.batch,))),
    )  # fmt: skip
    step = jax.jit(functools.partial(prefill, graph), donate_argnums=(1, 2))
    of_images = ImageRows(Struct((shards * CHUNK, config.dim), BFLOAT16), Struct((shards * CHUNK,), jnp.bool_))
    images = (_rows_of(layout, of_images),) if row.images else ()
    lowered = step.lower(weights, cache, hidden, tokens, PagedBatch(tables, starts, of_batch), of_batch, *images)
    return lowered, shards * CHUNK * _token_flops(config, row.length)


def _tower(row: Row, config: ModelConfig, layout: Layout) -> tuple[jax.stages.Lowered, float]:
    """Rows of the largest image, on every device; nothing of the decoder."""
    model, of = _model(config, layout), config.vision
    assert model.vision is not None
    assert of is not None
    graph, weights = nnx.split(model.vision)
    n = padded_patches((of.image_size // of.patch_size) ** 2, of)
    pixels = of.n_channels * of.patch_size**2
    patches = Patches(Struct((n, pixels), jnp.float32), Struct((n, 2), jnp.int32), Struct((n,), jnp.int32))
    patches = jax.tree.map(lambda x: Struct(x.shape, x.dtype, sharding=layout.sharding()), patches)
    return compiled_tower(graph, layout).lower(weights, patches), row.devices * _tower_flops(config, n)


def _long(row: Row, config: ModelConfig, layout: Layout) -> tuple[jax.stages.Lowered, float]:
    """Hidden states of whole sequences, split over the context axis."""
    model = _model(config, layout)
    graph, weights = nnx.split(text_alone(model))
    axes = ("batch", "sequence")
    tokens = Struct((row.batch, row.length), jnp.int32, sharding=layout.sharding(axes))
    out = layout.sharding((*axes, "act_embed"))
    step = jax.jit(lambda weights, tokens: nnx.merge(graph, weights).hidden(tokens), out_shardings=out)
    return step.lower(weights, tokens), row.batch * row.length * _mean_flops(config, row.length)


def _train(row: Row, config: ModelConfig, layout: Layout) -> tuple[jax.stages.Lowered, float]:
    """LoRA of rank 16 on all projections over a frozen base, one packed row per device, inputs of blocks kept."""
    from train.optimizer import Optimizer, OptimizerConfig
    from train.step import TrainStep, trained_specs

    model = Transformer(config, BFLOAT16, layout=layout)
    attach(model, LoraConfig(rank=16, alpha=32))
    stacked = StackedTransformer(model)
    step = TrainStep(stacked, Optimizer(OptimizerConfig(learning_rate=1e-4, steps=100), trained_specs(stacked)))
    state, batch = step.shapes(1, row.batch, row.length)
    # Forward, again forward for what was not kept, and the gradient of activations: of weights there is none.
    return step.lower(state, batch), 3 * row.batch * row.length * _mean_flops(config, row.length)


def _token_flops(config: ModelConfig, length: int) -> float:
    """Of one token at the end of `length`: 2 per weight that it passes, and what it costs to see a key, for each."""
    seen = sum(length if window is None else min(window, length) for window in config.windows)
    return 2.0 * _weights(config) + _key_flops(config) * seen


def _key_flops(config: ModelConfig) -> float:
    """Of one query and one cached key, all heads: a product with the key and one with the value."""
    latent = config.latent
    widths = latent.kv_rank + latent.rope_head_dim + latent.kv_rank if latent else 2 * config.head_dim
    return 2.0 * config.n_heads * widths


def _mean_flops(config: ModelConfig, length: int) -> float:
    """Of a token of a whole sequence, on average."""

    def seen(window: int | None) -> float:
        w = length if window is None else min(window, length)
        return w - w * (w - 1) / (2 * length)

    return 2.0 * _weights(config) + 4.0 * config.head_dim * config.n_heads * sum(map(seen, config.windows))


def _weights(config: ModelConfig) -> int:
    """Weights that a token is multiplied with: not the embeddings, of which it is a row."""
    return count_parameters(config).active - config.vocab_size * config.dim


def _tower_flops(config: ModelConfig, patches: int) -> float:
    """Of the vision tower and its adapter over one image: weights for every patch, the adapter's for every token."""
    count, vision = count_parameters(config), config.vision
    assert vision is not None
    attention = 4.0 * vision.dim * patches * vision.n_layers
    return patches * (2.0 * count.vision + attention + 2.0 * count.projector / vision.spatial_merge_size**2)
