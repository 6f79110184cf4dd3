"""Makes the golden values of the models that read images: what transformers answers. Needs the parity extra.

    python -m tests.golden.make_vision_golden

`<name>.npz` holds the float32 logits [T, V] of each case of `vision_models.CASES` and a fingerprint of weights, images
and ids; `<name>.config.json` is the config as transformers wrote it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from .values import FOLDER
from .vision_models import (
    CASES,
    IMAGE,
    VisionModel,
    case_ids,
    case_images,
    hf_vision_weights,
    vision_by_name,
    vision_fingerprint,
)

STORED = ("vision",)


def transformers_vision_model(model: VisionModel) -> Any:
    """Mistral3ForConditionalGeneration with the drawn weights, float32, attention written out."""
    text, v = model.text, model.native
    config = transformers.Mistral3Config(
        text_config=getattr(transformers, text.config_class)(**text.transformers_arguments()),
        vision_config=transformers.PixtralVisionConfig(
            hidden_size=v["hidden_size"],
            intermediate_size=v["intermediate_size"],
            num_hidden_layers=v["num_hidden_layers"],
            num_attention_heads=v["num_attention_heads"],
            image_size=v["image_size"],
            patch_size=v["patch_size"],
            hidden_act="silu",
        ),
        image_token_index=IMAGE,
        spatial_merge_size=v["spatial_merge_size"],
        vision_feature_layer=-1,
        multimodal_projector_bias=v["adapter_bias"],
        tie_word_embeddings=False,
    )
    config._attn_implementation = "eager"
    built = transformers.Mistral3ForConditionalGeneration(config).to(torch.float32).eval()
    weights = {name: torch.from_numpy(array.copy()) for name, array in hf_vision_weights(model).items()}
    built.load_state_dict(weights, strict=True)
    return built


def run_vision(built: Any, ids: np.ndarray, images: list[np.ndarray]) -> np.ndarray:
    """Logits [T, V] of one sequence with its images, one shot, without a cache."""
    sizes = [image.shape[1:] for image in images]
    most = np.max(sizes, axis=0)
    pixels = [
        np.pad(image, ((0, 0), (0, most[0] - h), (0, most[1] - w))) for image, (h, w) in zip(images, sizes, strict=True)
    ]
    with torch.no_grad():
        answer = built(
            input_ids=torch.from_numpy(ids[None]).long(),
            pixel_values=torch.from_numpy(np.stack(pixels)),
            image_sizes=torch.tensor(sizes),
            use_cache=False,
        )
    return answer.logits[0].float().numpy()


def make(model: VisionModel) -> None:
    """Writes the two files of one model, by way of a checkpoint that transformers saved and read again."""
    with tempfile.TemporaryDirectory() as folder:
        transformers_vision_model(model).save_pretrained(folder)
        loader = transformers.Mistral3ForConditionalGeneration
        built = loader.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
        values = {case: run_vision(built, case_ids(model, case), case_images(case)) for case in CASES}
        config = (Path(folder) / "config.json").read_text()
    partial = FOLDER / f".{model.name}.partial.npz"
    np.savez_compressed(partial, fingerprint=np.array(vision_fingerprint(model)), **values)
    os.replace(partial, FOLDER / f"{model.name}.npz")
    (FOLDER / f"{model.name}.config.json").write_text(config)
    print(f"{model.name}: ranges {', '.join(f'{np.ptp(logits):.2f}' for logits in values.values())}")


if __name__ == "__main__":
    for name in STORED:
        make(vision_by_name(name))
