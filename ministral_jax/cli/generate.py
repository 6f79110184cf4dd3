"""`ministral generate`: continues prompts, text or token ids, one or a batch."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from .arguments import (
    Commands,
    add_cache,
    add_images,
    add_model,
    add_sampling,
    new_command,
    open_images,
    sampling_params,
    token_ids,
    whole,
)
from .failures import UsageError
from .hosts import add_hosts
from .models import OpenModel, open_model
from .output import note_to_people, waiting, write, write_json
from .texts import read_text

if TYPE_CHECKING:
    from infer.answer import Completion, TokenLogprob
    from infer.generate import Generator
    from infer.sampling import SamplingParams

    from ..tokenizer import ChatTokens

_DESCRIPTION = """\
Continues prompts as they are, without a chat template. A single prompt streams to
stdout; several are run as a batch.

A text prompt begins with the model's bos; --ids are taken as they are. With --ids and
no tokenizer file in MODEL, no text is shown and nothing but --stop-ids, --max-tokens
and the context ends an answer; with one, its end-of-sequence token does too."""

_EXAMPLE = """\
example:
  ministral generate ./Ministral-8B --prompt 'The river Nile' --max-tokens 40
  ministral generate ./Ministral-8B --ids 1,5,9 --max-tokens 8 --json

--json prints {"ids": [...], "text": ..., "finish_reason": "stop"|"length"}: the new ids
without the one that ended them; a list of these for several prompts."""


def add_command(commands: Commands) -> None:
    parser = new_command(commands, "generate", "continue prompts, text or token ids", _DESCRIPTION, _EXAMPLE)
    parser.set_defaults(run=run)
    add_model(parser)
    add_hosts(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--prompt", action="append", metavar="TEXT", help="to continue; `-` reads stdin; several make a batch"
    )
    what.add_argument(
        "--ids", action="append", type=token_ids, metavar="A,B,C", help="token ids to continue; several make a batch"
    )
    add_images(parser, "before the text of the prompt, or for the image tokens of --ids")
    what.add_argument("--ids-file", metavar="FILE", help="a line of token ids per prompt, or JSON lists of them")
    add_cache(parser)
    add_sampling(parser)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument(
        "--logprobs",
        type=whole,
        metavar="N",
        help="with --json: each new token's log-probability and the N likeliest instead (0 to 20)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Generates and prints; returns the exit code."""
    if arguments.logprobs is not None and not arguments.json:
        raise UsageError("--logprobs needs --json")
    ids, pictures = _given_ids(arguments), open_images(arguments)
    if pictures and len(ids if ids is not None else arguments.prompt) != 1:
        raise UsageError("--image: expected a single prompt, which the pictures belong to")
    opened = open_model(arguments, tokenizer="needed" if ids is None or pictures else "if there", images=bool(pictures))
    params = sampling_params(arguments, logprobs=arguments.logprobs)
    shown = [opened.required_tokenizer.encode_image(picture) for picture in pictures]
    prompts = ids if ids is not None else [_encode(opened, text, shown) for text in arguments.prompt]
    images = [[image for one in shown for image in one.images]] * len(prompts)
    generator = opened.generator(arguments.max_length, arguments.cache_dtype)
    if len(prompts) == 1 and not arguments.json:
        _stream(generator, prompts[0], images, params)
    else:
        with waiting(f"generating from {len(prompts)} prompts"):
            completions = generator.generate(prompts, params, images=images)
        _show_batch(generator, completions, as_json=arguments.json)
    _tell_speed(generator)
    return 0


def _given_ids(arguments: argparse.Namespace) -> list[list[int]] | None:
    """The prompts given as token ids, or None if they are text."""
    if arguments.ids_file is None:
        return arguments.ids
    text = read_text(arguments.ids_file)
    try:
        return _listed_ids(text)
    except (ValueError, argparse.ArgumentTypeError):
        raise UsageError(
            f"{arguments.ids_file}: expected lines of token ids such as 1,5,9, or a JSON list of ids or of lists of ids"
        ) from None


def _listed_ids(text: str) -> list[list[int]]:
    if not text.lstrip().startswith("["):
        lines = [line for line in text.splitlines() if line.strip()]
        return [token_ids(line) for line in lines] if lines else [token_ids(text)]
    read = json.loads(text)
    prompts = read if read and all(isinstance(entry, list) for entry in read) else [read]
    if any(not prompt or any(type(token) is not int or token < 0 for token in prompt) for prompt in prompts):
        raise ValueError
    return prompts


def _encode(opened: OpenModel, prompt: str, shown: list[ChatTokens]) -> list[int]:
    """bos, the pictures, the text."""
    tokenizer = opened.required_tokenizer
    text = tokenizer.encode(read_text("-") if prompt == "-" else prompt)
    return [tokenizer.bos_id, *(token for picture in shown for token in picture.tokens), *text]


def _stream(generator: Generator, prompt: list[int], images: list[list[Any]], params: SamplingParams) -> None:
    """Writes text as it comes, or the ids where there is no tokenizer."""
    pieces = generator.stream_ids([prompt], params, images=images)
    with waiting(f"reading a prompt of {len(prompt)} tokens"):
        piece = next(pieces, None)
    separator = ""
    while piece is not None:
        if generator.tokenizer is not None:
            write(piece.text)
        elif piece.ids:
            write(separator + ",".join(map(str, piece.ids)))
            separator = ","
        piece = next(pieces, None)
    write("\n")


def _show_batch(generator: Generator, completions: list[Completion], *, as_json: bool) -> None:
    has_text = generator.tokenizer is not None
    if as_json:
        documents = [_document(completion, has_text) for completion in completions]
        write_json(documents[0] if len(documents) == 1 else documents)
        return
    for number, completion in enumerate(completions, 1):
        shown = completion.text if has_text else ",".join(map(str, completion.ids))
        write(f"--- {number} of {len(completions)} ({completion.finish_reason})\n{shown}\n")


def _document(completion: Completion, has_text: bool) -> dict[str, Any]:
    document: dict[str, Any] = {
        "ids": list(completion.ids),
        "text": completion.text if has_text else None,
        "finish_reason": completion.finish_reason,
    }
    if completion.logprobs:
        document["logprobs"] = [_logprob(entry) for entry in completion.logprobs]
    return document


def _logprob(entry: TokenLogprob) -> dict[str, Any]:
    return {"id": entry.id, "logprob": entry.logprob, "top": [list(pair) for pair in entry.top]}


def _tell_speed(generator: Generator) -> None:
    timing = generator.timing
    parts = [f"{timing.prompt_tokens} prompt tokens in {timing.prefill_seconds:.2f} s"]
    parts.append(f"{timing.new_tokens} new ones in {timing.decode_seconds:.2f} s, compilation included")
    note_to_people("; ".join(parts))
