"""Trains an adapter on conversations from Python, and compares an answer before and after.

    python examples/finetune_instruct.py MODEL chats.jsonl RUN_DIR

The same as `ministral finetune`, for those who want to change something: every part below can be replaced.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import ministral_jax
from infer.generate import Generator
from infer.sampling import SamplingParams
from ministral_jax.checkpoints.hub import resolve
from ministral_jax.lora import LoraConfig
from ministral_jax.tokenizer import Tokenizer
from train.config import CheckpointConfig, RunConfig
from train.data.config import DataConfig
from train.metrics import progress_line
from train.optimizer import OptimizerConfig
from train.run import run

STEPS = 100
QUESTION = "Who are you?"


def configuration(model: str, chats: str, run_dir: str) -> RunConfig:
    """LoRA of rank 16 on every projection; YAML files have the same keys."""
    return RunConfig(
        model=model,
        run_dir=run_dir,
        data=DataConfig(instruct_data=chats),
        lora=LoraConfig(rank=16, alpha=32),
        optimizer=OptimizerConfig(learning_rate=1e-4, steps=STEPS, warmup_steps=STEPS // 20),
        seq_len=2048,
        batch_size=4,
        checkpoints=CheckpointConfig(every=25),
    )


def answer(model: str, adapter: Path | None) -> str:
    """To QUESTION, by the base model or with an adapter beside it."""
    words = Tokenizer.load(resolve(model))
    generator = Generator(ministral_jax.load(model, adapter=adapter), words)
    return generator.chat([{"role": "user", "content": QUESTION}], SamplingParams(max_tokens=64)).message.content


def main() -> None:
    """Trains, or goes on with the run in RUN_DIR."""
    model, chats, run_dir = sys.argv[1:]
    logging.basicConfig(format="%(message)s", force=True)  # in place of what imported packages have set up
    logging.getLogger("train").setLevel(logging.INFO)
    result = run(
        configuration(model, chats, run_dir),
        resume=Path(run_dir).exists(),
        report=lambda row: print(progress_line(row, STEPS)),
    )
    if result.result is None:
        print(f"stopped after step {result.step}; run this again to go on")
        return
    print("before:", answer(model, None))
    print("after: ", answer(model, result.result))


if __name__ == "__main__":
    main()
