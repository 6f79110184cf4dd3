"""Makes the golden values: runs transformers on the tiny models and stores what it answers. Needs the parity extra.

    python -m tests.golden.make_golden [name ...]

For each model, `<name>.npz` holds float32 `logits` [2, 80, V] of `models.token_ids`, the `greedy` continuation of two
`prompts`, chosen so that its two best logits are never close, and a `fingerprint` of the weights.
`<name>.config.json` is the config as transformers wrote it.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from .models import MODELS, GoldenModel, by_name, memory_weights, token_ids
from .values import GREEDY_TOKENS, MARGIN, PROMPT, fingerprint

FOLDER = Path(__file__).parent


def transformers_model(model: GoldenModel) -> Any:
    """The transformers model with the drawn weights, float32, attention written out."""
    config = getattr(transformers, model.config_class)(**model.transformers_arguments())
    config._attn_implementation = "eager"
    built = getattr(transformers, model.model_class)(config).to(torch.float32).eval()
    weights = {name: torch.from_numpy(array.copy()) for name, array in memory_weights(model).items()}
    if model.tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    built.load_state_dict(weights, strict=True)
    return built


def run(built: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits of whole sequences, one shot, without a cache."""
    with torch.no_grad():
        return built(torch.from_numpy(tokens).long(), use_cache=False).logits.float().numpy()


def greedy(built: Any, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts [2, PROMPT] and their likeliest continuations [2, GREEDY_TOKENS], the first drawn without a close call.

    Each token comes from scoring the whole text again, so that no cache takes part.
    """
    rng, rows = np.random.default_rng(0), []
    while len(rows) < 2:
        tokens = rng.integers(0, vocab_size, (1, PROMPT), dtype=np.int32)
        while tokens.shape[1] < PROMPT + GREEDY_TOKENS:
            logits = run(built, tokens)
            second, best = np.sort(logits[0, -1])[-2:]
            if best - second <= 2 * MARGIN * np.ptp(logits):
                break
            tokens = np.append(tokens, logits[:, -1:].argmax(axis=-1).astype(np.int32), axis=1)
        else:
            rows.append(tokens[0])
    return np.stack(rows)[:, :PROMPT], np.stack(rows)[:, PROMPT:]


def make(model: GoldenModel) -> None:
    """Writes the two files of one model, by way of a checkpoint that transformers saved and read again."""
    with tempfile.TemporaryDirectory() as folder:
        transformers_model(model).save_pretrained(folder)
        loader = getattr(transformers, model.model_class)
        built = loader.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
        prompts, continuation = greedy(built, model.native["vocab_size"])
        values = {
            "logits": run(built, token_ids(model)),
            "prompts": prompts,
            "greedy": continuation,
            "fingerprint": np.array(fingerprint(model)),
        }
        config = (Path(folder) / "config.json").read_text()
    partial = FOLDER / f".{model.name}.partial.npz"
    np.savez_compressed(partial, **values)
    os.replace(partial, FOLDER / f"{model.name}.npz")
    (FOLDER / f"{model.name}.config.json").write_text(config)
    print(f"{model.name}: range {np.ptp(values['logits']):.2f}")


def main(names: list[str]) -> None:
    torch.manual_seed(0)
    for model in [by_name(name) for name in names] or MODELS:
        make(model)


if __name__ == "__main__":
    main(sys.argv[1:])
