"""Trains the bundled model from nothing: `python -m train.passkey.pretrain --out DIR [--resume]`.

The run is a function of its recipe: batches come from the step number, so a run that was interrupted and resumed
ends where an uninterrupted one would have. Not for fine-tuning published checkpoints.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int
from safetensors import safe_open
from safetensors.numpy import save_file

from ministral_jax import parameters as model_parameters
from ministral_jax.checkpoints.save import save_mistral
from ministral_jax.config import ModelConfig
from ministral_jax.errors import MinistralError
from ministral_jax.parameters import ParameterSpec
from ministral_jax.transformer import Transformer

from .conversations import ConversationEncoder, batch
from .recipe import RECIPE, Recipe
from .vocabulary import write_tekken

Parameters = dict[str, jax.Array]
STATE_FILE = "training_state.safetensors"
LOG_FILE = "training_log.jsonl"
LOG_EVERY = 25
SAVE_EVERY = 100
RESIDUAL_SHARE = 0.4  # of the usual deviation, for what is added to the residual stream: 16 sublayers add to it
EMBEDDING_DEVIATION = 0.3
BLOCKWISE_FROM = 512  # tokens in a row; below that, dense attention is faster on a CPU


@dataclass(frozen=True)
class State:
    """What a step takes and gives: weights by name, the optimiser's moments, and how many steps were done."""

    parameters: Parameters
    optimizer: optax.OptState
    step: int


def initial_parameters(config: ModelConfig, seed: int) -> Parameters:
    """Random weights: deviation 1/sqrt(fan-in), less for what writes to the residual stream; norms are ones."""
    model = Transformer(config)
    names = list(model_parameters.parameter_specs(model))
    keys = dict(zip(names, jax.random.split(jax.random.key(seed), len(names)), strict=True))

    def draw(name: str, spec: ParameterSpec) -> jax.Array:
        if spec.init == "ones":
            return jnp.ones(spec.shape, spec.dtype)
        deviation = spec.shape[-1] ** -0.5
        if name.startswith("tok_embeddings"):
            deviation = EMBEDDING_DEVIATION
        elif name.startswith("output"):
            deviation *= 0.5
        elif name.endswith(("wo.weight", "w2.weight")):
            deviation *= RESIDUAL_SHARE
        return deviation * jax.random.normal(keys[name], spec.shape, spec.dtype)

    return model_parameters.parameters(model_parameters.fill(model, draw))


def initial_state(recipe: Recipe) -> State:
    """The state before the first step."""
    parameters = initial_parameters(recipe.config, recipe.seed)
    return State(parameters, recipe.optimizer().init(parameters), 0)


def answer_loss(
    config: ModelConfig,
    parameters: Parameters,
    tokens: Int[Array, "B T"],
    following: Int[Array, "B T"],
    answered: Bool[Array, "B T"],
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean cross-entropy of the answers' tokens, and the shares of answer tokens and of first digits that are right."""
    attention = "reference" if tokens.shape[1] < BLOCKWISE_FROM else "xla"
    model = model_parameters.fill(Transformer(config, attention=attention), parameters)
    logits = model(tokens)  # [B, T, V]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, following)  # [B, T]
    right = logits.argmax(-1) == following  # [B, T]
    first = answered & ~jnp.pad(answered, ((0, 0), (1, 0)))[:, :-1]
    measures = {"accuracy": _mean_where(right, answered), "first_digit_accuracy": _mean_where(right, first)}
    return _mean_where(losses, answered), measures


def _mean_where(values: Array, chosen: Bool[Array, "B T"]) -> Float[Array, ""]:
    return (values * chosen).sum() / chosen.sum()


@functools.cache
def make_step(recipe: Recipe) -> Callable[..., tuple[Parameters, optax.OptState, dict[str, Array]]]:
    """The compiled step: (parameters, moments, tokens, following, answered) -> (parameters, moments, measures)."""
    optimizer = recipe.optimizer()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(
        parameters: Parameters, moments: optax.OptState, tokens: Array, following: Array, answered: Array
    ) -> tuple[Parameters, optax.OptState, dict[str, Array]]:
        loss = functools.partial(answer_loss, recipe.config)
        (value, measures), gradient = jax.value_and_grad(loss, has_aux=True)(parameters, tokens, following, answered)
        updates, moments = optimizer.update(gradient, moments, parameters)
        updated = optax.apply_updates(parameters, updates)
        return updated, moments, {"loss": value, **measures}  # pyright: ignore[reportReturnType]

    return step


def batches(
    recipe: Recipe, encoder: ConversationEncoder, first: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The batches of steps `first`, `first + 1`, ... to the end, each prepared while the one before is trained on."""

    def prepare(step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        stage = recipe.stage(step)
        rows = recipe.tokens_per_step // stage.length
        return batch(recipe.random(step, "batch"), stage, rows, encoder, "train")

    with ThreadPoolExecutor(1) as worker:
        ahead = worker.submit(prepare, first) if first < recipe.steps else None
        for step in range(first, recipe.steps):
            assert ahead is not None
            ready = ahead.result()
            ahead = worker.submit(prepare, step + 1) if step + 1 < recipe.steps else None
            yield ready


def _named_leaves(state: State) -> dict[str, np.ndarray]:
    moments = jax.tree_util.tree_flatten_with_path(state.optimizer)[0]
    named = {f"parameters/{name}": np.asarray(array) for name, array in state.parameters.items()}
    return named | {f"optimizer/{jax.tree_util.keystr(path)}": np.asarray(leaf) for path, leaf in moments}


def save_state(state: State, directory: Path) -> None:
    """Writes weights, moments and step number under a temporary name, then puts it in place."""
    path = directory / STATE_FILE
    temporary = path.with_suffix(".partial")
    save_file(_named_leaves(state), temporary, metadata={"step": str(state.step)})
    os.replace(temporary, path)


def load_state(recipe: Recipe, directory: Path) -> State:
    """What `save_state` wrote. Raises MinistralError if nothing was saved."""
    if not (directory / STATE_FILE).is_file():
        raise MinistralError(f"{directory} has no {STATE_FILE}: nothing to resume; start without --resume")
    empty = initial_state(recipe)
    with safe_open(directory / STATE_FILE, framework="numpy") as file:
        step = int(file.metadata()["step"])
        parameters = {name: jnp.asarray(file.get_tensor(f"parameters/{name}")) for name in empty.parameters}
        paths, structure = jax.tree_util.tree_flatten_with_path(empty.optimizer)
        leaves = [jnp.asarray(file.get_tensor(f"optimizer/{jax.tree_util.keystr(path)}")) for path, _ in paths]
    return State(parameters, jax.tree_util.tree_unflatten(structure, leaves), step)


class TrainingLog:
    """Averages over the last steps, one JSON line every LOG_EVERY steps, to a file and to the terminal."""

    def __init__(self, path: Path, step: int) -> None:
        kept = path.read_text().splitlines() if step and path.exists() else []
        self._lines = [line for line in kept if json.loads(line)["step"] <= step]
        self._path = path
        self._waiting: list[dict[str, Array]] = []
        self._tokens = 0
        self._started = time.perf_counter()

    def add(self, step: int, row_length: int, tokens: int, measures: dict[str, Array]) -> None:
        """Takes the measures of one step; they are looked at (and waited for) only when a line is due."""
        self._waiting.append(measures)
        self._tokens += tokens
        if step % LOG_EVERY:
            return
        means = {name: round(float(np.mean([each[name] for each in self._waiting])), 4) for name in self._waiting[0]}
        seconds = time.perf_counter() - self._started
        entry = {
            "step": step,
            "row_length": row_length,
            **means,
            "tokens_per_second": round(self._tokens / seconds),
        }
        self._lines.append(json.dumps(entry))
        print(self._lines[-1], flush=True)
        temporary = self._path.with_suffix(".partial")
        temporary.write_text("\n".join(self._lines) + "\n")
        os.replace(temporary, self._path)
        self._waiting, self._tokens, self._started = [], 0, time.perf_counter()


def train(recipe: Recipe, tekken: Path, out: Path, *, resume: bool = False, until: int | None = None) -> State:
    """Runs the recipe, or what is left of it after `out`'s saved state, up to step `until` (all of it by default).

    Saves the state every SAVE_EVERY steps and at the end, and the log beside it.
    """
    state = load_state(recipe, out) if resume else initial_state(recipe)
    encoder = ConversationEncoder(tekken)
    log = TrainingLog(out / LOG_FILE, state.step)
    step = make_step(recipe)
    last = recipe.steps if until is None else until
    parameters, moments, done = state.parameters, state.optimizer, state.step
    for tokens, following, answered in batches(recipe, encoder, done):
        if done >= last:
            break
        parameters, moments, measures = step(parameters, moments, tokens, following, answered)
        done += 1
        log.add(done, tokens.shape[1], tokens.size, measures)
        if done % SAVE_EVERY == 0:
            save_state(State(parameters, moments, done), out)
    state = State(parameters, moments, done)
    save_state(state, out)
    return state


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Trains the bundled passkey model from nothing.")
    parser.add_argument("--out", type=Path, required=True, help="directory of the result and of the run's state")
    parser.add_argument("--resume", action="store_true", help="go on from the state saved in --out")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    tekken = write_tekken(arguments.out)
    try:
        state = train(RECIPE, tekken, arguments.out, resume=arguments.resume)
    except MinistralError as error:
        raise SystemExit(f"error: {error}") from None
    save_mistral(arguments.out, state.parameters, RECIPE.config, dtype="bfloat16")


if __name__ == "__main__":
    main()
