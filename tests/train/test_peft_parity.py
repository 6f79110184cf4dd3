"""LoRA in our training step against PEFT, transformers and torch's AdamW: gradients, and five steps, in float32.

The same tiny models, packed batches, first A, schedule, clipping and accumulation; attention in transformers is written
out, and takes its segments from the positions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ministral_jax.checkpoints.load import load_model
from ministral_jax.checkpoints.translate import HF_PARTS
from ministral_jax.lora import PROJECTIONS, LoraConfig
from ministral_jax.parameters import fill, parameter_specs, parameters
from ministral_jax.stacked import Pattern, StackedTransformer, Unstacked, attach_adapters, stack_arrays
from tests.golden.models import VOCAB, by_name
from train.data.batches import Batch
from train.loss import cross_entropy
from train.objective import NextToken, Preference, PreferenceConfig
from train.optimizer import Optimizer, OptimizerConfig
from train.step import TrainStep, trained_specs

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("default"),  # what other libraries warn about is not ours to fix
]
CLOSE = 1e-4  # of the range
QUICK = {"xla_backend_optimization_level": 0}
RANK, ALPHA, STEPS, MICROBATCHES, ROWS, LENGTH = 4, 8, 5, 2, 2, 40
# A larger epsilon than usual, so that gradients that are mere rounding errors are not scaled up to whole steps.
CONFIG = OptimizerConfig(learning_rate=1e-2, steps=8, warmup_steps=2, epsilon=1e-3, weight_decay=0.1, clip_norm=1.0)


def batches() -> list[Batch]:
    """[A, B, T] each: rows of three segments, most of them longer than a window, with every third token untrained."""
    rng = np.random.default_rng(0)
    shape = (MICROBATCHES, ROWS, LENGTH)
    cuts = np.sort(rng.permuted(np.tile(np.arange(3, LENGTH - 3), (*shape[:2], 1)), axis=-1)[..., :2], axis=-1)
    segments = 1 + (np.arange(LENGTH) >= cuts[..., :1]) + (np.arange(LENGTH) >= cuts[..., 1:])
    starts = np.where(segments == 1, 0, np.where(segments == 2, cuts[..., :1], cuts[..., 1:]))
    positions = (np.arange(LENGTH) - starts).astype(np.int32)
    found = []
    for _ in range(STEPS):
        tokens = rng.integers(0, VOCAB, (*shape[:2], LENGTH + 1)).astype(np.int32)
        weights = (rng.uniform(size=shape) < [[[0.9], [0.2]], [[0.5], [0.7]]]).astype(np.float32)
        found.append(Batch(tokens[..., :-1], tokens[..., 1:], weights, positions, segments.astype(np.int32)))
    return found


def peft_model(name: str) -> Any:
    """The transformers model with adapters on all seven projections of each layer."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    peft: Any = pytest.importorskip("peft")
    from tests.golden.make_golden import transformers_model

    targets = [HF_PARTS[part].rpartition(".")[2] for part in HF_PARTS if part.rpartition(".")[2] in PROJECTIONS]
    settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, lora_dropout=0.0, bias="none")
    return peft.get_peft_model(transformers_model(by_name(name)), settings)


def our_name(theirs: str) -> str | None:
    """`layers.0.attention.wq.lora_a` of a parameter of PEFT's, None if it is no adapter."""
    if ".lora_" not in theirs:
        return None
    _, _, rest = theirs.partition(".layers.")
    number, _, rest = rest.partition(".")
    module, _, part = rest.removesuffix(".default.weight").rpartition(".")
    ours = {theirs: ours for ours, theirs in HF_PARTS.items()}[module]
    return f"layers.{number}.{ours}.{part.lower()}"


def adapters(model: Any, *, gradients: bool = False) -> dict[str, np.ndarray]:
    named = {our_name(name): weight.grad if gradients else weight for name, weight in model.named_parameters()}
    return {name: array.detach().numpy().copy() for name, array in named.items() if name is not None}


def backward(torch: Any, model: Any, batch: Batch) -> float:
    """Gradients of the mean over all trained tokens of the microbatches, which follow each other."""
    model.zero_grad()
    total = 0.0
    for micro in zip(*batch, strict=True):
        tokens, targets, weights, positions, _ = (torch.from_numpy(array) for array in micro)
        logits = model(input_ids=tokens.long(), position_ids=positions.long(), use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.long().flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / float(batch.loss_weights.sum())
        loss.backward()
        total += loss.item()
    return total


def backward_of_pairs(torch: Any, model: Any, batch: Batch, config: PreferenceConfig) -> float:
    """Gradients of DPO's mean loss over all pairs, the reference being PEFT's model with its adapter disabled."""
    model.zero_grad()
    total = 0.0

    def log_probs(tokens: Any, targets: Any, weights: Any, positions: Any) -> Any:
        logits = model(input_ids=tokens.long(), position_ids=positions.long(), use_cache=False).logits
        found = torch.gather(logits.log_softmax(-1), -1, targets.long()[..., None])[..., 0]
        return (found * weights).sum(-1)

    for micro in zip(*batch, strict=True):
        arrays = [torch.from_numpy(array) for array in micro[:4]]
        with torch.no_grad(), model.disable_adapter():
            reference = log_probs(*arrays)
        chosen, rejected = (log_probs(*arrays) - reference).reshape(-1, 2).T
        loss = -torch.nn.functional.logsigmoid(config.beta * (chosen - rejected)).sum() * 2 / (MICROBATCHES * ROWS)
        loss.backward()
        total += loss.item()
    return total


def our_model(name: str, folder: Path, first: dict[str, np.ndarray]) -> StackedTransformer:
    """The checkpoint that transformers saved, read into stacks, with PEFT's first adapters."""
    from tests.golden.make_golden import transformers_model

    transformers_model(by_name(name)).save_pretrained(folder)
    model = load_model(folder, stacked=True)
    base = parameters(model)
    attach_adapters(model, LoraConfig(rank=RANK, alpha=ALPHA))
    names = [name for name, spec in parameter_specs(model).items() if spec.adapter]
    return fill(model, base | stack_arrays(first, names, model.pattern))


def our_gradients(step: TrainStep, pattern: Pattern, state: Any, batch: Batch) -> dict[str, np.ndarray]:
    """Of all microbatches as one batch [B, T], outside the step."""
    flat = jax.tree.map(lambda array: array.reshape(-1, LENGTH), batch._replace(loss_weights=shares_of(batch)))

    def loss(trained: Any) -> jax.Array:
        model = step.model(trained, state.frozen, None)
        hidden = model.hidden(*(jax.numpy.asarray(x) for x in (flat.tokens, flat.positions, flat.segment_ids)))
        return cross_entropy(hidden, model.head.weight[...], *map(jax.numpy.asarray, flat[1:3]), chunk=32)[0]

    found = Unstacked(jax.jit(jax.grad(loss), compiler_options=QUICK)(state.trained), pattern)
    return {name: np.asarray(found[name]) for name in found}


def shares_of(batch: Batch) -> np.ndarray:
    return np.asarray(NextToken().shares(jax.numpy.asarray(batch.loss_weights)))


def assert_close(found: Any, expected: dict[str, np.ndarray]) -> None:
    assert set(found) == set(expected)
    for name, array in expected.items():
        error = np.abs(np.asarray(found[name]) - array).max()
        assert error <= CLOSE * np.ptp(array), f"{name}: {error} of {np.ptp(array)}"


def assert_same_steps(
    name: str, folder: Path, objective: NextToken | Preference, backward: Callable[[Any, Any, Batch], float]
) -> None:
    """Loss, norm, rate and adapters of five steps; gradients of the first and the last if it is of tokens."""
    torch: Any = pytest.importorskip("torch")
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = peft_model(name)
    first = adapters(theirs)
    assert all(np.any(array) == name.endswith("lora_a") for name, array in first.items())
    model = our_model(name, folder, first)
    step = TrainStep(model, Optimizer(CONFIG, trained_specs(model)), objective, options=QUICK)
    state = step.initial_state(model, jax.random.key(0))
    trainable = [weight for weight in theirs.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=CONFIG.learning_rate, eps=CONFIG.epsilon, weight_decay=CONFIG.weight_decay
    )
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, CONFIG.warmup_steps, CONFIG.steps)
    for number, batch in enumerate(batches()):
        expected_loss = backward(torch, theirs, batch)
        if number in (0, STEPS - 1) and isinstance(objective, NextToken):  # at B = 0, and where A has gradients too
            assert_close(our_gradients(step, model.pattern, state, batch), adapters(theirs, gradients=True))
        norm = torch.nn.utils.clip_grad_norm_(trainable, CONFIG.clip_norm)
        rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()
        state, metrics = step(state, batch)
        np.testing.assert_allclose(float(metrics.loss), expected_loss, rtol=1e-5)
        np.testing.assert_allclose(float(metrics.gradient_norm), float(norm), rtol=1e-4)
        np.testing.assert_allclose(float(metrics.learning_rate), rate, rtol=1e-6)
        assert_close(Unstacked(state.trained, model.pattern), adapters(theirs))
    moved = {name: np.abs(array - first[name]).max() for name, array in adapters(theirs).items()}
    assert min(moved.values()) > 0.2 * CONFIG.learning_rate


@pytest.mark.parametrize("name", ["mistral_window", "ministral3"])
def test_gradients_and_five_steps_are_those_of_peft_and_torch(name: str, tmp_path: Path) -> None:
    assert_same_steps(name, tmp_path, NextToken(chunk=32), backward)


def test_five_steps_of_preferences_are_those_of_peft_with_and_without_its_adapter(tmp_path: Path) -> None:
    """Its pairs are the two rows of each microbatch."""
    config = PreferenceConfig(beta=0.05)
    pairs = functools.partial(backward_of_pairs, config=config)
    assert_same_steps("mistral_window", tmp_path, Preference(config, chunk=32), pairs)
