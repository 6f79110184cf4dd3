"""Arguments that several commands share, and how their values are read. Imports nothing heavy."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..config import CACHE_DTYPES
from ..errors import RequestError
from .failures import UsageError

if TYPE_CHECKING:
    from infer.sampling import SamplingParams

ACTIVATIONS = ("plain", "quantized")
DTYPES = ("auto", "float32", "bfloat16", "float16")

# The cache is allocated for prompt and answer: with no bound, a word to a model of 262144 tokens would cost 26 GiB.
MAX_TOKENS = 1024

Commands = Any  # argparse does not name the type that add_subparsers returns


def new_command(commands: Commands, name: str, summary: str, description: str, example: str) -> argparse.ArgumentParser:
    """A command's parser with --debug, its help showing defaults as written and the example last."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser


def add_model(parser: argparse.ArgumentParser, *, weights: bool = True) -> None:
    """MODEL and what decides how it is read; without `weights`, only what its config needs."""
    parser.add_argument("model", metavar="MODEL", help="a folder as published, or a Hugging Face id")
    group = parser.add_argument_group("model")
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hugging Face id (default: main)")
    group.add_argument(
        "--windows",
        metavar="PATTERN",
        help="attention windows instead of the file's: a named pattern (interleaved, full), or a list repeated over "
        "the layers, such as none,32768,32768,32768",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of weights and cache (default: auto, the checkpoint's on accelerators and float32 on CPU)",
    )
    if weights:
        add_mesh(group)
        group.add_argument(
            "--max-length",
            type=positive,
            metavar="N",
            help="longest sequence in tokens, prompt and answer (default: what the model was published for)",
        )
        group.add_argument(
            "--activations",
            choices=ACTIVATIONS,
            help="between quantised weights: plain leaves them alone, quantized insists on rounding them (default: as "
            "the weights' format says)",
        )
        group.add_argument(
            "--adapter",
            metavar="DIR",
            help="a LoRA adapter to run the model with: lora.safetensors, or PEFT's adapter_config.json and weights",
        )


def add_mesh(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Over which devices, and how."""
    parser.add_argument(
        "--mesh",
        metavar="SIZES",
        help="spread the model over devices: fsdp=4,tensor=2, with * for those that are left, or auto (default: one "
        "device)",
    )
    parser.add_argument(
        "--rules",
        default="all",
        metavar="NAME",
        help="what is split along which axis of the mesh: all, data, tensor, fsdp, fsdp+tensor, expert, context "
        "(default: all)",
    )


def add_images(parser: Any, shown: str) -> None:
    """--image, which may be given several times; `shown` says where the pictures stand."""
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help=f"a picture, {shown}; may be given several times"
    )


def open_images(arguments: argparse.Namespace) -> list[Any]:
    """The pictures of --image, decoded. Raises TokenizerError for one that cannot be."""
    from ..images import open_image

    return [open_image(path) for path in arguments.image]


def add_cache(parser: argparse.ArgumentParser) -> None:
    """How keys and values are kept while generating."""
    parser.add_argument(
        "--cache-dtype",
        choices=CACHE_DTYPES,
        metavar="D",
        help=f"of keys and values: {', '.join(CACHE_DTYPES)} (default: that of the model)",
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How an answer is chosen and where it ends."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens",
        type=positive,
        default=MAX_TOKENS,
        metavar="N",
        help=f"most new tokens, as far as the context leaves room for them (default: {MAX_TOKENS})",
    )
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="0 takes the likeliest token (default: 0)"
    )
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K likeliest (default: 0, all)")
    group.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="keep the likeliest up to probability P (default: 1)"
    )
    group.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="drop what is P times less likely (default: 0)"
    )
    group.add_argument("--seed", type=int, metavar="N", help="of the random draws (default: another every time)")
    group.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X", help="on tokens seen before (default: 1, none)"
    )
    group.add_argument(
        "--presence-penalty", type=float, default=0.0, metavar="X", help="on tokens of the answer (default: 0)"
    )
    group.add_argument(
        "--frequency-penalty",
        type=float,
        default=0.0,
        metavar="X",
        help="on tokens of the answer, per occurrence (default: 0)",
    )
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    group.add_argument("--stop-ids", type=token_ids, default=[], metavar="A,B", help="token ids that end the answer")
    group.add_argument("--ignore-eos", action="store_true", help="go on past the end-of-sequence token")


def sampling_params(arguments: argparse.Namespace, *, logprobs: int | None = None) -> SamplingParams:
    """The request that the arguments of `add_sampling` ask for. Raises UsageError for a value that is not allowed."""
    from infer.sampling import SamplingParams

    try:
        return SamplingParams(
            max_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            min_p=arguments.min_p,
            seed=arguments.seed,
            repetition_penalty=arguments.repetition_penalty,
            presence_penalty=arguments.presence_penalty,
            frequency_penalty=arguments.frequency_penalty,
            stop=tuple(arguments.stop),
            stop_ids=tuple(arguments.stop_ids),
            ignore_eos=arguments.ignore_eos,
            logprobs=logprobs,
        )
    except RequestError as error:
        raise UsageError(str(error)) from error


def positive(text: str) -> int:
    """A whole number from 1 up."""
    number = whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return number


def token_ids(text: str) -> list[int]:
    """Token ids separated by commas or spaces; at least one, none negative."""
    ids = [whole(part) for part in text.replace(",", " ").split()]
    if not ids or min(ids) < 0:
        raise argparse.ArgumentTypeError(f"{text[:60]!r}: expected token ids such as 1,5,9")
    return ids


def whole(text: str) -> int:
    """A whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not a whole number") from None
