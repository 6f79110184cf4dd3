"""Finding a tokenizer file, checking it, and handing it to mistral-common. Not the tokenizer that users hold.

Imports mistral-common (about half a second): tokenizer.py imports this file only when something is loaded.
"""

import json
import re
from pathlib import Path
from typing import Any

import regex
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.normalize import get_normalizer
from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
from mistral_common.tokens.tokenizers.base import Tokenizer as VocabularyFile
from mistral_common.tokens.tokenizers.base import TokenizerVersion
from mistral_common.tokens.tokenizers.instruct import (
    InstructTokenizerV1,
    InstructTokenizerV3,
    InstructTokenizerV7,
)
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer, is_sentencepiece
from mistral_common.tokens.tokenizers.tekken import is_tekken
from mistral_common.tokens.tokenizers.utils import get_one_valid_tokenizer_file

from .errors import TokenizerError

ACCEPTED_NAMES = "tekken.json, tokenizer.model.vN, tokenizer.model.vNm1 or tokenizer.model"

# Everything the readers of mistral-common, tiktoken and sentencepiece were seen to raise on a damaged file.
_READING_FAILURES = (
    MistralCommonException,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)

# Control pieces that a SentencePiece template needs. sentencepiece answers <unk> for a piece it lacks, silently.
_INSTRUCTION_PIECES = ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]")
_RESULT_PIECES = ("[TOOL_RESULTS]", "[/TOOL_RESULTS]")
_SYSTEM_PIECES = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]")

_BASE64 = re.compile(r"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{4}|[A-Za-z0-9+/]{3}=|[A-Za-z0-9+/]{2}==)")
_EVERY_KIND_OF_TEXT = "".join(map(chr, range(0x250))) + " \r\n\n  a1 你好 \u0e01\u0301\u2028 👍🏽 \n\t"
_LONGEST_REASON = 300


def one_line(error: BaseException) -> str:
    """What an error of mistral-common, pydantic or sentencepiece says, on one line of bounded length."""
    details = getattr(error, "errors", None)
    if callable(details):  # pydantic: only the first finding; a union reports every alternative it tried
        first: Any = details(include_url=False)[0]  # pyright: ignore[reportIndexIssue]
        text = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    elif isinstance(error, KeyError):
        text = f"no {error}"
    else:
        text = str(getattr(error, "message", "") or error) or type(error).__name__
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + "..."


def find_tokenizer_file(path: Path) -> Path:
    """The tokenizer file that `path` is, or that the directory `path` holds.

    In a directory mistral-common's own preference decides: tekken.json, else the last SentencePiece file by name.

    Raises:
        TokenizerError: nothing is there, or nothing that mistral-common reads.
    """
    if not path.exists():
        raise TokenizerError(f"{path}: no such file or directory; expected a tokenizer file or its directory")
    if path.is_file():
        if not (is_tekken(path) or is_sentencepiece(path)):
            raise TokenizerError(f"{path}: not a name that mistral-common reads; expected {ACCEPTED_NAMES}")
        return path
    names = sorted(entry.name for entry in path.iterdir() if is_tekken(entry) or is_sentencepiece(entry))
    if any(not name.endswith(".model") for name in names):  # a versioned name says more than a bare one
        names = [name for name in names if not name.endswith(".model")]
    try:
        return path / get_one_valid_tokenizer_file(names)
    except ValueError:
        hint = "; tokenizer.json is not read" if (path / "tokenizer.json").is_file() else ""
        raise TokenizerError(f"{path}: no tokenizer file; expected {ACCEPTED_NAMES}{hint}") from None


def load_mistral_tokenizer(path: Path) -> MistralTokenizer:
    """The mistral-common tokenizer in the file `path`, checked.

    Raises:
        TokenizerError: the file is damaged, contradicts itself or its name, or is of an unknown version.
    """
    if is_tekken(path):
        _check_tekken(path)
    try:
        read = _load_unversioned if path.name.endswith(".model") else MistralTokenizer.from_file
        mistral = read(path)
        _check_vocabulary(path, mistral.instruct_tokenizer.tokenizer)
    except _READING_FAILURES as error:
        raise TokenizerError(f"{path}: mistral-common refuses it: {one_line(error)}") from error
    return mistral


def for_training(mistral: MistralTokenizer) -> MistralTokenizer:
    """The same tokenizer under mistral-common's fine-tuning rules: the last message is a finished answer."""
    vocabulary = mistral.instruct_tokenizer.tokenizer
    return MistralTokenizer(
        mistral.instruct_tokenizer,
        validator=get_validator(vocabulary.version, mode=ValidationMode.finetuning),
        request_normalizer=get_normalizer(vocabulary.version, vocabulary.model_settings_builder),
    )


def _load_unversioned(path: Path) -> MistralTokenizer:
    """A bare `tokenizer.model`, whose version its control pieces tell.

    mistral-common takes such a file for v1. But Mistral 7B v0.3 and later publish the same name with the control
    pieces of v3, and there `[INST]` written as ordinary text would be a prompt the model never saw. Without [INST]
    as a control piece it is v1; with [SYSTEM_PROMPT] v7; otherwise v3 (no model was published with v2).
    """
    pieces = SentencePieceTokenizer(path, tokenizer_version=TokenizerVersion.v1)
    if not pieces.is_special("[INST]"):
        version, template = TokenizerVersion.v1, InstructTokenizerV1
    elif not pieces.is_special("[SYSTEM_PROMPT]"):
        version, template = TokenizerVersion.v3, InstructTokenizerV3
    else:
        version, template = TokenizerVersion.v7, InstructTokenizerV7
    return MistralTokenizer(
        template(SentencePieceTokenizer(path, tokenizer_version=version)),
        validator=get_validator(version, mode=ValidationMode.test),
        request_normalizer=get_normalizer(version),
    )


def _check_vocabulary(path: Path, vocabulary: VocabularyFile) -> None:
    """Raise for what mistral-common would only notice, or not notice, when text is encoded."""
    needed = ["<s>", "</s>"]
    if isinstance(vocabulary, SentencePieceTokenizer):
        number = vocabulary.version.version_num
        needed += [*_INSTRUCTION_PIECES, *_RESULT_PIECES] if number >= 2 else []
        needed += _SYSTEM_PIECES if number >= 7 else []
        needed += ["[ARGS]", "[CALL_ID]"] if number >= 11 else []
    for name in needed:
        if not vocabulary.is_special(name):
            raise TokenizerError(f"{path}: version {vocabulary.version.value} needs the control token {name}")
    bos, eos = vocabulary.get_special_token("<s>"), vocabulary.get_special_token("</s>")
    if (vocabulary.bos_id, vocabulary.eos_id) != (bos, eos):
        found = f"{vocabulary.bos_id} and {vocabulary.eos_id}"
        raise TokenizerError(f"{path}: bos and eos are ids {found}, expected those of <s> and </s>, {bos} and {eos}")


def _check_tekken(path: Path) -> None:
    """Raise for a tekken file that contradicts itself; mistral-common would assert, or take it and shift every id."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not a JSON document: {one_line(error)}") from error
    fault = _settings_fault(document) or _specials_fault(document) or _vocabulary_fault(document)
    if fault is not None:
        raise TokenizerError(f"{path}: {fault}")


def _settings_fault(document: Any) -> str | None:
    """What is wrong with `config` and `vocab` as a whole, or None."""
    if not isinstance(document, dict):
        return f"a JSON {type(document).__name__}, expected an object with config and vocab"
    config, vocabulary = document.get("config"), document.get("vocab")
    if not isinstance(config, dict):
        return f"config is {_shown(config)}, expected an object"
    if not isinstance(vocabulary, list):
        return f"vocab is {_shown(vocabulary)}, expected a list of tokens"
    if config.get("version") not in list(TokenizerVersion.__members__):
        known = ", ".join(TokenizerVersion.__members__)
        return f"config.version is {_shown(config.get('version'))}, expected one of {known}"
    if fault := _pattern_fault(config.get("pattern")):
        return f"config.pattern {fault}"
    for field in ("default_vocab_size", "default_num_special_tokens"):
        if type(config.get(field)) is not int or config[field] <= 0:
            return f"config.{field} is {_shown(config.get(field))}, expected a positive integer"
    specials = config["default_num_special_tokens"]
    size, largest = config["default_vocab_size"], len(vocabulary) + specials
    if not specials + 256 <= size <= largest:
        return f"config.default_vocab_size is {size}, expected {specials} special tokens + 256 bytes to {largest}"
    return None


def _pattern_fault(pattern: Any) -> str | None:
    """Why the pattern cannot split text into words, or None.

    tiktoken drops what no word matches, without a word about it, and aborts on an empty match.
    """
    if not isinstance(pattern, str):
        return f"is {_shown(pattern)}, expected a regular expression"
    try:
        words = [match[0] for match in regex.finditer(pattern, _EVERY_KIND_OF_TEXT, timeout=1)]
    except (regex.error, TimeoutError) as error:
        return f"is not a regular expression that splits text: {one_line(error)}"
    if "" in words or "".join(words) != _EVERY_KIND_OF_TEXT:
        return "does not split text into words without loss"
    return None


def _specials_fault(document: dict[str, Any]) -> str | None:
    """What is wrong with `special_tokens`, or None. An old file may have none."""
    specials, expected = document.get("special_tokens"), document["config"]["default_num_special_tokens"]
    if specials is None:
        return None
    if not isinstance(specials, list) or len(specials) > expected:
        return f"special_tokens is {_shown(specials)}, expected a list of at most {expected}"
    names: set[str] = set()
    for place, entry in enumerate(specials):
        if not isinstance(entry, dict) or not isinstance(entry.get("token_str"), str):
            return f"special_tokens[{place}] is {_shown(entry)}, expected an object with rank and token_str"
        if type(entry.get("rank")) is not int or entry["rank"] != place:
            return f"special_tokens[{place}].rank is {_shown(entry.get('rank'))}, expected {place}"
        if entry["token_str"] in names:
            return f"special_tokens[{place}].token_str is {entry['token_str']!r}, which is there already"
        names.add(entry["token_str"])
    return None


def _vocabulary_fault(document: dict[str, Any]) -> str | None:
    """The first entry of `vocab` that cannot be right, or None."""
    expected = {"rank", "token_bytes", "token_str"}
    seen: set[str] = set()
    for place, entry in enumerate(document["vocab"]):
        if not isinstance(entry, dict) or entry.keys() != expected:
            return f"vocab[{place}] is {_shown(entry)}, expected an object with {', '.join(sorted(expected))}"
        if entry["rank"] != place:
            return f"vocab[{place}].rank is {_shown(entry['rank'])}, expected {place}"
        encoded = entry["token_bytes"]
        if not isinstance(encoded, str) or not _BASE64.fullmatch(encoded):
            return f"vocab[{place}].token_bytes is {_shown(encoded)}, expected base64"
        if encoded in seen:
            return f"vocab[{place}].token_bytes is {_shown(encoded)}, which is there already"
        seen.add(encoded)
    return None


def _shown(value: Any) -> str:
    """A JSON value as an error shows it: short, and missing where it is."""
    if value is None:
        return "missing or null"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:60] + "..."
