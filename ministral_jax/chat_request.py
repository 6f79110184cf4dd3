"""Conversations as plain dictionaries, made into the request that mistral-common renders. No template is here.

Imports mistral-common (about half a second): tokenizer.py imports this file only when a conversation is encoded.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.chunk import ImageChunk
from mistral_common.protocol.instruct.converters import convert_openai_messages, convert_openai_tools
from mistral_common.protocol.instruct.messages import AssistantMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.base import Tokenized
from mistral_common.tokens.tokenizers.image import ImageEncoding
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from .errors import TokenizerError
from .images import checked_image, image_of_part
from .tokenizer_files import one_line

ROLES = ("system", "developer", "user", "assistant", "tool")

# What mistral-common raises about a request: its validators, pydantic's, its assertions, sentencepiece and deep
# nesting (RuntimeError), and, for images, a missing OpenCV (ImportError) and what Pillow has left to say (OSError).
REQUEST_FAILURES = (MistralCommonException, AssertionError, ImportError, OSError, RuntimeError, ValueError)

_VALID_CALL_ID = re.compile(r"[a-zA-Z0-9]{9}")
_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

# Stands in a message while mistral-common converts it: it opens URLs only later, and by then a picture is here.
_PICTURE_HERE = {"type": "image_url", "image_url": {"url": "data:,"}}

Converted = TypeVar("Converted")


def chat_request(
    messages: Any, tools: Any, reasoning_effort: str | None, *, local_files: bool = True
) -> ChatCompletionRequest:
    """mistral-common's request for a conversation in OpenAI's or Mistral's dictionary form.

    Both may come from a file or a client, and so be anything; encode_chat says what they should be.

    Raises:
        TokenizerError: naming the message or tool that is not one.
    """
    _check_shape(messages, tools)
    call_ids = map_call_ids(_call_ids(messages))
    converted: list[Any] = []
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        pictures = _pictures(message, where, local_files)
        converted.append(_named(where, lambda m=message, p=pictures, w=where: _convert_message(m, p, call_ids, w)))
    converted_tools = None
    if tools is not None:
        converted_tools = [
            _named(f"tools[{place}]", lambda t=tool: convert_openai_tools([dict(t)])[0])
            for place, tool in enumerate(tools)
        ]
    fields = {"messages": converted, "tools": converted_tools, "reasoning_effort": reasoning_effort}
    return _named("conversation", lambda: ChatCompletionRequest.model_validate(fields))


def encode_request(mistral: MistralTokenizer, request: ChatCompletionRequest) -> Tokenized:
    """mistral-common's tokens for the request; what it refuses becomes a TokenizerError in its own words."""
    return _named("conversation", lambda: mistral.encode_chat_completion(request))


def encode_image(mistral: MistralTokenizer, image: Any, source: str) -> ImageEncoding:
    """mistral-common's ids and pixels of a Pillow image; TokenizerError where `source` knows no images."""
    picture, encoder = checked_image(image, "image"), mistral.instruct_tokenizer.image_encoder
    if encoder is None:
        raise TokenizerError(f"{source}: a tokenizer that knows no images; expected one of a model with a vision tower")
    return _named("image", lambda: encoder(ImageChunk(image=picture)))


def map_call_ids(found: Sequence[str]) -> dict[str, str]:
    """A valid id (nine alphanumerics, which mistral-common demands) for every tool-call id of a conversation.

    Valid ids stay. Others become nine base-62 digits of their SHA-256, so that the same foreign id has the same
    tokens in every request, and a cached prefix stays valid. Two ids never become one.
    """
    mapped = {call_id: call_id for call_id in found if _VALID_CALL_ID.fullmatch(call_id)}
    taken = set(mapped)
    for call_id in found:
        if call_id in mapped:
            continue
        attempt = 0
        while (candidate := _nine_digits(call_id, attempt)) in taken:
            attempt += 1
        mapped[call_id] = candidate
        taken.add(candidate)
    return mapped


def _nine_digits(call_id: str, attempt: int) -> str:
    digest = hashlib.sha256(f"{attempt}:{call_id}".encode(errors="surrogatepass")).digest()
    number = int.from_bytes(digest, "big")
    digits = []
    for _ in range(9):
        number, digit = divmod(number, len(_BASE62))
        digits.append(_BASE62[digit])
    return "".join(digits)


def _call_ids(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every tool-call id in order of appearance. "null" and "" mean that there is none: mistral-common judges them."""
    found = []
    for message in messages:
        found += [call.get("id") for call in message.get("tool_calls") or ()]
        found.append(message.get("tool_call_id"))
    return [call_id for call_id in found if isinstance(call_id, str) and call_id not in ("", "null")]


def _pictures(message: Mapping[str, Any], where: str, local_files: bool) -> dict[int, Any]:
    """The decoded pictures of a message's content, by their place in it."""
    content = message.get("content")
    parts = () if content is None or isinstance(content, str) else content
    found = {
        place: image_of_part(part, f"{where}.content[{place}]", local_files=local_files)
        for place, part in enumerate(parts)
    }
    return {place: picture for place, picture in found.items() if picture is not None}


def _convert_message(
    message: Mapping[str, Any], pictures: Mapping[int, Any], call_ids: Mapping[str, str], where: str
) -> Any:
    """mistral-common's message, with the pictures as we decoded them, and `prefix`, which its conversion drops."""
    fields = dict(message)
    if pictures:
        fields["content"] = [
            _PICTURE_HERE if place in pictures else part for place, part in enumerate(message["content"])
        ]
    # A lone surrogate, which JSON can spell, has no bytes: sentencepiece fails on it, tiktoken replaces it silently.
    json.dumps(fields, ensure_ascii=False, default=str).encode()
    if fields.get("tool_call_id") in call_ids:
        fields["tool_call_id"] = call_ids[fields["tool_call_id"]]
    if fields.get("tool_calls"):
        fields["tool_calls"] = [
            {**call, "id": call_ids[call["id"]]} if call.get("id") in call_ids else dict(call)
            for call in fields["tool_calls"]
        ]
    if isinstance(fields.get("content"), Sequence) and not isinstance(fields["content"], str):
        fields["content"] = [_content_part(part) for part in fields["content"]]
    converted: Any = convert_openai_messages([fields])[0]
    if pictures:
        content = [
            ImageChunk(image=pictures[place]) if place in pictures else chunk
            for place, chunk in enumerate(converted.content)
        ]
        converted = converted.model_copy(update={"content": content})
    prefix = fields.get("prefix", False)
    if not isinstance(prefix, bool):
        raise TokenizerError(f"{where}.prefix: {prefix!r}, expected true or false")
    if prefix and not isinstance(converted, AssistantMessage):
        raise TokenizerError(f"{where}.prefix: only an assistant message can be continued, this is {fields['role']}")
    return converted.model_copy(update={"prefix": True}) if prefix else converted


def _content_part(part: Mapping[str, Any]) -> dict[str, Any]:
    """A content part; Mistral's own client writes `thinking` as a list of text parts, mistral-common as a string."""
    fields = dict(part)
    thinking = fields.get("thinking")
    if isinstance(thinking, list) and all(isinstance(piece, Mapping) and "text" in piece for piece in thinking):
        fields["thinking"] = "".join(str(piece["text"]) for piece in thinking)
    return fields


def _check_shape(messages: Any, tools: Any) -> None:
    """Raise for what mistral-common's converters would trip over without a message."""
    for place, message in enumerate(_listed(messages, "messages")):
        where = f"messages[{place}]"
        role = message.get("role")
        if role not in ROLES:
            raise TokenizerError(f"{where}.role: {role!r}, expected one of {', '.join(ROLES)}")
        if role != "assistant" and message.get("content") is None:
            raise TokenizerError(f"{where}.content: missing, expected text or a list of parts")
        if role == "tool" and "tool_call_id" not in message:
            raise TokenizerError(f"{where}.tool_call_id: missing, expected the id of the call it answers")
        if not isinstance(message.get("content"), (str, type(None))):
            _listed(message["content"], f"{where}.content")
        if message.get("tool_calls") is not None:
            _listed(message["tool_calls"], f"{where}.tool_calls")
    for place, tool in enumerate(_listed(tools, "tools") if tools is not None else ()):
        if not isinstance(tool.get("function"), Mapping):
            raise TokenizerError(f"tools[{place}].function: {tool.get('function')!r}, expected an object")


def _listed(value: Any, where: str) -> Sequence[Mapping[str, Any]]:
    """The value, if it is a list of objects."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise TokenizerError(f"{where}: {type(value).__name__}, expected a list of objects")
    for place, entry in enumerate(value):
        if not isinstance(entry, Mapping):
            raise TokenizerError(f"{where}[{place}]: {type(entry).__name__}, expected an object")
    return value


def _named(where: str, convert: Callable[[], Converted]) -> Converted:
    """The conversion's result; what mistral-common refuses becomes a TokenizerError that says where."""
    try:
        return convert()
    except REQUEST_FAILURES as error:
        hint = "; pip install 'ministral-jax[images]'" if isinstance(error, ImportError) else ""
        raise TokenizerError(f"{where}: {one_line(error)}{hint}") from error
