"""Parameters and bytes, against published numbers, shapes written out tensor by tensor, and real arrays."""

import dataclasses
import json
import math

import jax.numpy as jnp
import pytest

from ministral_jax import catalog
from ministral_jax.cache import allocate_cache, plan_cache
from ministral_jax.config import ModelConfig, RopeConfig, VisionConfig
from ministral_jax.errors import RequestError
from ministral_jax.memory import count_parameters, plan_memory, weight_bytes
from ministral_jax.parameters import parameter_specs
from ministral_jax.transformer import Transformer

TINY = ModelConfig(
    dim=48,
    n_layers=8,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    hidden_dim=80,
    vocab_size=96,
    norm_eps=1e-5,
    rope=RopeConfig(theta=1e4),
    windows=(None, 32, 32, 32) * 2,
    max_length=4096,
)

Shapes = dict[str, tuple[int, ...]]


def checkpoint_shapes(config: ModelConfig) -> Shapes:
    """Every tensor of a mistral-layout checkpoint by name, as the published files hold them."""
    shapes: Shapes = {"tok_embeddings": (config.vocab_size, config.dim), "norm": (config.dim,)}
    if not config.tied_embeddings:
        shapes["output"] = (config.vocab_size, config.dim)
    for n in range(config.n_layers):
        layer = {"attention_norm": (config.dim,), "ffn_norm": (config.dim,)}
        layer |= latent_shapes(config) if config.latent else attention_shapes(config)
        layer |= expert_shapes(config, n)
        shapes |= {f"layers.{n}.{name}": shape for name, shape in layer.items()}
    return shapes | (vision_shapes(config.vision, config.dim) if config.vision else {})


def attention_shapes(config: ModelConfig) -> Shapes:
    q, k = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return {"wq": (q, config.dim), "wk": (k, config.dim), "wv": (k, config.dim), "wo": (config.dim, q)}


def latent_shapes(config: ModelConfig) -> Shapes:
    latent, n, dim = config.latent, config.n_heads, config.dim
    assert latent
    return {
        "wq_a": (latent.q_rank, dim),
        "q_a_norm": (latent.q_rank,),
        "wq_b": (n * (latent.nope_head_dim + latent.rope_head_dim), latent.q_rank),
        "wkv_a_with_mqa": (latent.kv_rank + latent.rope_head_dim, dim),
        "kv_a_norm": (latent.kv_rank,),
        "wkv_b": (n * (latent.nope_head_dim + latent.v_head_dim), latent.kv_rank),
        "wo": (dim, n * latent.v_head_dim),
    }


def feed_forward_shapes(prefix: str, hidden: int, dim: int) -> Shapes:
    return {f"{prefix}w1": (hidden, dim), f"{prefix}w3": (hidden, dim), f"{prefix}w2": (dim, hidden)}


def expert_shapes(config: ModelConfig, layer: int) -> Shapes:
    moe = config.moe
    if moe is None or layer < moe.first_dense_layers:
        return feed_forward_shapes("", config.hidden_dim, config.dim)
    shapes: Shapes = {"gate": (moe.n_experts, config.dim)}
    for expert in range(moe.n_experts):
        shapes |= feed_forward_shapes(f"experts.{expert}.", moe.expert_hidden_dim, config.dim)
    if moe.n_shared_experts:
        width = moe.n_shared_experts * moe.expert_hidden_dim
        shapes |= feed_forward_shapes("shared_experts.", width, config.dim)
    return shapes


def vision_shapes(vision: VisionConfig, dim: int) -> Shapes:
    h, f, p, m = vision.dim, vision.hidden_dim, vision.patch_size, vision.spatial_merge_size
    shapes: Shapes = {"vision.patch_conv": (h, 3, p, p), "vision.ln_pre": (h,)}
    for n in range(vision.n_layers):
        layer = {"wq": (h, h), "wk": (h, h), "wv": (h, h), "wo": (h, h), "attention_norm": (h,), "ffn_norm": (h,)}
        layer |= feed_forward_shapes("", f, h)
        shapes |= {f"vision.{n}.{name}": shape for name, shape in layer.items()}
    shapes |= {"projector.norm": (h,), "projector.merger": (h, h * m * m)}
    return shapes | {"projector.w_in": (dim, h), "projector.w_out": (dim, dim)}


# Tensors of the text decoder and of the vision tower with its adapter.
TENSORS = {
    "mistral-7b-v0.3": (291, 0),
    "mixtral-8x7b-v0.1": (995, 0),
    "mixtral-8x22b-v0.1": (1739, 0),
    "ministral-8b-2410": (327, 0),
    "ministral-3-3b-base-2512": (236, 222),
    "ministral-3-8b-base-2512": (309, 222),
    "ministral-3-14b-base-2512": (363, 222),
    "mistral-large-3-675b-base-2512": (23_065, 438),
}


@pytest.mark.parametrize("name", TENSORS)
def test_the_parameters_of_a_model_are_those_of_its_tensors(name: str) -> None:
    config = catalog.find(name).config
    shapes = checkpoint_shapes(config)
    of_images = [tensor for tensor in shapes if tensor.startswith(("vision", "projector"))]
    assert (len(shapes) - len(of_images), len(of_images)) == TENSORS[name]
    parameters = count_parameters(config)
    assert parameters.total == sum(map(math.prod, shapes.values()))
    assert parameters.vision + parameters.projector == sum(math.prod(shapes[name]) for name in of_images)


@pytest.mark.parametrize(("name", "projector"), [("3b", 16.8e6), ("8b", 25.2e6), ("14b", 35.7e6)])
def test_the_vision_tower_of_ministral_3_is_as_large_as_published(name: str, projector: float) -> None:
    parameters = count_parameters(catalog.find(f"ministral-3-{name}-base-2512").config)
    assert parameters.vision == 403_305_472
    assert parameters.projector == pytest.approx(projector, abs=0.05e6)


def test_a_token_passes_the_published_share_of_a_mixture() -> None:
    assert count_parameters(catalog.find("mistral-large-3-675b-base-2512").config).active == pytest.approx(
        39.9e9, abs=5e7
    )
    assert count_parameters(catalog.find("mixtral-8x7b-v0.1").config).active == pytest.approx(12.9e9, abs=5e7)
    dense = count_parameters(catalog.find("ministral-8b-2410").config)
    assert dense.active == dense.total


@pytest.mark.parametrize("tied", [True, False])
def test_a_built_decoder_has_the_counted_parameters_and_bytes(tied: bool) -> None:
    config = dataclasses.replace(TINY, tied_embeddings=tied)
    specs = parameter_specs(Transformer(config)).values()
    n = sum(math.prod(spec.shape) for spec in specs)
    assert count_parameters(config).total == n
    assert weight_bytes(config, "float32") == 4 * n
    assert weight_bytes(config, "bfloat16") == 2 * n


def test_quantised_bytes_are_payload_scales_and_the_rest_in_bfloat16() -> None:
    matrices = [(64, 48), (32, 48), (32, 48), (48, 64), (80, 48), (80, 48), (48, 80)]
    numbers = 8 * sum(rows * columns for rows, columns in matrices)
    rest = 2 * (count_parameters(TINY).total - numbers)
    assert weight_bytes(TINY, "fp8_tensor") == rest + numbers + 8 * 7 * 4
    assert weight_bytes(TINY, "int8_channel") == rest + numbers + 8 * 4 * sum(rows for rows, _ in matrices)
    assert weight_bytes(TINY, "fp8_block") == rest + numbers + 8 * 7 * 4  # no matrix is larger than a block
    groups = sum(rows * columns // 16 for rows, columns in matrices)
    assert weight_bytes(TINY, "fp8_channel") == weight_bytes(TINY, "int8_channel")
    constants = 8 * sum(rows * -(-columns // 64) for rows, columns in matrices)
    assert weight_bytes(TINY, "nf4") == rest + numbers // 2 + 4 * constants
    assert weight_bytes(TINY, "nvfp4") == rest + numbers // 2 + 8 * (groups + 7 * 4)


def test_blocks_at_the_border_have_a_scale_of_their_own() -> None:
    wide = dataclasses.replace(TINY, dim=130)  # two blocks wide
    per_layer = 2 * 7
    rest_and_payload = weight_bytes(wide, "fp8_tensor") - 4 * 8 * 7
    assert weight_bytes(wide, "fp8_block") == rest_and_payload + 4 * 8 * per_layer


def test_low_rank_projections_and_routers_stay_in_bfloat16() -> None:
    config = catalog.find("mistral-large-3-675b-base-2512").config
    kept = 58 * 128 * 7168 + 61 * (1536 + 576) * 7168  # routers, wq_a and wkv_a_with_mqa
    half = weight_bytes(config, "bfloat16") - weight_bytes(config, "fp8_channel")
    count = count_parameters(config)
    moved = count.experts + count.attention + count.feed_forward
    rows = 61 * (128 * 192 + 128 * 256 + 7168) + 3 * (2 * 16384 + 7168) + 58 * 129 * (2 * 4096 + 7168)
    assert half == moved - kept - 4 * rows


def test_one_scale_leaves_nothing_of_latent_attention_dense_and_nvfp4_leaves_all() -> None:
    config = catalog.find("mistral-large-3-675b-base-2512").config
    count, routers = count_parameters(config), 58 * 128 * 7168
    moved = count.experts + count.feed_forward - routers
    scales = 4 * (61 * 5 + 3 * 3 + 58 * 3 * 129)
    assert weight_bytes(config, "bfloat16") - weight_bytes(config, "fp8_tensor") == moved + count.attention - scales
    nvfp4 = moved // 2 + moved // 16 + 4 * (3 * 3 + 58 * 3 * 129)
    assert weight_bytes(config, "nvfp4") == 2 * (count.total - moved) + nvfp4


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200, 4096])
@pytest.mark.parametrize("chunk", [1, 64, 300])
@pytest.mark.parametrize("page_size", [16, 64])
def test_the_cache_is_as_large_as_the_one_that_is_allocated(length: int, chunk: int, page_size: int) -> None:
    plan = plan_memory(TINY, length=length, batch=3, chunk=chunk, page_size=page_size, cache_dtype="float32")
    sizes = {"batch": 3, "length": length, "chunk": chunk, "page_size": page_size}
    allocated = plan_cache(TINY, **sizes, dtype=jnp.dtype("float32"))
    assert plan.cache_bytes == allocated.n_bytes
    assert [group.n_bytes for group in plan.groups] == [group.n_bytes for group in allocated.groups]
    if length <= 200:
        assert plan.cache_bytes == allocate_cache(TINY, allocated, jnp.dtype("float32")).n_bytes


def test_a_windowed_group_keeps_its_window_and_a_full_one_everything() -> None:
    plan = plan_memory(TINY, length=4096, chunk=16, page_size=16)
    full, windowed = plan.groups
    assert (full.window, full.layers, full.tokens) == (None, (0, 4), 4096)
    assert (windowed.window, windowed.layers) == (32, (1, 2, 3, 5, 6, 7))
    assert 32 + 16 <= windowed.tokens <= 32 + 16 + 2 * 16
    assert plan.full_cache_bytes == 8 * full.n_bytes // 2
    assert plan.cache_bytes < plan.full_cache_bytes / 3


def test_ministral_8b_at_its_full_length_keeps_seven_sixteenths_of_a_full_cache() -> None:
    plan = plan_memory(catalog.find("ministral-8b-2410").config, chunk=64)
    per_token = 2 * 8 * 128 * 2
    assert plan.length == 131072
    assert plan.full_cache_bytes == pytest.approx(36 * 131072 * per_token, rel=1e-3)
    assert plan.cache_bytes == pytest.approx((9 * 131072 + 27 * 32768) * per_token, rel=1e-2)


def test_latent_attention_keeps_the_latent_and_one_rotated_key() -> None:
    plan = plan_memory(catalog.find("mistral-large-3-675b-base-2512").config, length=64 * 100, page_size=64)
    assert plan.cache_bytes == 61 * (64 * 100 + 64) * 576 * 2
    assert (
        plan_memory(
            catalog.find("mistral-large-3-675b-base-2512").config, length=64 * 100, page_size=64, platform="tpu"
        ).cache_bytes
        == 61 * (64 * 100 + 64) * 640 * 2
    )


def test_the_plan_is_json() -> None:
    plan = plan_memory(TINY, batch=2)
    document = json.loads(json.dumps(plan.to_json()))
    assert document["parameters"]["total"] == plan.parameters.total
    assert document["cache_bytes"] == sum(group["n_bytes"] for group in document["groups"])
    assert document["groups"][0]["layers"] == [0, 4]
    assert (document["batch"], document["length"]) == (2, 4096)


@pytest.mark.parametrize("size", ["length", "batch", "chunk", "page_size"])
def test_a_size_that_is_not_positive_is_refused_by_name(size: str) -> None:
    with pytest.raises(RequestError, match=f"{size}=0"):
        plan_memory(TINY, **{size: 0})
