"""The training step: one compiled program from parameters and a batch to the next parameters. No files, no loop.

What is trained is a model's adapters, or everything if it has none. Trained parameters and moments are float32 and
given up to each step, which puts the new ones in their place; frozen ones are only read.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ministral_jax.errors import ConfigError, ShardingError
from ministral_jax.lora import set_dropout_keys
from ministral_jax.parameters import ParameterSpec, fill, parameter_specs, parameters
from ministral_jax.stacked import StackedTransformer

from .data.batches import Batch
from .objective import NextToken, Objective, Values
from .optimizer import Optimizer

Arrays = dict[str, Any]  # name -> array, or the shape of one
BATCH_AXES = (None, "batch", "sequence")  # logical axes of each array of a step's batch, [A, B, T]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a run goes on from. Parameters by name, as the stacked model has them; `key` is that of the run."""

    trained: Arrays
    frozen: Arrays
    moments: optax.OptState
    step: Any  # int32 []
    key: Any


class Metrics(NamedTuple):
    """Of one step: the loss that was minimised, how many tokens it is of, the norm of its gradient before clipping.

    A gradient that is not finite changes nothing but the number of steps: `finite` says so. `values` are the means that
    the objective names beside its loss.
    """

    loss: Float[Array, ""]
    tokens: Int[Array, ""]
    gradient_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    finite: Bool[Array, ""]
    values: Values


class Sums(NamedTuple):
    """Of one batch of evaluation: its loss, its weight, and what the objective names, each a sum over examples."""

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    values: Values


def trained_specs(model: nnx.Module) -> dict[str, ParameterSpec]:
    """The parameters that are trained: of adapters, or all if there are none. Raises ConfigError for quantised ones."""
    specs = parameter_specs(model)
    adapters = {name: spec for name, spec in specs.items() if spec.adapter}
    stored = [name for name, spec in specs.items() if spec.init == "stored"]
    if stored and not adapters:
        raise ConfigError(f"{stored[0]} is quantised and cannot be trained: train adapters, or load a dense model")
    return adapters or specs


class TrainStep:
    """Compiles once for all batches of one shape: `state, metrics = step(state, batch)`.

    `model`, filled or not, gives the structure, layout and dtypes; weights are for `initial_state`. Microbatches
    [A, B, T] follow each other and their gradients are added. `objective` is what is minimised, by default the
    cross-entropy of all trained tokens of the step. `options` are XLA's.
    """

    def __init__(
        self,
        model: StackedTransformer,
        optimizer: Optimizer,
        objective: Objective | None = None,
        *,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.specs = parameter_specs(model)
        self.trained_specs = trained_specs(model)
        self.optimizer = optimizer
        self.objective: Objective = objective or NextToken()
        self.layout = model.layout
        self._structure = fill(model, lambda _, spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype))
        # Arrays that come from the host, and results, lie where the layout says; the rest is there already.
        shardings: dict[str, Any] = {}
        loss_shardings: dict[str, Any] = {}
        if self.layout is not None:
            kept = (self._placed(self.trained_specs), self._moment_shardings(), self.layout.sharding())
            batch = self.layout.sharding(BATCH_AXES)
            frozen = self._placed({name: s for name, s in self.specs.items() if name not in self.trained_specs})
            shardings = {
                "in_shardings": (*kept, frozen, self.layout.sharding(), batch),
                "out_shardings": (*kept, self.layout.sharding()),
            }
            rows = self.layout.sharding(BATCH_AXES[1:])
            loss_shardings = {"in_shardings": (kept[0], frozen, rows), "out_shardings": self.layout.sharding()}
        self._compiled = jax.jit(
            self._step, donate_argnums=(0, 1, 2), compiler_options=dict(options or {}), **shardings
        )
        self._program: jax.stages.Compiled | None = None
        self._compiled_loss = jax.jit(self._evaluated, compiler_options=dict(options or {}), **loss_shardings)

    @property
    def trains_adapters(self) -> bool:
        """Whether adapters are trained, and not every weight."""
        return len(self.trained_specs) < len(self.specs)

    def initial_state(self, model: StackedTransformer, key: jax.Array) -> TrainState:
        """The state before the first step. It takes over the arrays of a filled model, the trained ones as float32."""
        arrays = parameters(model)
        trained = {name: arrays.pop(name).astype(jnp.float32) for name in self.trained_specs}
        place = None if self.layout is None else self._moment_shardings()
        moments = jax.jit(self.optimizer.init, out_shardings=place)(trained)
        # Through jit, which puts the copies of several processes in their places too.
        everywhere = None if self.layout is None else self.layout.sharding()
        step, key = jax.jit(lambda key: (jnp.zeros((), jnp.int32), key), out_shardings=everywhere)(key)
        return TrainState(trained, arrays, moments, step, key)

    def shapes(self, microbatches: int, rows: int, length: int) -> tuple[TrainState, Batch]:
        """What `lower` needs, without memory behind it: a state, and a batch [microbatches, rows, length]."""
        struct: Any = jax.ShapeDtypeStruct  # stands for arrays

        def placed(specs: Mapping[str, ParameterSpec], dtype: Any = None) -> Any:
            places = self._placed(specs) if self.layout else dict.fromkeys(specs)
            return {n: struct(s.shape, dtype or s.dtype, sharding=places[n]) for n, s in specs.items()}

        trained = placed(self.trained_specs, jnp.float32)
        moments = jax.eval_shape(self.optimizer.init, trained)
        if self.layout is not None:
            moments = jax.tree.map(
                lambda x, place: struct(x.shape, x.dtype, sharding=place), moments, self._moment_shardings()
            )
        frozen = placed({name: spec for name, spec in self.specs.items() if name not in self.trained_specs})
        key = jax.eval_shape(lambda: jax.random.key(0))
        everywhere, batch = (self.layout and self.layout.sharding(axes) for axes in ((), BATCH_AXES))
        state = TrainState(trained, frozen, moments, struct((), jnp.int32, sharding=everywhere), key)
        ints, floats = (
            struct((microbatches, rows, length), dtype, sharding=batch) for dtype in (jnp.int32, jnp.float32)
        )
        return state, Batch(ints, ints, floats, ints, ints)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One step over microbatches [A, B, T]. `state` is used up, all but its frozen parameters."""
        *kept, metrics = (self._program or self._compiled)(*self._arguments(state, batch))
        trained, moments, step = kept
        return TrainState(trained, state.frozen, moments, step, state.key), metrics

    def compile(self, microbatches: int, rows: int, length: int) -> jax.stages.Compiled:
        """Compiles the step for batches of this shape, the only ones it then takes; the program tells its memory."""
        self._program = self.lower(*self.shapes(microbatches, rows, length)).compile()
        return self._program

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        """The program before it is compiled, of arrays or of their shapes: for its memory and its cost."""
        return self._compiled.lower(*self._arguments(state, batch))

    def evaluate(self, state: TrainState, batch: Batch) -> Sums:
        """The sums of a batch [B, T], without dropout."""
        self._require_rows_divide(batch.tokens.shape[0])
        return self._compiled_loss(state.trained, state.frozen, batch)

    def model(self, trained: Mapping[str, Array], frozen: Mapping[str, Array], key: Array | None) -> StackedTransformer:
        """The model of these parameters, in its own dtypes, with the dropout that follows from `key`."""
        arrays = {name: array.astype(self.specs[name].dtype) for name, array in trained.items()}
        model = fill(self._structure, {**frozen, **arrays})
        set_dropout_keys(model, key)
        return model

    def _require_rows_divide(self, rows: int) -> None:
        ways = 1 if self.layout is None else self.layout.ways("batch")
        along = "" if self.layout is None else f" over {' x '.join(self.layout.along('batch'))}={ways}"
        if rows % (together := ways * self.objective.rows):
            raise ShardingError(
                f"a batch of {rows} rows does not divide{along}: expected a multiple of {together} rows in each "
                "microbatch"
            )

    def _arguments(self, state: TrainState, batch: Batch) -> tuple[Any, ...]:
        self._require_rows_divide(batch.tokens.shape[1])
        return state.trained, state.moments, state.step, state.frozen, state.key, batch

    def _placed(self, specs: Mapping[str, ParameterSpec]) -> dict[str, jax.sharding.NamedSharding]:
        assert self.layout is not None
        return {name: self.layout.placement(name, spec) for name, spec in specs.items()}

    def _moment_shardings(self) -> Any:
        """Moments lie where their parameters do, counters everywhere."""
        assert self.layout is not None
        everywhere, placed = self.layout.sharding(), self._placed(self.trained_specs)
        structs = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in self.trained_specs.items()}

        def place(path: tuple[Any, ...], _: Any) -> jax.sharding.NamedSharding:
            return placed[path[-1].key] if isinstance(path[-1], jax.tree_util.DictKey) else everywhere

        return jax.tree_util.tree_map_with_path(place, jax.eval_shape(self.optimizer.init, structs))

    def _evaluated(self, trained: Arrays, frozen: Arrays, batch: Any) -> Sums:
        weights = self.objective.weights(batch)
        loss, values = self.objective.sums(self.model(trained, frozen, None), batch, weights)
        return Sums(loss, weights.sum(), values)

    def _step(
        self, trained: Arrays, moments: optax.OptState, step: Array, frozen: Arrays, key: Array, batch: Any
    ) -> tuple[Arrays, optax.OptState, Array, Metrics]:
        objective = self.objective
        shares = objective.shares(objective.weights(batch))
        keys = jax.random.split(jax.random.fold_in(key, step), batch.tokens.shape[0])

        def loss(trained: Arrays, batch: Any, share: Array, key: Array) -> tuple[Array, Values]:
            return objective.sums(self.model(trained, frozen, key), batch, share)

        def add(sums: Any, part: tuple[Any, Array, Array]) -> tuple[Any, None]:
            found = jax.value_and_grad(loss, has_aux=True)(trained, *part)
            return jax.tree.map(jnp.add, sums, found), None

        zero = jnp.zeros((), jnp.float32)
        start = ((zero, dict.fromkeys(objective.names, zero)), jax.tree.map(jnp.zeros_like, trained))
        ((total, values), gradients), _ = jax.lax.scan(add, start, (batch, shares, keys))
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(total)
        updated = self.optimizer.update(gradients, moments, trained, step)
        trained, moments = jax.tree.map(functools.partial(jnp.where, finite), updated, (trained, moments))
        tokens = jnp.count_nonzero(batch.loss_weights)
        metrics = Metrics(total, tokens, norm, self.optimizer.config.rate(step), finite, values)
        return trained, moments, step + 1, metrics
