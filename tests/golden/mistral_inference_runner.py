"""mistral-inference on a CPU: its model, with the one kernel that has no CPU version written out. For the parity leg.

Needs torch, and mistral_inference 1.6.0, xformers 0.0.35, simple-parsing and fire without their own dependencies.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file


def _attention(torch: Any) -> Any:
    """Softmax attention [1, T, N, H] under an xformers bias, which is materialised: the CPU has no fused kernel.

    The vision tower makes a bias and does not hand it on: patches of all images see each other.
    """

    def attend(q: Any, k: Any, v: Any, bias: Any) -> Any:
        shape = (q.shape[1], k.shape[1])
        mask = 0.0 if bias is None else bias.materialize(shape, dtype=q.dtype, device=q.device)
        scores = torch.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5 + mask
        return torch.einsum("bnts,bsnh->btnh", torch.softmax(scores, dim=-1), v).contiguous()

    return attend


def run_mistral_inference(
    folder: Path,
    sequences: np.ndarray,
    chunks: list[int],
    *,
    images: Sequence[np.ndarray] = (),
    lora: Path | None = None,
    scaling: float = 2.0,
    rank: int | None = None,
) -> np.ndarray:
    """Logits [B, T, V] of equally long sequences, fed to its cache in `chunks`; skips where it is not installed.

    The model is that of `params.json` and `consolidated.safetensors` in `folder`, with the adapter in the file `lora`
    merged into it, or beside it where its `rank` is given. `images` are those of the first chunk.
    """
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("mistral_inference")
        from mistral_inference import transformer_layers
        from mistral_inference.args import TransformerArgs, VisionEncoderArgs
        from mistral_inference.cache import BufferCache
        from mistral_inference.lora import LoraArgs
        from mistral_inference.transformer import Transformer
    B, T = sequences.shape
    params = json.loads((folder / "params.json").read_text())
    if "vision_encoder" in params:
        known = {field.name for field in dataclasses.fields(VisionEncoderArgs)}
        params["vision_encoder"] = {key: value for key, value in params["vision_encoder"].items() if key in known}
    args = TransformerArgs.from_dict(params)
    args.max_batch_size = B
    args.lora = LoraArgs(rank=rank, scaling=scaling) if rank else None
    model = Transformer(args)
    weights = load_file(folder / "consolidated.safetensors")
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    if lora is not None:
        model.load_lora(lora, scaling=scaling)
    cache = BufferCache(args.n_layers, B, T, args.n_kv_heads, args.head_dim, args.sliding_window)
    for pool in (*cache.cache_k.values(), *cache.cache_v.values()):
        pool.zero_()  # it is uninitialised, and the list window reads what was never written
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(transformer_layers, "memory_efficient_attention", _attention(torch))
        parts, shown = [], [torch.from_numpy(image) for image in images]
        for part in np.split(sequences, np.cumsum(chunks)[:-1], axis=1):
            tokens = torch.from_numpy(np.ascontiguousarray(part)).long().flatten()
            logits = model(tokens, seqlens=[part.shape[1]] * B, cache=cache, images=None if parts else shown)
            parts.append(logits.reshape(B, part.shape[1], -1).numpy())
    return np.concatenate(parts, axis=1)
