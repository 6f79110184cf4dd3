"""The other side of finetune.py: the same LoRA step in transformers, PEFT and torch, of the same weights and batch."""

from __future__ import annotations

import os
import re
from importlib.metadata import version
from typing import Any

from benchmarks.finetune import ALPHA_PER_RANK, CLIP, RATE, STD, Case, Measured, batch_of, config_of, host_peak, timed
from benchmarks.finetune import weight_key as key_of
from ministral_jax.checkpoints.translate import HF_PARTS
from ministral_jax.lora import HF_PROJECTIONS

OUR_PARTS = {theirs: ours for ours, theirs in HF_PARTS.items()}
MASK = 0xFFFFFFFF


def our_name(theirs: str) -> str | None:
    """The mistral layout's name of one of PEFT's parameters; None for what is not drawn, norms and B."""
    name = theirs.removeprefix("base_model.model.").removeprefix("model.")
    if name == "lm_head.weight":
        return "output.weight"
    if name == "embed_tokens.weight":
        return "tok_embeddings.weight"
    match = re.fullmatch(r"layers\.(\d+)\.(.*?)\.(base_layer\.weight|lora_A\.default\.weight|weight)", name)
    if match is None or match[2] not in OUR_PARTS or match[2].endswith("layernorm"):
        return None
    return f"layers.{match[1]}.{OUR_PARTS[match[2]]}.{'lora_a' if 'lora' in match[3] else 'weight'}"


def hashed(torch: Any, name: str, like: Any) -> Any:
    """finetune.py's numbers for this name, in the shape, dtype and place of `like`."""
    h = torch.arange(like.numel(), dtype=torch.int64, device=like.device)
    h = h.mul_(2654435761).add_(key_of(name)).bitwise_and_(MASK)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = h.bitwise_xor_(h >> shift).mul_(factor).bitwise_and_(MASK)
    share = (h >> 8).to(torch.float32) * 2.0**-24
    return ((share - 0.5) * (2 * 3**0.5 * STD)).to(like.dtype).reshape(like.shape)


def model_of(torch: Any, case: Case, device: str, attention: str) -> Any:
    """The peer's model with its adapters, and the numbers of ours."""
    import peft
    import transformers

    config = config_of(case)
    settings: Any = transformers.MistralConfig  # its keywords are checked when it is called
    shape = settings(
        hidden_size=config.dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.hidden_dim,
        vocab_size=config.vocab_size,
        sliding_window=None,
        max_position_embeddings=config.max_length,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
        tie_word_embeddings=config.tied_embeddings,
        attn_implementation=attention,
    )
    torch.set_default_dtype(getattr(torch, case.base))
    with torch.device(device):
        model: Any = transformers.MistralForCausalLM(shape)
    torch.set_default_dtype(torch.float32)
    if case.remat == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    adapters = peft.LoraConfig(
        r=case.rank, lora_alpha=ALPHA_PER_RANK * case.rank, target_modules=list(HF_PROJECTIONS), lora_dropout=0.0
    )
    model = peft.get_peft_model(model, adapters)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            ours = our_name(name)
            if ours is not None:
                parameter.copy_(hashed(torch, ours, parameter))
    return model.train()


def attention_of(torch: Any, device: str) -> str:
    """The fastest that transformers can use here for packed rows."""
    if device == "cuda":
        try:
            import flash_attn  # noqa: F401
        except ImportError:
            return "sdpa"
        return "flash_attention_2"
    return "sdpa"


def measure(case: Case) -> Measured:
    """Steps as transformers' Trainer takes them: autocast over a bfloat16 base, loss over labels, clipping, AdamW."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    attention = attention_of(torch, device)
    before = host_peak()
    model = model_of(torch, case, device, attention)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=device == "cuda")
    batch = batch_of(case, config_of(case).vocab_size)
    tokens, positions = (torch.from_numpy(array[0]).long().to(device) for array in (batch.tokens, batch.positions))
    labels = tokens.where(positions > 0, -100)  # the first of a document is predicted by nothing

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=case.base == "bfloat16"):
            loss = model(input_ids=tokens, position_ids=positions, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    def warmed() -> None:
        host_peak(reset=True)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    seconds, cpu, losses = timed(step, case.steps, warmed)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else host_peak() - before
    names = ", ".join(f"{name} {version(name)}" for name in ("transformers", "peft", "torch"))
    note = f"{names}, {attention}, {os.environ.get('OMP_NUM_THREADS') or torch.get_num_threads()} threads"
    return Measured(seconds, cpu, losses, peak, note=note)
