"""What a compiled LoRA step multiplies, counted in its HLO: nothing for frozen weights, and no logits twice."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.compiled_loops import product_flops
from ministral_jax.quantization import LinearFormat
from ministral_jax.stacked import Remat
from train.metrics import step_flops

from .test_step import LENGTH, ROWS, batch_of, in_microbatches, model_of, stepper

RANK, LAYERS, VOCAB = 3, 2, 128
DIM, HIDDEN, QUERIES, KEYS, HEADS, HEAD_DIM = 64, 96, 64, 32, 4, 16


@pytest.mark.parametrize(("remat", "stored"), [("none", None), ("full", None), ("full", LinearFormat("nf4"))])
def test_a_step_has_the_products_of_its_formula_and_no_others(remat: Remat, stored: LinearFormat | None) -> None:
    """Adapters are on wq and w2. A block that is computed again ends before the last product, which nothing needs."""
    model = model_of(rank=RANK, stored=stored)
    model.remat = remat
    tokens, again = ROWS * LENGTH, remat == "full"
    matrices = 2 * DIM * QUERIES + 2 * DIM * KEYS + 3 * DIM * HIDDEN
    base = 2 * tokens * (2 * matrices + again * (matrices - DIM * HIDDEN))
    head = 4 * tokens * DIM * VOCAB
    # The reference's scores and mixed values, without a mask: two products forward, and again; four backward.
    attention = 2 * ROWS * HEADS * LENGTH * LENGTH * HEAD_DIM * (2 + 2 * again + 4)
    adapters = 0
    for n_in, n_out, is_last in ((DIM, QUERIES, False), (HIDDEN, DIM, True)):
        once = n_in + n_out
        adapters += 2 * tokens * RANK * (once + again * (n_in + (not is_last) * n_out) + 2 * once)
    found = product_flops(stepper(model).compile(1, ROWS, LENGTH))
    assert found == LAYERS * (base + attention + adapters) + head
    useful = step_flops(model.config, in_microbatches(batch_of(), 1), full=False)
    if not again:  # of attention, whose masked products the reference computes, the formula counts what is seen
        np.testing.assert_allclose(useful, found - LAYERS * adapters, rtol=0.1)
