"""What a run on a tiny model needs on the disk, and what it left there. Holds no tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.checkpoint_files import tiny_config, write_tiny_checkpoint
from tests.tekken_files import write_tiny_tekken
from train.metrics import TRAIN_FILE


def write_base(folder: Path) -> None:
    """A model whose window the rows cross, its tokenizer, conversations and preferences."""
    write_tiny_checkpoint(folder, tiny_config("mistral_window", n_layers=2, vocab_size=320, max_length=64))
    write_tiny_tekken(folder)
    chats = [
        {"messages": [{"role": "user", "content": f"the {i}"}, {"role": "assistant", "content": f"thing {i % 3}"}]}
        for i in range(24)
    ]
    pairs = [{"prompt": f"the {i}", "chosen": f"thing {i % 3}", "rejected": f"no {i % 5}"} for i in range(24)]
    for name, lines in (("chats", chats), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def rows(run_dir: Path, name: str = TRAIN_FILE) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def learned(run_dir: Path) -> list[list[float]]:
    """What a row has that does not depend on the clock."""
    kept = ("step", "loss", "learning_rate", "gradient_norm", "tokens")
    return [[row[name] for name in kept] for row in rows(run_dir)]
