"""Passkey conversations as token ids and batches of them, through mistral-common. Texts are made in documents.py.

Encoding a whole chat from its text for every row would keep the processor from training, so a text is cut where
tekken's own pattern always cuts, each piece is encoded once by mistral-common and remembered. The tests hold the
result against mistral-common's encoding of the whole chat.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from . import documents
from .documents import Conversation, Split

# Between a visible character and " letter", and on both sides of a digit, tekken's pattern starts a new piece.
PIECE_BORDER = re.compile(r"(?<=\S)(?= [^\W\d_])|(?=\d)|(?<=\d)")


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum: rows of `length` tokens, and what the conversations in them are like.

    `filler` is the span of document sizes as a share of what the row has room for; `facts` and `questions` are
    inclusive ranges, and never more questions than facts are asked.
    """

    length: int
    facts: tuple[int, int]
    questions: tuple[int, int]
    filler: tuple[float, float]


class ConversationEncoder:
    """Turns conversations into ids with the special tokens of mistral-common's version 3 template."""

    def __init__(self, tekken: Path) -> None:
        tokenizer = MistralTokenizer.from_file(tekken).instruct_tokenizer.tokenizer
        assert isinstance(tokenizer, Tekkenizer)
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        self.begin, self.end = tokenizer.bos_id, tokenizer.eos_id
        self.question_begin = tokenizer.get_special_token("[INST]")
        self.question_end = tokenizer.get_special_token("[/INST]")
        self.vocabulary_size = tokenizer.n_words

    def text(self, text: str) -> list[int]:
        """The ids of plain text, without special tokens."""
        ids: list[int] = []
        for piece in PIECE_BORDER.split(text):
            known = self._known.get(piece)
            if known is None:
                known = self._known[piece] = self._tokenizer.encode(piece, bos=False, eos=False)
            ids += known
        return ids

    def count(self, text: str) -> int:
        """How many tokens a text has."""
        return len(self.text(text))

    def conversation(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        """The ids of the whole chat, and for each whether it belongs to an answer (its end token included)."""
        ids, answered = [self.begin], [False]
        for turn, (question, answer) in enumerate(zip(conversation.questions, conversation.answers, strict=True)):
            asked = conversation.first_turn if turn == 0 else question
            prompt = [self.question_begin, *self.text(asked), self.question_end]
            reply = [*self.text(answer), self.end]
            ids += prompt + reply
            answered += [False] * len(prompt) + [True] * len(reply)
        return ids, answered


def random_conversation(rng: random.Random, stage: Stage, encoder: ConversationEncoder, split: Split) -> Conversation:
    """A conversation that fits into a row of the stage; facts stand at uniformly random depths."""
    facts = documents.random_facts(rng, rng.randint(*stage.facts), split)
    asked = rng.sample(facts, min(len(facts), rng.randint(*stage.questions)))
    if facts[0] not in asked:
        asked[rng.randrange(len(asked))] = facts[0]
    questions = tuple(rng.choice(documents.QUESTIONS).format(label=fact.label) for fact in asked)
    answers = tuple(fact.number for fact in asked)
    # [INST], [/INST], </s> and five digits for each question; <s>; the separator.
    outside = sum(encoder.count(question) + 8 for question in questions) + 3
    tokens = int((stage.length + 1 - outside) * rng.uniform(*stage.filler))
    depths = [rng.random() for _ in facts]
    document = documents.write_document(rng, facts, depths, tokens, encoder.count)
    return Conversation(document, rng.choice(documents.SEPARATORS), questions, answers)


def batch(
    rng: random.Random, stage: Stage, rows: int, encoder: ConversationEncoder, split: Split
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, the token that follows each, and whether that one is part of an answer: three arrays [B, T].

    A conversation that does not fit is drawn again.
    """
    ids = np.zeros((rows, stage.length + 1), np.int32)
    answered = np.zeros((rows, stage.length + 1), bool)
    row = 0
    while row < rows:
        tokens, marks = encoder.conversation(random_conversation(rng, stage, encoder, split))
        if len(tokens) <= stage.length + 1:
            ids[row, : len(tokens)] = tokens
            answered[row, : len(tokens)] = marks
            row += 1
    return ids[:, :-1], ids[:, 1:], answered[:, 1:]
