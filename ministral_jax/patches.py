"""Pixels to packed patches, on the host: what the vision tower is fed. Imports no image library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .config import VisionConfig
from .errors import RequestError
from .vision import Patches

# One program is compiled per power of two, and one and a half of one, from the smallest to the largest.
FEWEST_PATCHES = 256
# Of one call, unless a single image has more. Activations of a tower of width 1024 then take a gigabyte in bfloat16, by
# what the compiler for a v6e says.
MOST_PATCHES = 16384


@dataclass(frozen=True, eq=False)
class PackedImages:
    """Patches of neighbouring images in one row, and how many image tokens each image has."""

    patches: Patches
    tokens: tuple[int, ...]


def image_grid(image: np.ndarray, config: VisionConfig) -> tuple[int, int]:
    """Rows and columns of image tokens of pixels [channel, height, width].

    Raises RequestError for pixels that the tower cannot take.
    """
    unit = config.patch_size * config.spatial_merge_size
    most = -(-config.image_size // unit) * unit
    if image.ndim != 3 or image.shape[0] != config.n_channels:
        raise RequestError(
            f"image pixels of shape {list(image.shape)}: expected [{config.n_channels}, height, width], as "
            "Tokenizer.encode_chat gives them"
        )
    _, height, width = image.shape
    if not (height and width) or height % unit or width % unit or max(height, width) > most:
        raise RequestError(
            f"an image of {width} x {height} pixels: expected multiples of {unit} up to {most}; the tokenizer file and "
            "the model's config disagree about images"
        )
    return height // unit, width // unit


def image_tokens(image: np.ndarray, config: VisionConfig) -> int:
    """How many image tokens stand for these pixels, breaks and end not counted."""
    rows, columns = image_grid(image, config)
    return rows * columns


def pack_images(images: Sequence[np.ndarray], config: VisionConfig) -> Iterator[PackedImages]:
    """Images (float32 [channel, height, width]) as rows of patches, in order, a few images to a row."""
    per_token = config.spatial_merge_size**2
    group: list[np.ndarray] = []
    patches = 0
    for image in images:
        more = image_tokens(image, config) * per_token
        if group and patches + more > MOST_PATCHES:
            yield _packed(group, config)
            group, patches = [], 0
        group.append(image)
        patches += more
    if group:
        yield _packed(group, config)


def padded_patches(n: int, config: VisionConfig) -> int:
    """The bucket of `n` patches: the next power of two or one and a half of one, in whole image tokens."""
    power = max(FEWEST_PATCHES, 1 << (n - 1).bit_length())
    size = power * 3 // 4 if n <= power * 3 // 4 and power > FEWEST_PATCHES else power
    square = config.spatial_merge_size**2
    return -(-size // square) * square


def _packed(images: Sequence[np.ndarray], config: VisionConfig) -> PackedImages:
    cut = [_patches_of(image, config) for image in images]
    counts = [len(pixels) for pixels, _ in cut]
    spare = padded_patches(sum(counts), config) - sum(counts)
    pixels = np.concatenate([pixels for pixels, _ in cut])
    places = np.concatenate([places for _, places in cut])
    patches = Patches(
        np.pad(pixels, ((0, spare), (0, 0))),
        np.pad(places, ((0, spare), (0, 0))),
        np.repeat(np.arange(len(images) + 1, dtype=np.int32), [*counts, spare]),
    )
    return PackedImages(patches, tuple(n // config.spatial_merge_size**2 for n in counts))


def _patches_of(image: np.ndarray, config: VisionConfig) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [n, channel * p * p] of every patch and its place [n, 2], the patches of a square after one another."""
    p, m = config.patch_size, config.spatial_merge_size
    rows, columns = image_grid(image, config)
    squares = image.astype(np.float32).reshape(-1, rows, m, p, columns, m, p)
    pixels = squares.transpose(1, 4, 2, 5, 0, 3, 6).reshape(rows * columns * m * m, -1)  # [row, col, ky, kx, C, p, p]
    grid = np.stack(np.meshgrid(np.arange(rows * m), np.arange(columns * m), indexing="ij"), axis=-1)
    places = grid.reshape(rows, m, columns, m, 2).transpose(0, 2, 1, 3, 4).reshape(-1, 2)
    return pixels, places.astype(np.int32)
