"""Tiny tekken files for tests: a few hundred ids, every control token of a version, no download. Holds no tests."""

import base64
import json
from pathlib import Path
from typing import Any

# The pattern of the published tekken files.
_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Each is two earlier pieces put together. The first bytes of a three-byte character are among them, so that one
# character is spread over tokens in more than one way.
_MERGES = (b"in", b"he", b"th", b"the", b" the", b"ing", b" a", b"er", b"\xe4\xbd", b"\xe4\xbd\xa0")

_INSTRUCTION_SPECIALS = ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
_TOOL_SPECIALS = ("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]")
_IMAGE_SPECIALS = ("[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]")
_INFILL_SPECIALS = ("[PREFIX]", "[MIDDLE]", "[SUFFIX]")
_SYSTEM_SPECIALS = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]")
_FIRST_SPECIALS = (
    *("<unk>", "<s>", "</s>"),
    *_INSTRUCTION_SPECIALS,
    *_TOOL_SPECIALS,
    *_IMAGE_SPECIALS,
    *_INFILL_SPECIALS,
    *_SYSTEM_SPECIALS,
)
_LATER_SPECIALS = {
    11: ("[ARGS]", "[CALL_ID]"),
    13: ("[THINK]", "[/THINK]"),
    15: ("[MODEL_SETTINGS]", "[/MODEL_SETTINGS]"),
}
_SPECIAL_COUNT = 48

_EFFORT = {"type": "enum", "accepts_none": True, "default": "none"}


def tiny_tekken(version: str = "v13") -> dict[str, Any]:
    """The JSON document of a tekken file of that version: 48 control ids, the 256 bytes, and ten merges."""
    number = int(version.removeprefix("v"))
    pieces = [bytes([byte]) for byte in range(256)] + list(_MERGES)
    names = list(_FIRST_SPECIALS)
    for since, added in _LATER_SPECIALS.items():
        names += added if number >= since else ()
    document: dict[str, Any] = {
        "config": {
            "pattern": _PATTERN,
            "num_vocab_tokens": len(pieces),
            "default_vocab_size": len(pieces) + _SPECIAL_COUNT,
            "default_num_special_tokens": _SPECIAL_COUNT,
            "version": version,
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
            for rank, piece in enumerate(pieces)
        ],
        # Four-pixel patches, merged two by two: an image of 20 x 13 pixels is two rows of three [IMG].
        ("image" if number >= 13 else "multimodal"): {
            "image_patch_size": 4,
            "max_image_size": 56,
            "spatial_merge_size": 2,
        },
    }
    if number > 3:  # v3 files were published without the list
        document["special_tokens"] = [
            {"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)
        ]
    if number >= 15:
        document["model_settings_builder"] = {"reasoning_effort": dict(_EFFORT, values=["none", "high"])}
    return document


def write_tiny_tekken(directory: Path, version: str = "v13") -> Path:
    """Write a tiny tekken.json of a version, "v3" to "v15", into the directory; returns its path."""
    path = directory / "tekken.json"
    path.write_text(json.dumps(tiny_tekken(version)))
    return path
