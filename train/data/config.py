"""What can be said about training data, in one frozen dataclass. Nothing is read here."""

from dataclasses import dataclass, replace

from ministral_jax.errors import MinistralError

PACKINGS = ("first-fit", "mistral-finetune", "none")


@dataclass(frozen=True)
class DataConfig:
    """Which lines are read, in what order, what is trained in them, and how they fill rows.

    Attributes:
        data: sources of pretraining text, "path[:weight],path[:weight]", each a jsonl file or a folder of them.
        instruct_data: sources of conversations, written likewise.
        preference_data: sources of preference pairs, written likewise; `open_pairs` reads these and no others.
        shuffle: draw the lines of every pass in a new random order.
        epochs: passes over the data, then the batches end; None goes on for ever.
        tools_trained: which assistant messages of a conversation with tools are trained: "all", or "last" alone, as
            mistral-finetune does.
        tool_prefixes: every beginning of such a conversation that ends in an assistant message is a sample too
            (mistral-finetune's dynamic_chunk_fn_call); needs tools_trained="last".
        packing: "first-fit" keeps samples whole, "mistral-finetune" cuts them where a row is full and goes on in the
            next without the context, "none" gives each sample a row.
        long: what happens to a sample longer than a row: "cut" keeps its beginning, "drop" leaves it out.
            Under mistral-finetune's packing nothing is too long.
        packing_window: rows that first-fit keeps open at once.
        read_threads: threads that tokenise ahead of the training; 0 does it when a batch is asked for.
    """

    data: str = ""
    instruct_data: str = ""
    preference_data: str = ""
    shuffle: bool = True
    epochs: int | None = None
    tools_trained: str = "all"
    tool_prefixes: bool = False
    packing: str = "first-fit"
    long: str = "cut"
    packing_window: int = 64
    read_threads: int = 2

    def __post_init__(self) -> None:
        _one_of("packing", self.packing, PACKINGS)
        _one_of("long", self.long, ("cut", "drop"))
        _one_of("tools_trained", self.tools_trained, ("all", "last"))
        _at_least("packing_window", self.packing_window, 1)
        _at_least("read_threads", self.read_threads, 0)
        if self.epochs is not None:
            _at_least("epochs", self.epochs, 1)
        if self.tool_prefixes and self.tools_trained != "last":
            raise MinistralError(
                "data.tool_prefixes: needs tools_trained 'last', else every message is trained once per prefix"
            )

    def for_evaluation(self) -> "DataConfig":
        """The same data once, in the order of the files, every sample whole conversations only."""
        return replace(self, shuffle=False, epochs=1, tool_prefixes=False)

    def like_mistral_finetune(self) -> "DataConfig":
        """The same sources trained by mistral-finetune's rules: its packing, and of tools the last message."""
        return replace(self, packing="mistral-finetune", tools_trained="last", tool_prefixes=True)


def _one_of(field: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise MinistralError(f"data.{field}: {value!r}, expected one of {', '.join(allowed)}")


def _at_least(field: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise MinistralError(f"data.{field}: {value!r}, expected a whole number of at least {least}")
