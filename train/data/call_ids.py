"""Where an assistant message's token ids spell the ids of its tool calls. These are random, and so never trained."""

import json
from collections.abc import Iterator, Sequence

import numpy as np

from ministral_jax.tokenizer import Tokenizer

_LISTED_VERSIONS = ("v3", "v7")  # [TOOL_CALLS][{"name": ..., "arguments": ..., "id": ...}, ...]


def call_id_tokens(tokenizer: Tokenizer, ids: Sequence[int]) -> np.ndarray:
    """Which ids of an assistant message with tool calls belong to the id of a call, bool [T].

    In v11 these are [CALL_ID] and what follows it up to [ARGS]. In v3 and v7 calls are a JSON list, and each token that
    holds a byte of `, "id": "..."` is one. v2, v13 and v15 write no ids.
    """
    marked = np.zeros(len(ids), bool)
    if tokenizer.version == "v11":
        begin, end = tokenizer.special_id("[CALL_ID]"), tokenizer.special_id("[ARGS]")
        inside = False
        for place, token in enumerate(ids):
            inside = token == begin or (inside and token != end)
            marked[place] = inside
    elif tokenizer.version in _LISTED_VERSIONS:
        first = 1 + max(place for place, token in enumerate(ids) if token == tokenizer.special_id("[TOOL_CALLS]"))
        pieces = [tokenizer.token_bytes(token, first=place == 0) for place, token in enumerate(ids[first:])]
        ends = np.cumsum([len(piece) for piece in pieces])
        starts = ends - [len(piece) for piece in pieces]
        for begin, end in _id_spans(b"".join(pieces).decode()):
            marked[first:] |= (starts < end) & (ends > begin)
    return marked


def _id_spans(calls: str) -> Iterator[tuple[int, int]]:
    """The bytes, from and to, of each `, "id": "..."` in a JSON list of calls, where it ends its object."""
    decoder = json.JSONDecoder()
    at = 1  # behind [
    while calls[at] != "]":
        at += len(calls[at:]) - len(calls[at:].lstrip(", "))
        call, at = decoder.raw_decode(calls, at)
        if "id" in call:
            text = f', "id": "{call["id"]}"'
            start = len(calls[: at - 1].encode()) - len(text)
            yield start, start + len(text)
