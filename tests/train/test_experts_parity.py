"""LoRA on experts through the training step, against torch's gradients of transformers' own experts, in float32.

transformers gets the merged weights `W + s B A`; what its autograd gives for a whole matrix, G, is `s G A^T` for B and
`s B^T G` for A. Of Mixtral, and of latent attention with a dense first layer and shared experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ministral_jax.checkpoints.load import load_model
from ministral_jax.lora import LoraConfig
from ministral_jax.parameters import fill, parameter_specs, parameters
from ministral_jax.stacked import StackedTransformer, Unstacked, attach_adapters
from tests.golden.models import VOCAB, by_name
from tests.golden.values import write_native
from train.data.batches import Batch
from train.objective import NextToken
from train.optimizer import Optimizer, OptimizerConfig
from train.step import TrainStep, trained_specs

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

RANK, SCALING, ROWS, LENGTH = 3, 1.25, 3, 24
CLOSE = 1e-4  # of the range
QUICK = {"xla_backend_optimization_level": 0}
CONFIG = OptimizerConfig(learning_rate=1e-3, steps=8, schedule="constant", clip_norm=None)


def batch() -> Batch:
    """[A, B, T]: two microbatches of whole sequences, with a part of their tokens trained."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (2, ROWS, LENGTH + 1)).astype(np.int32)
    weights = (rng.uniform(size=(2, ROWS, LENGTH)) < 0.6).astype(np.float32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), weights.shape)
    return Batch(tokens[..., :-1], tokens[..., 1:], weights, positions, np.ones(weights.shape, np.int32))


def our_model(name: str, folder: Path) -> StackedTransformer:
    model = load_model(write_native(by_name(name), folder), stacked=True, dtype="float32")
    base, rng = parameters(model), np.random.default_rng(1)
    attach_adapters(model, LoraConfig(targets=("w1", "w2", "w3"), rank=RANK, scaling=SCALING))
    specs = parameter_specs(model)
    drawn = {n: jnp.asarray(0.2 * rng.standard_normal(s.shape), jnp.float32) for n, s in specs.items() if s.adapter}
    return fill(model, base | drawn)


def our_gradients(model: StackedTransformer) -> tuple[dict[str, np.ndarray], float, float]:
    """Of one step, from its first moments, which are (1 - beta1) of the gradient; the loss, and the gradient's norm."""
    step = TrainStep(model, Optimizer(CONFIG, trained_specs(model)), NextToken(chunk=16), options=QUICK)
    state, metrics = step(step.initial_state(model, jax.random.key(0)), batch())
    is_adam = lambda leaf: isinstance(leaf, optax.ScaleByAdamState)  # noqa: E731
    (adam,) = [leaf for leaf in jax.tree.leaves(state.moments, is_leaf=is_adam) if is_adam(leaf)]
    found = Unstacked(adam.mu, model.pattern)
    return (
        {name: np.asarray(found[name]) / (1 - CONFIG.beta1) for name in found},
        float(metrics.loss),
        float(metrics.gradient_norm),
    )


def theirs_of(name: str) -> str:
    """The parameter of transformers that holds the weight of one of our modules."""
    _, layer, rest = name.split(".", 2)
    kind, part = rest.removeprefix("feed_forward.").rpartition(".")[::2]
    word = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}[part]
    if kind == "experts":
        return f"model.layers.{layer}.mlp.experts.{'down_proj' if part == 'w2' else 'gate_up_proj'}"
    return f"model.layers.{layer}.mlp.{f'{kind}.' if kind else ''}{word}.weight"


def place(name: str, matrix: Any) -> Any:
    """The part of a parameter of transformers that is the weight of our module."""
    if ".experts." not in name or name.endswith("w2"):
        return matrix
    rows = matrix.shape[1] // 2
    return matrix[:, :rows] if name.endswith("w1") else matrix[:, rows:]


@pytest.mark.parametrize("name", ["mixtral", "mistral4"])
def test_gradients_of_a_step_are_those_of_torch(name: str, tmp_path: Path) -> None:
    torch: Any = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.golden.make_golden import transformers_model

    model, theirs = our_model(name, tmp_path), transformers_model(by_name(name))
    arrays = Unstacked(parameters(model), model.pattern)
    lora = {key: np.array(arrays[key]) for key in arrays if ".lora_" in key}
    modules = sorted({key.rpartition(".")[0] for key in lora})
    weights = dict(theirs.named_parameters())
    with torch.no_grad():
        for module in modules:
            change = SCALING * lora[f"{module}.lora_b"] @ lora[f"{module}.lora_a"]
            place(module, weights[theirs_of(module)]).add_(torch.from_numpy(change))
    found, loss, norm = our_gradients(model)
    given, total = batch(), 0.0
    for tokens, targets, trained in zip(given.tokens, given.targets, given.loss_weights, strict=True):
        logits = theirs(input_ids=torch.from_numpy(tokens).long(), use_cache=False).logits.flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets).long().flatten(), reduction="none")
        part = (losses * torch.from_numpy(trained).flatten()).sum() / float(given.loss_weights.sum())
        part.backward()
        total += part.item()
    np.testing.assert_allclose(loss, total, rtol=1e-5)
    assert set(found) == set(lora)
    squares = 0.0
    for module in modules:
        gradient = place(module, weights[theirs_of(module)].grad).numpy()
        a, b = lora[f"{module}.lora_a"], lora[f"{module}.lora_b"]
        expected = {
            "lora_b": SCALING * gradient @ a.swapaxes(-1, -2),
            "lora_a": SCALING * b.swapaxes(-1, -2) @ gradient,
        }
        for part, wanted in expected.items():
            worst = np.abs(found[f"{module}.{part}"] - wanted).max()
            assert worst <= CLOSE * np.ptp(wanted), f"{module}.{part}: {worst} of {np.ptp(wanted)}"
            squares += float((wanted.astype(np.float64) ** 2).sum())
    np.testing.assert_allclose(norm, squares**0.5, rtol=1e-4)
