"""The decoder for training: layers of one kind are stacked and scanned, so that a step compiles once for all of them.

Layers repeat with a period (4 in Ministral 8B, one full and three windowed; 1 in Ministral 3). Each place in the period
is one block whose every parameter has a leading axis over the repetitions. What comes before the repetition, such as
the first dense layers of a mixture of experts, stays unrolled. No decoding: that is transformer.py's, unrolled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.flash_attention import Implementation

from .attend import causal_attend
from .attention import Attend, Rotation
from .config import ModelConfig
from .errors import ConfigError
from .linear import projections
from .lora import LoraConfig, attach
from .parameters import parameter_specs
from .sharding.collectives import gathered
from .sharding.layout import sequence_axes
from .transformer import Block, Embedding, Transformer

Remat = Literal["none", "full", "dots"]
# What the backward pass finds in memory, in bytes per token and layer with activations in bfloat16, F the hidden width:
#   full: 2 D, the block's input. Everything else is computed again: a third more operations with all weights trained,
#         half as many more with adapters alone.
#   dots: 2 (2 D + N H + 2 K H + 2 F): also what the projections give. Attention, norms and elementwise parts run again.
#   none: 18 D + 4 N H + 4 K H + 12 F.
# In Ministral 8B that is 8, 78 and 242 kB.
POLICIES: Mapping[str, Callable[..., Any] | None] = {
    "full": None,
    # Attention scores have batch dimensions, so they are not among what this keeps.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
LAYERS = "layers"  # the logical axis of a stack, and the first part of a layer's name in a checkpoint


@dataclass(frozen=True)
class Pattern:
    """Layer `prefix + i * period + j` is repetition i of place j; those before `prefix` stand alone.

    Names: `layers.7.rest` of a checkpoint is index i of `places.j.rest`, or `prefix.7.rest`.
    """

    prefix: int
    period: int
    repeats: int

    @property
    def n_layers(self) -> int:
        return self.prefix + self.period * self.repeats

    def home(self, name: str) -> tuple[str, int | None]:
        """The stacked name of a parameter that a checkpoint calls `name`, and its index there, None if not stacked."""
        first, _, rest = name.partition(".")
        if first != LAYERS:
            return name, None
        number, _, rest = rest.partition(".")
        layer = int(number)
        if layer < self.prefix:
            return f"prefix.{layer}.{rest}", None
        index, place = divmod(layer - self.prefix, self.period)
        return f"places.{place}.{rest}", index

    def names(self, stacked_name: str) -> list[str]:
        """The checkpoint's names of all that a stacked parameter holds, in its order: the inverse of `home`."""
        first, _, rest = stacked_name.partition(".")
        if first not in ("prefix", "places"):
            return [stacked_name]
        number, _, rest = rest.partition(".")
        if first == "prefix":
            return [f"{LAYERS}.{number}.{rest}"]
        start = self.prefix + int(number)
        return [f"{LAYERS}.{layer}.{rest}" for layer in range(start, self.n_layers, self.period)]


def repetition(kinds: Sequence[Any]) -> Pattern:
    """The pattern of `kinds`, one of each layer, with the fewest different blocks; of those the shortest prefix."""
    n_layers = len(kinds)
    choices = (
        (prefix + period, prefix, period)
        for prefix in range(n_layers)
        for period in range(1, n_layers - prefix + 1)
        if (n_layers - prefix) % period == 0
        and all(kinds[i] == kinds[i + period] for i in range(prefix, n_layers - period))
    )
    _, prefix, period = min(choices)
    return Pattern(prefix, period, (n_layers - prefix) // period)


def pattern(config: ModelConfig) -> Pattern:
    """How the layers of a model repeat: by their windows, and by which are mixtures of experts."""
    dense = config.moe.first_dense_layers if config.moe else 0
    return repetition([(window, i >= dense) for i, window in enumerate(config.windows)])


class StackedTransformer(nnx.Module):
    """A decoder for training, made of `model`, which is used up: placeholders stay placeholders, arrays are copied.

    `prefix` are blocks, `places` one block for each place in the period, its parameters `[repeats, ...]` with the
    logical axis "layers" in front. `remat` is what the backward pass keeps (POLICIES).
    """

    def __init__(self, model: Transformer, *, remat: Remat = "full") -> None:
        self.config = model.config
        self.attention_implementation: Implementation = model.attention_implementation
        self.layout = model.layout
        self.remat: Remat = _known(remat)
        self.tok_embeddings: Embedding = model.tok_embeddings
        self.norm = model.norm
        self.output: Embedding | None = model.output
        layers = list(model.layers)
        kinds = [(model.config.windows[i], _structure(layer)) for i, layer in enumerate(layers)]
        self.pattern = repetition(kinds)
        start, period = self.pattern.prefix, self.pattern.period
        self.prefix = nnx.List(layers[:start])
        self.places = nnx.List([_stack(layers[start + place :: period]) for place in range(period)])

    def stack_placeholders(self) -> None:
        """Gives what was added to a block of `places`, such as an adapter's placeholders, its leading axis too."""
        for place in self.places:
            for _, leaf in nnx.iter_graph(place):
                if isinstance(leaf, nnx.Param) and leaf.axes[0] != LAYERS:
                    shape = (self.pattern.repeats, *leaf.shape)
                    leaf.set_value(jax.ShapeDtypeStruct(shape, leaf.dtype))
                    leaf.set_metadata(axes=(LAYERS, *leaf.axes))

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """As `Transformer.hidden`: final hidden states, after the last norm, of whole or packed sequences."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        rotation = Rotation.at(positions, self.config)
        axes = sequence_axes(tokens.shape, self.layout)
        attend = causal_attend(self.config, segment_ids, self.attention_implementation, self.layout)
        x = gathered(self.tok_embeddings, self.layout)(tokens, self.layout, axes)  # [B, T, D]
        for layer, block in enumerate(self.prefix):
            graph, state = nnx.split(block)
            x = self._rematerialized(graph, layer, attend, axes, scanned=False)(state, x, rotation)
        parts = [nnx.split(place) for place in self.places]
        run = [
            self._rematerialized(graph, self.pattern.prefix + place, attend, axes, scanned=True)
            for place, (graph, _) in enumerate(parts)
        ]

        def period(x: Array, states: list[Any]) -> tuple[Array, None]:
            for block, state in zip(run, states, strict=True):
                x = block(state, x, rotation)
            return x, None

        x, _ = jax.lax.scan(period, x, [state for _, state in parts])
        return self.norm(x)

    @property
    def head(self) -> Embedding:
        """The output head: its own, or the embeddings."""
        return self.tok_embeddings if self.output is None else self.output

    def logits(self, hidden: Float[Array, "*T D"]) -> Float[Array, "*T V"]:
        """Float32 logits of final hidden states: few at a time; train/loss.py never asks for those of a sequence."""
        logits = gathered(self.head, self.layout).logits(hidden)
        return logits if self.layout is None else self.layout.constrain_last(logits, "act_vocab")

    def _rematerialized(
        self,
        graph: nnx.GraphDef[Block],
        layer: int,
        attend: Attend[None],
        axes: tuple[str | None, ...],
        *,
        scanned: bool,
    ) -> Callable[[Any, Array, Rotation], Array]:
        """One block as a function of its parameters; `layer` is any of its place, which all have the same window."""

        def block(state: Any, x: Array, rotation: Rotation) -> Array:
            x, _ = gathered(nnx.merge(graph, state), self.layout)(x, rotation, layer, attend, None)
            return x if self.layout is None else self.layout.constrain(x, *axes, "act_embed")

        if self.remat == "none":
            return block
        # Across the steps of a scan nothing can be merged, so nothing needs to keep XLA from it.
        return jax.checkpoint(block, policy=POLICIES[self.remat], prevent_cse=not scanned)  # pyright: ignore[reportReturnType]


def _known(remat: Remat) -> Remat:
    if remat not in get_args(Remat):
        raise ValueError(f"remat={remat!r}: expected one of {', '.join(get_args(Remat))}")
    return remat


def _structure(block: Block) -> tuple[Any, ...]:
    """What must be the same for two blocks to be stacked."""
    return nnx.graphdef(block), parameter_specs(block)


def _stack(blocks: Sequence[Block]) -> Block:
    flat = [nnx.to_flat_state(nnx.state(block)) for block in blocks]
    stacked = []
    for (path, leaf), *others in zip(*flat, strict=True):
        values = [leaf.get_value(), *(other.get_value() for _, other in others)]
        stacked.append((path, leaf.replace(_stacked_value(values), axes=(LAYERS, *leaf.axes))))
    return nnx.merge(nnx.graphdef(blocks[0]), nnx.from_flat_state(stacked))


def _stacked_value(values: Sequence[Any]) -> Any:
    if isinstance(values[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(values), *values[0].shape), values[0].dtype)
    return jnp.stack(values)


def attach_adapters(model: StackedTransformer, config: LoraConfig) -> None:
    """`lora.attach` to a stacked model, whose base may be filled: adapters as placeholders, a stack of them each.

    Raises ConfigError as `attach` does, and for layers of one stack that would have different adapters.
    """
    if any(linear.adapter for linear in projections(model).values()):
        raise ConfigError("lora: the model has an adapter already; load it without one, or merge that first")
    outline = Transformer(model.config)
    attach(outline, config)
    adapters = {name: linear.adapter for name, linear in projections(outline).items()}
    for name, linear in projections(model).items():
        layers = model.pattern.names(name)
        for layer in layers:
            if adapters[layer] != adapters[layers[0]]:
                raise ConfigError(
                    f"lora: {layers[0]} and {layer} would have different adapters, but layers of one kind are trained "
                    "as one stack: give them the same rank and alpha"
                )
        if (adapter := adapters[layers[0]]) is not None:
            linear.adapt(adapter)
    model.stack_placeholders()


class Unstacked(Mapping[str, jax.Array]):
    """Arrays of a stacked model under a checkpoint's names, each cut out when it is asked for. Any part of a model."""

    def __init__(self, arrays: Mapping[str, jax.Array], pattern: Pattern) -> None:
        self._arrays, self._pattern = arrays, pattern
        self._names = [name for stacked_name in arrays for name in pattern.names(stacked_name)]

    def __getitem__(self, name: str) -> jax.Array:
        stacked_name, index = self._pattern.home(name)
        array = self._arrays[stacked_name]
        return array if index is None else array[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def stack_arrays(arrays: Mapping[str, Any], names: Iterable[str], pattern: Pattern) -> dict[str, jax.Array]:
    """Stacked name -> array, of `arrays` under a checkpoint's names: the inverse of `Unstacked`, for what is small."""
    return {
        name: jnp.stack([jnp.asarray(arrays[part]) for part in pattern.names(name)])
        if name.startswith("places.")
        else jnp.asarray(arrays[pattern.names(name)[0]])
        for name in names
    }
