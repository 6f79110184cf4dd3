"""Text to token ids and back, by mistral-common and nothing of our own. Parsing of what a model answers: parsing.py.

Loading imports mistral-common, which takes half a second; importing this file does not.
"""

import codecs
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import TokenizerError

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")

# sentencepiece writes one U+FFFD for each byte that is not UTF-8; Python and tiktoken one for each broken sequence.
_ONE_PER_BYTE = "ministral_jax.one_replacement_per_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\N{REPLACEMENT CHARACTER}" * (error.end - error.start), error.end


codecs.register_error(_ONE_PER_BYTE, _replace_each_byte)


@dataclass(frozen=True, eq=False)
class ChatTokens:
    """A rendered conversation.

    Attributes:
        tokens: the prompt, bos included; an image stands as its run of [IMG], [IMG_BREAK] and [IMG_END] ids.
        images: for each image in order, float32 pixels [channel, height, width] as the vision tower takes them.
    """

    tokens: list[int]
    images: tuple[np.ndarray, ...] = ()


class Tokenizer:
    """A published tokenizer file, tekken or SentencePiece, of any version from v1 to v15."""

    def __init__(self, mistral: Any, path: Path):
        """Use `Tokenizer.load`. Takes a loaded mistral-common tokenizer and the file it came from."""
        self._mistral: MistralTokenizer = mistral
        self._vocabulary = mistral.instruct_tokenizer.tokenizer
        self._training: MistralTokenizer | None = None
        self._pieces: dict[tuple[int, bool], bytes] = {}
        self.path = path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Read a tokenizer file, or the one in a directory as published.

        In a directory tekken.json is preferred, then tokenizer.model.vN, then tokenizer.model, as mistral-common
        does. The version is in tekken.json, or in the name of a SentencePiece file, or, for a bare
        tokenizer.model, told by its control pieces (none: v1; [INST]: v3; [SYSTEM_PROMPT] too: v7).

        Raises:
            TokenizerError: one line naming the file, what was found and what was expected.
        """
        from .tokenizer_files import find_tokenizer_file, load_mistral_tokenizer

        file = find_tokenizer_file(Path(path))
        return cls(load_mistral_tokenizer(file), file)

    def __repr__(self) -> str:
        return f"Tokenizer({self.version}, {self.vocabulary_size} tokens, {str(self.path)!r})"

    @property
    def mistral(self) -> "MistralTokenizer":
        """The mistral-common tokenizer underneath, for what is asked of it alone."""
        return self._mistral

    @property
    def version(self) -> str:
        """The template's version: "v1", "v2", "v3", "v7", "v11", "v13" or "v15"."""
        return self._vocabulary.version.value

    @property
    def is_tekken(self) -> bool:
        """Whether the file is tekken.json (byte-level) and not SentencePiece (word pieces with byte fallback)."""
        from mistral_common.tokens.tokenizers.tekken import is_tekkenizer

        return is_tekkenizer(self._vocabulary)

    @property
    def vocabulary_size(self) -> int:
        """How many ids there are, special ones included. A model's embedding may have more rows."""
        return self._vocabulary.n_words

    @property
    def bos_id(self) -> int:
        return self._vocabulary.bos_id

    @property
    def eos_id(self) -> int:
        return self._vocabulary.eos_id

    @property
    def pad_id(self) -> int | None:
        """The id of <pad>, or None where the file has none, as the SentencePiece files."""
        return self.special_id("<pad>")

    def special_id(self, name: str) -> int | None:
        """The id of the control token written `name`, such as "[THINK]", or None if this file lacks it."""
        return self._vocabulary.get_special_token(name) if self._vocabulary.is_special(name) else None

    def is_special(self, token_id: int) -> bool:
        """Whether the id is a control token, which decoded text leaves out."""
        return self._vocabulary.is_special(self.checked_id(token_id))

    def checked_id(self, token_id: int) -> int:
        """The id as an int.

        Raises:
            TokenizerError: it is outside the vocabulary; a model whose embedding has more rows may generate such ids.
        """
        token_id = int(token_id)
        if not 0 <= token_id < self.vocabulary_size:
            last = self.vocabulary_size - 1
            raise TokenizerError(f"token id {token_id} is not in the vocabulary of {self.path}, whose last is {last}")
        return token_id

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of plain text. Text that looks like a control token is text: `[INST]` never becomes its id.

        Raises:
            TokenizerError: the text holds a lone surrogate, which has no bytes.
        """
        return self._vocabulary.encode(_valid_text(text), bos=bos, eos=eos)

    def decode(self, ids: Iterable[int], keep_special: bool = False) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD.

        With `keep_special` control tokens are written by name, for people to look at, and SentencePiece shows its
        pieces as they are (`▁` for a space). Such text is never to be encoded again: use encode_chat.

        Raises:
            TokenizerError: an id is outside the vocabulary.
        """
        from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy

        policy = SpecialTokenPolicy.KEEP if keep_special else SpecialTokenPolicy.IGNORE
        return self._vocabulary.decode([self.checked_id(token_id) for token_id in ids], policy)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        reasoning_effort: str | None = None,
        for_training: bool = False,
        local_files: bool = True,
    ) -> ChatTokens:
        """Render a conversation: exactly the ids that mistral-common gives for the same request.

        Args:
            messages: dictionaries as OpenAI's and Mistral's clients write them: `role`, `content` (text or a list
                of parts: text, thinking, image_url, ...), `tool_calls`, `tool_call_id`; `reasoning_content` or
                `reasoning` become a thinking part. A last assistant message with `prefix: True` is left open for
                the model to continue. Tool-call ids that are not nine alphanumerics are mapped to such ids.
            tools: function definitions, `{"type": "function", "function": {"name", "description", "parameters"}}`.
            reasoning_effort: "none", "high", ...; v15 alone knows it.
            for_training: the conversation ends in a finished assistant message, closed by eos, instead of a turn
                that waits for an answer.
            local_files: image parts may name files of this machine. For messages of strangers, say False.

        Raises:
            TokenizerError: what mistral-common refuses, in its words; see docs/chat.md for the rules by version.
        """
        from . import chat_request, tokenizer_files

        mistral = self._mistral
        if for_training:
            self._training = self._training or tokenizer_files.for_training(mistral)
            mistral = self._training
        request = chat_request.chat_request(messages, tools, reasoning_effort, local_files=local_files)
        tokenized = chat_request.encode_request(mistral, request)
        return ChatTokens(tokens=list(tokenized.tokens), images=tuple(tokenized.images))

    def encode_image(self, image: Any) -> ChatTokens:
        """The ids and pixels of one Pillow image, for a prompt without a template.

        Raises:
            TokenizerError: the file knows no images; the picture is empty, huge, moving or of an odd mode.
        """
        from . import chat_request

        encoding = chat_request.encode_image(self._mistral, image, str(self.path))
        return ChatTokens(tokens=list(encoding.tokens), images=(encoding.image,))

    def encode_infill(self, prompt: str, suffix: str | None = None) -> list[int]:
        """The ids that ask a code model for the text between `prompt` and `suffix`.

        Raises:
            TokenizerError: the file has no [PREFIX] and [SUFFIX], or is of v1; a text holds a lone surrogate.
        """
        from mistral_common.protocol.fim.request import FIMRequest

        if self.version == "v1" or None in (self.special_id("[PREFIX]"), self.special_id("[SUFFIX]")):
            raise TokenizerError(
                f"{self.path}: fill-in-the-middle needs [PREFIX] and [SUFFIX], which {self.version} lacks"
            )
        request = FIMRequest(prompt=_valid_text(prompt), suffix=_valid_text(suffix) if suffix else suffix)
        return list(self._mistral.encode_fim(request).tokens)

    def token_bytes(self, token_id: int, first: bool = False) -> bytes:
        """The UTF-8 bytes that one token adds to a text; none for a control token, maybe part of a character.

        Args:
            token_id: the token.
            first: it begins the text, where SentencePiece drops the space it had put before the first word.

        Raises:
            TokenizerError: the id is outside the vocabulary.
        """
        key = (self.checked_id(token_id), first)
        if key not in self._pieces:
            self._pieces[key] = self._read_bytes(*key)
        return self._pieces[key]

    def _read_bytes(self, token_id: int, first: bool) -> bytes:
        if self.is_special(token_id):
            return b""
        if self.is_tekken:
            return self._vocabulary.id_to_byte_piece(token_id)
        if byte := _BYTE_PIECE.fullmatch(self._vocabulary.id_to_piece(token_id)):
            return bytes.fromhex(byte[1])
        if first:
            return self._vocabulary.decode([token_id]).encode()
        # sentencepiece has no text of a single inner token: what it adds to another one is that.
        before = self._vocabulary.encode("a", bos=False, eos=False)[-1:]
        return self._vocabulary.decode([*before, token_id])[len(self._vocabulary.decode(before)) :].encode()


def _valid_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(f"text is not valid Unicode: lone surrogate at character {error.start}") from error
    return text


class TextStream:
    """Text from ids that come one at a time.

    The pieces put together are `decode` of all the ids, however they fall: a character whose bytes are spread over
    tokens is held back until it is whole, and what cannot become one is U+FFFD as decode has it. Work per token is
    constant.
    """

    def __init__(self, tokenizer: Tokenizer, *, continuing: bool = False):
        """Begin a text; with `continuing`, go on from a prompt's, so that the first word keeps its space."""
        self._tokenizer = tokenizer
        self._at_start = not continuing
        policy = "replace" if tokenizer.is_tekken else _ONE_PER_BYTE
        self._decoder = codecs.getincrementaldecoder("utf-8")(policy)

    def feed(self, token_id: int) -> str:
        """The text that is certain after this id; often empty, never taken back.

        Raises:
            TokenizerError: the id is outside the vocabulary.
        """
        data = self._tokenizer.token_bytes(token_id, self._at_start)
        if self._tokenizer.is_special(token_id):
            return self.finish()
        self._at_start = False
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What is still held back, an unfinished character, as U+FFFD. More ids may follow."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
