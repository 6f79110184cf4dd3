"""The vision tower on one device against transformers' in the same run: seconds an image, floors from its operations.

    python benchmarks/vision.py [--dtype float32] [--layers 4] [--sizes 448x448 ...] [--smoke]

A tower as wide as the published ones (1024, 16 heads, patches of 14), of fewer layers where asked for, with random
weights, and the adapter of Ministral 3 8B. Both sides run in this process, one after the other. `floor` is what the
products of all patches would take at the rate of one square product measured here; attention's is added to it. The
batch is the same images in one call.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from timing import RESULTS, best_seconds, machine, write

from ministral_jax.config import VisionConfig
from ministral_jax.norm import RMSNorm
from ministral_jax.parameters import ParameterSpec, fill
from ministral_jax.patches import pack_images
from ministral_jax.vision import VisionEncoder
from ministral_jax.vision_adapter import PatchMerger, Vision, VisionLanguageAdapter


@dataclass(frozen=True)
class Row:
    """One batch of images: seconds of a call, what counting allows, and a peer's."""

    images: str
    patches: int
    padded: int
    seconds: float
    floor: float
    transformers: float | None

    @property
    def ratio(self) -> float:
        return self.seconds / self.floor


def tower(layers: int, width: int) -> VisionConfig:
    """As in Ministral 3, narrower for a smoke run."""
    return VisionConfig(
        dim=width,
        n_layers=layers,
        n_heads=width // 64,
        hidden_dim=4 * width,
        patch_size=14,
        image_size=1540,
        patch_merge=True,
        spatial_merge_size=2,
        pre_projector_norm=True,
    )


def random_vision(config: VisionConfig, dim: int, dtype: jnp.dtype) -> Vision:
    """Everything that reads images, with weights of no meaning."""
    rng = np.random.default_rng(0)
    abstract = Vision(
        VisionEncoder(config, dtype),
        RMSNorm(config.dim, config.norm_eps, dtype),
        PatchMerger(config, dtype),
        VisionLanguageAdapter(config, dim, dtype),
        "auto",
    )

    def draw(name: str, spec: ParameterSpec) -> jax.Array:
        values = rng.standard_normal(spec.shape, np.float32) * 0.02
        return jnp.asarray(1.0 + values if spec.init == "ones" else values, dtype)

    return fill(abstract, draw)


def operations(config: VisionConfig, dim: int, counts: list[int]) -> tuple[float, float]:
    """Multiplications and additions of all products, and of attention, for images of so many patches."""
    D, F, square = config.dim, config.hidden_dim, config.spatial_merge_size**2
    layer = 4 * D * D + 3 * D * F
    patch = config.n_channels * config.patch_size**2 * D + config.n_layers * layer + D * D
    token = D * dim + dim * dim
    products = 2.0 * sum(counts) * (patch + token / square)
    return products, 4.0 * D * config.n_layers * sum(n * n for n in counts)


def rate_of_products(dtype: jnp.dtype, budget: float) -> float:
    """Operations per second of a product of 2048 rows, as wide as the tower's widest."""
    x, w = jnp.ones((2048, 1024), dtype), jnp.ones((4096, 1024), dtype)
    product = jax.jit(lambda x, w: x @ w.T)
    return 2.0 * 2048 * 1024 * 4096 / best_seconds(lambda: product(x, w), jax.block_until_ready, budget)


def measure(config: VisionConfig, dim: int, dtype: jnp.dtype, sizes: list[tuple[int, int]], budget: float) -> float:
    """Seconds of reading these images in one call, packing included."""
    graph, weights = nnx.split(random_vision(config, dim, dtype))
    run = jax.jit(lambda weights, patches: nnx.merge(graph, weights)(patches))
    images = [np.ones((3, *size), np.float32) for size in sizes]
    return best_seconds(
        lambda: [run(weights, packed.patches) for packed in pack_images(images, config)],
        jax.block_until_ready,
        budget,
    )


def measure_transformers(
    config: VisionConfig, dim: int, dtype: str, sizes: list[tuple[int, int]], budget: float
) -> float | None:
    """The same tower and projector of transformers, with its fused attention; None where it is not installed."""
    try:
        import torch
        from transformers import Mistral3Config, MistralConfig, PixtralVisionConfig
        from transformers.models.mistral3.modeling_mistral3 import Mistral3MultiModalProjector
        from transformers.models.pixtral.modeling_pixtral import PixtralVisionModel
    except ImportError:
        return None
    vision = PixtralVisionConfig(
        hidden_size=config.dim,
        intermediate_size=config.hidden_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_act="silu",
        attn_implementation="sdpa",
    )
    both = Mistral3Config(text_config=MistralConfig(hidden_size=dim), vision_config=vision)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = PixtralVisionModel(vision).to(device, getattr(torch, dtype)).eval()
    projector = Mistral3MultiModalProjector(both).to(device, getattr(torch, dtype)).eval()
    most = np.max(sizes, axis=0)
    pixels = torch.ones((len(sizes), 3, *most), dtype=getattr(torch, dtype), device=device)

    def run() -> Any:
        with torch.inference_mode():
            states = model(pixels, image_sizes=torch.tensor(sizes)).last_hidden_state
            return projector(states.squeeze(0), torch.tensor(sizes))

    def wait(_: Any) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    return best_seconds(run, wait, budget)


def size(text: str) -> tuple[int, int]:
    """Height and width of "448x616", multiples of a token's side."""
    with contextlib.suppress(ValueError):
        height, width = map(int, text.split("x"))
        if height > 0 and width > 0 and height % 28 == 0 and width % 28 == 0:
            return height, width
    raise argparse.ArgumentTypeError(f"{text!r}: expected HEIGHTxWIDTH, multiples of 28")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--sizes", nargs="+", type=size, default=[(448, 448), (896, 616)])
    parser.add_argument("--together", type=int, default=4, help="images of the first size in the last row")
    parser.add_argument("--budget", type=float, default=5.0, help="seconds for each measurement")
    parser.add_argument("--smoke", action="store_true", help="tiny: checks the script, measures nothing of worth")
    arguments = parser.parse_args()
    width, dim = (128, 64) if arguments.smoke else (1024, 4096)
    config = tower(1 if arguments.smoke else arguments.layers, width)
    sizes = [(56, 84)] if arguments.smoke else arguments.sizes
    dtype = jnp.dtype(arguments.dtype)
    rate, rows = rate_of_products(dtype, arguments.budget), []
    for batch in [*([one] for one in sizes), [sizes[0]] * arguments.together]:
        counts = [height * width // 196 for height, width in batch]
        padded = sum(len(packed.patches.pixels) for packed in pack_images([np.zeros((3, *s)) for s in batch], config))
        floor = sum(operations(config, dim, counts)) / rate
        seconds = measure(config, dim, dtype, batch, arguments.budget)
        peer = measure_transformers(config, dim, arguments.dtype, batch, arguments.budget)
        name = f"{len(batch)} x {batch[0][0]}x{batch[0][1]}"
        rows.append(Row(name, sum(counts), padded, seconds, floor, peer))
    report(rows, config, rate, arguments)


def report(rows: list[Row], config: VisionConfig, rate: float, arguments: argparse.Namespace) -> None:
    """Prints the table and keeps it, unless it was a smoke run."""
    print(f"{arguments.dtype}, {config.n_layers} layers; products run at {rate / 1e9:.0f} Gop/s here")
    print(f"{'images':>16}{'patches':>9}{'padded':>8}{'seconds':>9}{'floor':>9}{'ratio':>7}{'transformers':>14}")
    for row in rows:
        peer = "-" if row.transformers is None else f"{row.transformers:.3f}"
        print(
            f"{row.images:>16}{row.patches:>9}{row.padded:>8}{row.seconds:>9.3f}{row.floor:>9.3f}{row.ratio:>7.2f}{peer:>14}"
        )
    if arguments.smoke:
        return
    record = {
        **machine(),
        "measured": time.strftime("%H:%M"),
        "dtype": arguments.dtype,
        "tower": asdict(config),
        "operations_per_second": rate,
        "rows": [asdict(row) for row in rows],
    }
    write(RESULTS / f"vision_{jax.default_backend()}_{arguments.dtype}.json", record)


if __name__ == "__main__":
    main()
