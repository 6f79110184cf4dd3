"""Images of prompts as rows beside token embeddings: runs the vision tower, finds the tokens that rows stand for."""

from __future__ import annotations

import functools
import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ministral_jax.config import VisionConfig
from ministral_jax.errors import RequestError
from ministral_jax.patches import image_tokens, pack_images
from ministral_jax.sharding.layout import Layout
from ministral_jax.transformer import Transformer
from ministral_jax.vision import Patches
from ministral_jax.vision_adapter import ImageRows, Vision, on_every_device

# Rows of images that were read before, kept for the next turn: 25 of the largest ones at a width of 5120 in bfloat16.
KEPT_BYTES = 768 * 2**20

Images = Sequence[np.ndarray]


class ImageReader:
    """What a model reads images with, and the rows of the images it read last.

    Rows are kept on the host: a conversation shows its images again with every turn, and a chunk of a prompt takes a
    few hundred of them.
    """

    def __init__(self, vision: Vision, layout: Layout | None) -> None:
        self.config: VisionConfig = vision.config
        self._layout = layout
        graph, self._weights = nnx.split(vision)
        self._run = compiled_tower(graph, layout)
        self._kept: OrderedDict[bytes, np.ndarray] = OrderedDict()

    def rows(self, images: Images) -> list[np.ndarray]:
        """For each image its rows [tokens, D], in the dtype of the weights."""
        keys = [_digest(image) for image in images]
        new = {key: image for key, image in zip(keys, images, strict=True) if key not in self._kept}
        found = {key: self._kept[key] for key in keys if key in self._kept}
        unnamed = iter(list(new))
        for packed in pack_images(list(new.values()), self.config):
            rows = np.asarray(jax.device_get(self._run(self._weights, packed.patches)))
            for part in np.split(rows[: sum(packed.tokens)], np.cumsum(packed.tokens)[:-1]):
                found[next(unnamed)] = part
        for key, rows in found.items():
            self._keep(key, rows)
        return [found[key] for key in keys]

    def _keep(self, key: bytes, rows: np.ndarray) -> None:
        self._kept[key] = rows
        self._kept.move_to_end(key)
        while sum(kept.nbytes for kept in self._kept.values()) > KEPT_BYTES and len(self._kept) > 1:
            self._kept.popitem(last=False)


@functools.lru_cache(maxsize=16)
def compiled_tower(graph: Any, layout: Layout | None) -> Any:
    """Patches to rows, for every tower with this nnx graph; one program for each number of patches."""

    def run(weights: Any, patches: Patches) -> Float[Array, "rows D"]:
        vision: Vision = nnx.merge(graph, weights)
        return vision(patches) if layout is None else on_every_device(vision, patches, layout)

    return jax.jit(run)


def _digest(image: np.ndarray) -> bytes:
    return hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image, np.float32).tobytes()).digest()


def check_images(config: VisionConfig | None, ids: Sequence[int], images: Images, name: str) -> None:
    """Raises RequestError unless the prompt `name` has as many image tokens as its images have rows."""
    if not len(images):
        return
    if config is None:
        raise RequestError(f"{name} has {len(images)} images: this model reads text only")
    wanted = sum(image_tokens(image, config) for image in images)
    found = int((np.asarray(ids) == config.image_token).sum())
    if found != wanted:
        raise RequestError(
            f"{name} has {found} image tokens (id {config.image_token}), its {len(images)} images have {wanted}: "
            "expected as many; the tokenizer file and the model's config disagree about images"
        )


def images_of_prompts(
    config: VisionConfig | None, prompts: Sequence[Sequence[int]], images: Sequence[Images] | None
) -> Sequence[Images]:
    """For each prompt its images, none where `images` is None. Raises RequestError as `check_images` does."""
    if images is None:
        return [()] * len(prompts)
    if len(images) != len(prompts):
        raise RequestError(f"images for {len(images)} prompts, of which there are {len(prompts)}")
    for i, (prompt, own) in enumerate(zip(prompts, images, strict=True)):
        check_images(config, prompt, own, f"prompt {i}")
    return images


class PromptImages:
    """The image tokens of one prompt: where they stand, and the row of each."""

    def __init__(self, reader: ImageReader, ids: np.ndarray, images: Images) -> None:
        self.places = np.flatnonzero(ids == reader.config.image_token)  # [rows]
        self.rows = np.concatenate(reader.rows(images))  # [rows, D]

    def copy_into(self, rows: np.ndarray, present: np.ndarray, start: int, stop: int) -> None:
        """Writes the rows of tokens `start .. stop - 1` of the prompt into `rows` [stop - start, D], and marks them."""
        first, last = np.searchsorted(self.places, (start, stop))
        at = self.places[first:last] - start
        rows[at] = self.rows[first:last]
        present[at] = True


def chunk_rows(
    images: Mapping[int, PromptImages],
    done: np.ndarray,
    counts: np.ndarray,
    starts: np.ndarray,
    size: tuple[int, int],
    dtype: DTypeLike,
) -> ImageRows | None:
    """What stands in for the image tokens of one chunk, on the host; None if it has none of them.

    `images` by sequence. Sequence b adds `counts[b]` tokens to the `done[b]` before; those of shard s begin in its rows
    at `starts[s]`, and it has `size` = (rows, D).
    """
    shards = len(starts)
    rows, present = np.zeros((shards, *size), dtype), np.zeros((shards, size[0]), bool)
    for b, prompt in images.items():
        shard, i = divmod(b, len(counts) // shards)
        own = slice(starts[shard, i], starts[shard, i + 1])
        prompt.copy_into(rows[shard, own], present[shard, own], int(done[b]), int(done[b] + counts[b]))
    if not present.any():
        return None
    return ImageRows(rows.reshape(-1, size[1]), present.reshape(-1))


def prompt_rows(model: Transformer, ids: Sequence[int], images: Images, length: int | None = None) -> ImageRows:
    """The rows of one whole sequence, [1, T, D], for `Transformer.hidden`; T is `length`, or as many as there are ids.

    Raises RequestError as `check_images` does.
    """
    vision = model.vision
    check_images(model.config.vision, ids, images, "the sequence")
    if vision is None:
        raise RequestError("this model reads text only: no vision tensors were loaded")
    tokens = np.asarray(ids, np.int32)
    rows = np.zeros((length or len(tokens), model.config.dim), model.norm.weight[...].dtype)
    present = np.zeros(len(rows), bool)
    PromptImages(ImageReader(vision, model.layout), tokens, images).copy_into(rows, present, 0, len(tokens))
    return ImageRows(jnp.asarray(rows[None]), jnp.asarray(present[None]))


def text_alone(model: Transformer) -> Transformer:
    """A second model around the same arrays, without what reads images: what prefill and decode are compiled for."""
    if model.vision is None:
        return model
    text = nnx.merge(*nnx.split(model))
    text.vision_encoder = text.pre_mm_projector_norm = text.patch_merger = text.vision_language_adapter = None
    return text
