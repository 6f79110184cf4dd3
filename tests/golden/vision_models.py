"""Tiny models that read images, for the golden values: a text decoder of models.py, a Pixtral tower, drawn weights.

Names, shapes and row orders of both layouts are written out here once more: nothing of the project checks itself.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from .models import NORM_STD, VOCAB, WEIGHT_STD, GoldenModel, by_name, hf_weights, native_weights
from .values import FOLDER

IMAGE, BREAK, END = 10, 12, 13
# Height and width in pixels of the images of each case; text stands before, between and after them.
CASES = {"one": ((24, 16),), "three": ((16, 24), (40, 8), (8, 56))}


@dataclass(frozen=True, kw_only=True)
class VisionModel:
    """A decoder of models.py behind a tower. `native` is the block `vision_encoder` of params.json."""

    name: str
    text_name: str
    native: dict[str, Any]

    @property
    def text(self) -> GoldenModel:
        return by_name(self.text_name)

    @property
    def params(self) -> dict[str, Any]:
        """params.json."""
        return self.text.native | {"vision_encoder": self.native}

    @property
    def unit(self) -> int:
        """Pixels along one side of an image token."""
        return self.native["patch_size"] * self.native["spatial_merge_size"]


_TOWER = {
    "hidden_size": 32,
    "num_channels": 3,
    "image_size": 56,
    "max_image_size": 56,
    "patch_size": 4,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "rope_theta": 1e4,
    "image_token_id": IMAGE,
    "image_break_token_id": BREAK,
    "image_end_token_id": END,
}

VISION_MODELS = (
    # As Ministral 3.
    VisionModel(
        name="vision",
        text_name="ministral3",
        native=_TOWER
        | {
            "adapter_bias": False,
            "spatial_merge_size": 2,
            "add_pre_mm_projector_layer_norm": True,
            "mm_projector_id": "patch_merge",
        },
    ),
    # The same tower before a decoder that mistral-inference runs: no YaRN, no temperature.
    VisionModel(
        name="vision_plain",
        text_name="mistral",
        native=_TOWER
        | {
            "adapter_bias": False,
            "spatial_merge_size": 2,
            "add_pre_mm_projector_layer_norm": True,
            "mm_projector_id": "patch_merge",
        },
    ),
    # As Pixtral 12B: every patch is a token, biases, patches of eight pixels.
    VisionModel(
        name="vision_unmerged",
        text_name="mistral",
        native=_TOWER
        | {
            "patch_size": 8,
            "adapter_bias": True,
            "spatial_merge_size": 1,
            "add_pre_mm_projector_layer_norm": False,
            "mm_projector_id": "",
        },
    ),
)


def vision_by_name(name: str) -> VisionModel:
    return next(model for model in VISION_MODELS if model.name == name)


def vision_shapes(model: VisionModel) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the mistral layout beside the decoder's."""
    v, dim = model.native, model.text.native["dim"]
    D, F, p, m = v["hidden_size"], v["intermediate_size"], v["patch_size"], v["spatial_merge_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "vision_encoder.patch_conv.weight": (D, 3, p, p),
        "vision_encoder.ln_pre.weight": (D,),
        "vision_language_adapter.w_in.weight": (dim, D),
        "vision_language_adapter.w_out.weight": (dim, dim),
    }
    if v["adapter_bias"]:
        shapes |= {"vision_language_adapter.w_in.bias": (dim,), "vision_language_adapter.w_out.bias": (dim,)}
    if v["mm_projector_id"]:
        shapes["patch_merger.merging_layer.weight"] = (D, D * m * m)
    if v["add_pre_mm_projector_layer_norm"]:
        shapes["pre_mm_projector_norm.weight"] = (D,)
    for n in range(v["num_hidden_layers"]):
        stem = f"vision_encoder.transformer.layers.{n}"
        shapes |= {f"{stem}.attention.w{part}.weight": (D, D) for part in "qkvo"}
        shapes |= {f"{stem}.attention_norm.weight": (D,), f"{stem}.ffn_norm.weight": (D,)}
        shapes |= {f"{stem}.feed_forward.w{part}.weight": (F, D) for part in "13"}
        shapes[f"{stem}.feed_forward.w2.weight"] = (D, F)
    return shapes


def native_vision_weights(model: VisionModel) -> dict[str, np.ndarray]:
    """All weights, the decoder's too, in mistral order; drawn as those of models.py."""

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng(zlib.crc32(f"vision/{name}".encode()))
        values = rng.standard_normal(shape)
        around = 0.0 if name.endswith("bias") else 1.0
        return (around + NORM_STD * values if len(shape) == 1 else WEIGHT_STD * values).astype(np.float32)

    return native_weights(model.text) | {name: draw(name, shape) for name, shape in vision_shapes(model).items()}


_HF_WORDS = (
    ("vision_encoder.", "vision_tower."), ("pre_mm_projector_norm.", "multi_modal_projector.norm."),
    ("patch_merger.", "multi_modal_projector.patch_merger."),
    ("vision_language_adapter.w_in.", "multi_modal_projector.linear_1."),
    ("vision_language_adapter.w_out.", "multi_modal_projector.linear_2."),
    (".wq.", ".q_proj."), (".wk.", ".k_proj."), (".wv.", ".v_proj."), (".wo.", ".o_proj."),
    (".w1.", ".gate_proj."), (".w2.", ".down_proj."), (".w3.", ".up_proj."),
)  # fmt: skip


def hf_vision_weights(model: VisionModel) -> dict[str, np.ndarray]:
    """The same weights as transformers names and orders them."""
    text = {
        name if name.startswith("lm_head") else name.replace("model.", "model.language_model.", 1): weight
        for name, weight in hf_weights(model.text).items()
    }
    weights = native_vision_weights(model)
    for name in vision_shapes(model):
        stem = name
        for ours, theirs in _HF_WORDS:
            stem = stem.replace(ours, theirs)
        text[f"model.{stem}"] = _half_split(model, name, weights[name])
    return text


def _half_split(model: VisionModel, name: str, weight: np.ndarray) -> np.ndarray:
    """Rows of wq and wk regrouped per head: HF row `c * H/2 + j` is native row `2j + c`."""
    if not name.endswith(("wq.weight", "wk.weight")):
        return weight
    H = model.native["hidden_size"] // model.native["num_attention_heads"]
    return weight[[head + 2 * j + c for head in range(0, len(weight), H) for c in (0, 1) for j in range(H // 2)]]


def case_images(case: str) -> list[np.ndarray]:
    """Pixels [3, height, width] of a case's images, float32, about as wide as normalised ones."""
    rng = np.random.default_rng(zlib.crc32(f"images/{case}".encode()))
    return [rng.standard_normal((3, *size)).astype(np.float32) for size in CASES[case]]


def case_ids(model: VisionModel, case: str) -> np.ndarray:
    """Token ids of a case, int32 [T]: text, an image's rows with their breaks and end, text, ..."""
    rng = np.random.default_rng(zlib.crc32(f"ids/{case}".encode()))

    def text(n: int) -> list[int]:
        return rng.integers(END + 1, VOCAB, n).tolist()

    ids = text(5)
    for height, width in CASES[case]:
        row = [IMAGE] * (width // model.unit) + [BREAK]
        ids += [*(row * (height // model.unit))[:-1], END, *text(6)]
    return np.array(ids, np.int32)


def vision_fingerprint(model: VisionModel) -> int:
    """A checksum over weights, images and ids."""
    arrays = [*native_vision_weights(model).values()]
    for case in CASES:
        arrays += [*case_images(case), case_ids(model, case)]
    return zlib.crc32(b"".join(array.tobytes() for array in arrays))


def golden_vision_logits(model: VisionModel) -> dict[str, np.ndarray]:
    """Case -> stored logits [T, V]; refuses them if what is drawn today is other than when they were made."""
    with np.load(FOLDER / f"{model.name}.npz", allow_pickle=False) as stored:
        if int(stored["fingerprint"]) != vision_fingerprint(model):
            raise AssertionError(f"{model.name}: this numpy draws otherwise; run tests.golden.make_vision_golden again")
        return {case: stored[case] for case in CASES}


def write_vision_hf(model: VisionModel, folder: Path) -> Path:
    """The golden checkpoint as transformers writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text((FOLDER / f"{model.name}.config.json").read_text())
    save_file({n: np.ascontiguousarray(w) for n, w in hf_vision_weights(model).items()}, folder / "model.safetensors")
    return folder


def write_vision_native(model: VisionModel, folder: Path) -> Path:
    """The same weights in the mistral layout."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(model.params))
    save_file(native_vision_weights(model), folder / "consolidated.safetensors")
    return folder
