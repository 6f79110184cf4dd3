"""benchmarks/finetune.py on tiny sizes: it runs with few packages, and both sides take the same steps."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

CASE = "smoke-full"
# What a device machine may lack; None makes an import fail.
ABSENT = ("mistral_common", "pydantic", "grain", "orbax", "torch", "transformers", "peft")
ALONE = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
sys.argv = ["finetune.py", "--side", "ours", "--case", {CASE!r}]
from benchmarks import finetune
finetune.main()
"""


def test_our_side_needs_nothing_but_jax_and_what_trains() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", ALONE], capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": "."}
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    losses = json.loads(ended.stdout.splitlines()[-1])["losses"]
    assert len(losses) == 3
    assert losses[0] == pytest.approx(math.log(96), rel=0.02)  # nearly uniform over its words
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parity
@pytest.mark.filterwarnings("default")  # what other libraries warn about is not ours to fix
def test_both_sides_take_the_same_steps() -> None:
    pytest.importorskip("peft")
    from benchmarks import finetune

    ours, theirs = (finetune.SIDES[side](finetune.CASES[CASE]).losses for side in ("ours", "theirs"))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
