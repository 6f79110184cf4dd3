"""What LoRA of an 8B model needs of an H200 that is not here, by its compiler; the goals in docs/finetuning.md."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None or jax.__version_info__ < (0, 11),
        reason="the CUDA plugin is missing, or jax is older than 0.11",
    ),
]
# Of the whole step at 2048 tokens and rank 16: arguments and temporaries.
MOST_BYTES = {"bfloat16": 22.0e9, "nf4": 8.7e9}
# Gradients, the inputs of blocks, one block's inside, a chunk of logits: no second copy of any weights.
MOST_TEMPORARY = 2.0e9


@pytest.mark.parametrize("base", MOST_BYTES)
def test_lora_of_8b_fits_in_what_is_promised(base: str) -> None:
    """In a process of its own, where shapes are not checked: the arguments are abstract."""
    command = [sys.executable, "benchmarks/aot_finetune.py", "--one", f"8b-h200-{base}-2k-full"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["device_bytes"] <= MOST_BYTES[base]
    assert found["temporary_bytes"] <= MOST_TEMPORARY
