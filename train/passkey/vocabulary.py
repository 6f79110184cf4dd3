"""Builds the bundled model's tekken.json: byte-pair merges over the text of its documents. Encodes nothing itself."""

from __future__ import annotations

import base64
import json
import os
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import regex

from . import documents

# The pre-tokenisation pattern of the published tekken files: digits always stand alone.
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
    "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
VOCABULARY_SIZE = 768
# Documents are kept short here, so that the labels and questions every document has weigh more than its filler.
CORPUS_DOCUMENTS = 3000
CORPUS_TOKENS = 120
CORPUS_SEED = "vocabulary"
RARE = 5  # pre-tokens seen fewer times (invented words, mostly) teach no merge


def corpus(documents_wanted: int = CORPUS_DOCUMENTS) -> Counter[str]:
    """How often each pre-token occurs in training documents and their questions."""
    rng, pieces, counts = random.Random(CORPUS_SEED), regex.compile(PATTERN), Counter[str]()
    for _ in range(documents_wanted):
        facts = documents.random_facts(rng, 4, "train")
        depths = [rng.random() for _ in facts]
        text = documents.write_document(rng, facts, depths, CORPUS_TOKENS, lambda text: len(text) // 4)
        asked = [rng.choice(documents.QUESTIONS).format(label=fact.label) for fact in facts]
        counts.update(pieces.findall(text + rng.choice(documents.SEPARATORS) + " ".join(asked)))
    return counts


def merge_pieces(counts: Counter[str], merges: int) -> list[bytes]:
    """The `merges` most useful byte pairs in the order of merging, each the joined bytes (Sennrich et al. 2016)."""
    words = {word: [bytes([byte]) for byte in word.encode()] for word in counts if counts[word] >= RARE}
    known: set[bytes] = {bytes([byte]) for byte in range(256)}
    merged: list[bytes] = []
    while len(merged) < merges:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, parts in words.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[word]
        first, second = max((pair for pair in pairs if pair[0] + pair[1] not in known), key=lambda p: (pairs[p], p))
        for word, parts in words.items():
            if first in parts:
                words[word] = _join(parts, first, second)
        merged.append(first + second)
        known.add(first + second)
    return merged


def _join(parts: list[bytes], first: bytes, second: bytes) -> list[bytes]:
    """`parts` with every adjacent (first, second) made one, from the left."""
    joined: list[bytes] = []
    at = 0
    while at < len(parts):
        if parts[at] == first and parts[at + 1 : at + 2] == [second]:
            joined.append(first + second)
            at += 2
        else:
            joined.append(parts[at])
            at += 1
    return joined


def tekken(size: int = VOCABULARY_SIZE) -> dict[str, object]:
    """The contents of a version 3 tekken file of `size` ids: specials, the 256 bytes, then merges in rank order."""
    merges = size - len(SPECIAL_TOKENS) - 256
    vocabulary = [bytes([byte]) for byte in range(256)] + merge_pieces(corpus(), merges)
    return {
        "config": {
            "pattern": PATTERN,
            "num_vocab_tokens": len(vocabulary),
            "default_vocab_size": size,
            "default_num_special_tokens": len(SPECIAL_TOKENS),
            "version": "v3",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
            for rank, piece in enumerate(vocabulary)
        ],
        "special_tokens": [
            {"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(SPECIAL_TOKENS)
        ],
    }


def write_tekken(directory: Path, size: int = VOCABULARY_SIZE) -> Path:
    """Writes `directory`/tekken.json and returns its path."""
    path = directory / "tekken.json"
    temporary = path.with_suffix(".json.partial")
    temporary.write_text(json.dumps(tekken(size), indent=1) + "\n")
    os.replace(temporary, path)
    return path
