"""`ministral chat`: a conversation in the terminal, or one turn of it for a script."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MinistralError
from .arguments import (
    Commands,
    add_cache,
    add_images,
    add_model,
    add_sampling,
    new_command,
    open_images,
    sampling_params,
)
from .models import open_model
from .output import note, note_to_people, waiting, write, write_json
from .texts import read_text

if TYPE_CHECKING:
    from infer.chat import ChatReply, ChatSession, ChatStream

_DESCRIPTION = """\
Talks with a model in its own chat template. Answers stream to stdout; reasoning, where a
model shows it, goes to stderr.

In a terminal: /image FILE shows a picture with the next message, /reset forgets the
conversation, /exit leaves; Ctrl-C stops an answer, and leaves when pressed twice in a row.
With --prompt, or when stdin is no terminal (all of it is then the message), one answer is
given."""

_EXAMPLE = """\
example:
  ministral chat ./Ministral-8B --system 'Answer in one sentence.'
  ministral chat ./Ministral-8B --prompt 'Why is the sky blue?' --max-tokens 200
  cat letter.txt | ministral chat ./Ministral-8B
  ministral chat ./Ministral-3-8B --image cat.png --image dog.jpg --prompt 'Which is older?'

Tool calls are printed as a line of JSON each: {"name", "arguments", "id"}. In a terminal
you are then asked for the result of each. --json prints {"content", "reasoning",
"tool_calls", "finish_reason"}."""


def add_command(commands: Commands) -> None:
    parser = new_command(commands, "chat", "talk with a model", _DESCRIPTION, _EXAMPLE)
    parser.set_defaults(run=run)
    add_model(parser)
    group = parser.add_argument_group("conversation")
    group.add_argument("--prompt", metavar="TEXT", help="ask this, print the answer and leave")
    add_images(group, "shown with the first message")
    group.add_argument("--system", metavar="TEXT", help="the system prompt")
    group.add_argument("--tools", metavar="FILE", help="a JSON list of tools the model may call")
    group.add_argument("--json", action="store_true", help="for one turn: one JSON document on stdout")
    add_cache(parser)
    add_sampling(parser)


def run(arguments: argparse.Namespace) -> int:
    """Talks until the user leaves, or once; returns the exit code."""
    from infer.chat import ChatSession

    tools = None if arguments.tools is None else _read_tools(Path(arguments.tools))
    params = sampling_params(arguments)
    pictures = open_images(arguments)
    converses = arguments.prompt is None and sys.stdin.isatty() and not arguments.json
    opened = open_model(arguments, tokenizer="needed", images=converses or bool(pictures))
    generator = opened.generator(arguments.max_length, arguments.cache_dtype)
    session = ChatSession(generator, system=arguments.system, tools=tools, params=params)
    if converses:
        _converse(session, pictures)
        return 0
    asked = read_text("-") if arguments.prompt is None else arguments.prompt
    reply = _answer(session.ask(asked, pictures), silent=arguments.json)
    if arguments.json:
        write_json(_document(reply))
    return 0


def _read_tools(path: Path) -> list[dict[str, Any]]:
    try:
        tools = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise MinistralError(f"{path}: not JSON ({error}): expected a list of tools") from None
    if not isinstance(tools, list):
        raise MinistralError(f"{path}: a JSON {type(tools).__name__}, expected a list of tools")
    return tools


def _answer(stream: ChatStream, *, silent: bool = False) -> ChatReply:
    """Writes an answer as it comes, then its tool calls; `silent` only waits for it."""
    pieces = iter(stream)
    with waiting("reading"):
        piece = next(pieces, None)
    reasoned = False
    while piece is not None:
        if not silent and piece.reasoning:
            print(piece.text, end="", file=sys.stderr, flush=True)
        elif not silent:
            write(("\n" if reasoned and sys.stderr.isatty() else "") + piece.text)
        reasoned = piece.reasoning
        piece = next(pieces, None)
    reply = stream.reply
    if not silent:
        write("\n" if reply.message.content or not reply.message.tool_calls else "")
        for call in reply.message.tool_calls:
            write_json(_call(call))
    for problem in reply.message.problems:
        note(f"a tool call could not be read: {problem}")
    return reply


def _call(call: Any) -> dict[str, Any]:
    return {"name": call.name, "arguments": json.loads(call.arguments), "id": call.id}


def _document(reply: ChatReply) -> dict[str, Any]:
    message = reply.message
    return {
        "content": message.content,
        "reasoning": message.reasoning,
        "tool_calls": [_call(call) for call in message.tool_calls],
        "finish_reason": reply.finish_reason,
    }


def _converse(session: ChatSession, pictures: list[Any]) -> None:
    """Reads messages from the terminal and answers them, until /exit, end of input, or two Ctrl-C in a row.

    `pictures` go with the next message.
    """
    with contextlib.suppress(ImportError):  # not on every system; its import gives input() line editing and a history
        import readline  # noqa: F401
    note_to_people("/image FILE, /reset forgets the conversation, /exit leaves, Ctrl-C stops an answer")
    interrupted = False
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            write("\n")
            return
        except KeyboardInterrupt:
            write("\n")
            if interrupted:
                return
            interrupted = True
            note("Ctrl-C again leaves")
            continue
        if text == "/exit":
            return
        if text == "/reset":
            session.reset()
            pictures = []
            note("forgotten")
        elif text.split(maxsplit=1)[:1] == ["/image"]:
            pictures = _with_picture(pictures, text.removeprefix("/image").strip())
        elif text:
            interrupted = _turn(session, text, pictures)
            pictures = []


def _with_picture(pictures: list[Any], path: str) -> list[Any]:
    """The pictures and one more; a note, and only they, if it cannot be read."""
    from ..images import open_image

    try:
        return [*pictures, open_image(path)]
    except MinistralError as error:
        note(str(error))
        return pictures


def _turn(session: ChatSession, text: str, pictures: list[Any]) -> bool:
    """One message with its pictures, and its answer with the results of tools that it asks for.

    True if Ctrl-C stopped it.
    """
    before, stream = session.messages, None
    try:
        stream = session.ask(text, pictures)
        _answer(stream)
        while calls := session.keep(stream).message.tool_calls:
            stream = session.give_results({call.id: input(f"result of {call.name} > ") for call in calls})
            _answer(stream)
    except MinistralError as error:
        note(str(error))
        session.messages = before
    except (KeyboardInterrupt, EOFError):
        write("\n")
        if stream is not None and not stream.reply.message.tool_calls:
            session.keep(stream)
        else:  # calls without results: no template has a place for them
            session.messages = before
        return True
    return False
