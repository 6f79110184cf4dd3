"""Synthetic passkey documents and the questions about them. Text only: token ids are made in conversations.py.

A document is filler with labelled numbers strewn into it ("The pass key is 48213."); each question asks for one
of them by its label. Filler comes in several styles, so that a model trained on it copes with a reader's own
text: plain sentences, loose words, invented words, and noise with stray digits and punctuation.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ministral_jax.errors import MinistralError

Split = Literal["train", "held-out"]

PASS_KEY = "pass key"
DISTRACTOR_LABELS = (
    "locker number", "room number", "order number", "badge number", "gate code", "door code", "safe code",
    "flight number", "parcel number", "account number", "ticket number", "phone code", "desk number", "spare key",
    "alarm code", "invoice number", "locker code", "area code", "member number", "pass number", "house key",
    "street number", "server code", "test key",
)  # fmt: skip
STATEMENTS = (
    "The {label} is {number}.",
    "The {label} is {number}.",
    "The {label} is {number}.",
    "The {label} is {number}. Remember it.",
    "Remember that the {label} is {number}.",
    "Your {label} is {number}.",
    "Note: the {label} is {number}.",
    "The {label}: {number}.",
)
QUESTIONS = (
    "What is the {label}?",
    "What is the {label}?",
    "What is the {label}?",
    "what is the {label}?",
    "What was the {label}?",
    "Which number is the {label}?",
    "Tell me the {label}.",
)
SEPARATORS = ("\n\n", "\n", " ")

SUBJECTS = (
    "The old man", "A young woman", "The river", "My neighbour", "The captain", "A quiet child", "The teacher",
    "The wind", "Our train", "The small dog", "The baker", "A stranger", "The gardener", "The moon", "The doctor",
    "She", "He", "They", "We", "Someone",
)  # fmt: skip
VERBS = (
    "walked", "waited", "sang", "looked", "slept", "turned", "worked", "stood", "travelled", "stayed", "moved",
    "talked", "rested", "played", "read", "returned",
)  # fmt: skip
PLACES = (
    "near the bridge", "under the trees", "in the market", "by the sea", "at the station", "on the hill",
    "behind the house", "in the garden", "across the field", "beside the lake", "in the city", "along the road",
)  # fmt: skip
TIMES = (
    "in the morning", "for a long time", "until the evening", "before the rain", "after the war", "every day",
    "in the summer", "without a word", "for many years", "once again", "as before", "late at night",
)  # fmt: skip
COMMON_WORDS = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from or had an "
    "they which one you were all her she there would their we him been has when who will no more if out so up "
    "said what its about than into them can only other time new some could these two may first then do any "
    "like my now over such our man me even most made after also well many must before back through years "
    "where much your way down should because long each just state those people too world good how very make "
    "still see men work life being here both between never know under last another day us great old year off "
    "since against right take house use water few small large part number place case point government company "
    "system program question during without again around however home found thought went say once general "
    "high upon school every country think night model table paper music light green white black river "
    "mountain letter window garden story money power river computer software data file function value error "
    "license copyright permission notice copies history science language english machine energy memory "
    "attention north south morning winter summer island village captain"
)
WORDS = tuple(COMMON_WORDS.split())
LETTERS = "eeeeeeetttttaaaaaooooiiiinnnnsssshhhrrrddlluuccmmffwwyyggppbbvkxjqz"
MARKS = ",;:-()[]{}'\"/*&%$#@!?_+=<>|~^`\\.…—é°ü–“”’"
ENDINGS = (".", ".", ".", ".", "!", "?", ";", "...")


def split_of(number: str) -> Split:
    """Which side a number belongs to, by its hash: about one in ten is held out, and no number is on both sides."""
    return "held-out" if hashlib.sha256(number.encode()).digest()[0] % 10 == 0 else "train"


def random_number(rng: random.Random, split: Split) -> str:
    """Five random digits from one side of the split."""
    while True:
        number = f"{rng.randrange(100_000):05d}"
        if split_of(number) == split:
            return number


@dataclass(frozen=True)
class Fact:
    """One labelled number: what is asked for, and the sentence that states it."""

    label: str
    number: str
    sentence: str


@dataclass(frozen=True)
class Conversation:
    """A document, and the questions and answers that follow it. The first question stands behind the document."""

    document: str
    separator: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]

    @property
    def first_turn(self) -> str:
        """The text of the first user message."""
        return self.document + self.separator + self.questions[0]


def random_facts(rng: random.Random, count: int, split: Split) -> list[Fact]:
    """`count` facts with different labels and different numbers; the first one is the pass key."""
    labels = [PASS_KEY, *rng.sample(DISTRACTOR_LABELS, count - 1)]
    numbers: list[str] = []
    while len(numbers) < count:
        number = random_number(rng, split)
        if number not in numbers:
            numbers.append(number)
    return [
        Fact(label, number, rng.choice(STATEMENTS).format(label=label, number=number))
        for label, number in zip(labels, numbers, strict=True)
    ]


def plain_sentence(rng: random.Random) -> str:
    """A grammatical sentence over a small vocabulary, sometimes with a small number in it."""
    words = [rng.choice(SUBJECTS), rng.choice(VERBS), rng.choice(PLACES)]
    if rng.random() < 0.5:
        words.append(rng.choice(TIMES))
    if rng.random() < 0.1:
        words.append(f"with {rng.randrange(2, 10 ** rng.randrange(1, 5))} others")
    return " ".join(words) + "."


def loose_words(rng: random.Random) -> str:
    """Common English words in no order, with commas and other endings."""
    words = [rng.choice(WORDS) for _ in range(rng.randrange(3, 12))]
    words = [word + "," if rng.random() < 0.08 else word for word in words]
    if rng.random() < 0.7:
        words[0] = words[0].capitalize()
    return " ".join(words) + rng.choice(ENDINGS)


def invented_words(rng: random.Random) -> str:
    """Words of random letters: they fall into many short tokens, as rare words do."""
    words = ["".join(rng.choices(LETTERS, k=rng.randrange(1, 9))) for _ in range(rng.randrange(2, 8))]
    words = [word.capitalize() if rng.random() < 0.2 else word for word in words]
    return " ".join(words) + rng.choice(ENDINGS)


def noise(rng: random.Random) -> str:
    """Stray digits, marks, letters outside ASCII and upper-case runs."""
    words = []
    for _ in range(rng.randrange(2, 7)):
        kind = rng.randrange(4)
        if kind == 0:
            words.append(str(rng.randrange(10 ** rng.randrange(1, 7))))
        elif kind == 1:
            words.append("".join(rng.choices(MARKS, k=rng.randrange(1, 4))))
        elif kind == 2:
            words.append("".join(rng.choices(LETTERS, k=rng.randrange(1, 6))).upper())
        else:
            words.append(rng.choice(WORDS) + rng.choice(MARKS) + rng.choice(WORDS))
    return " ".join(words) + rng.choice((".", "", "!", ")"))


FILLERS: tuple[Callable[[random.Random], str], ...] = (plain_sentence, loose_words, invented_words, noise)
# How a document mixes the four: most are mostly plain, some are all of one kind, some of everything.
MIXTURES = ((1, 0, 0, 0), (6, 2, 1, 1), (1, 6, 1, 1), (1, 3, 4, 2), (1, 1, 1, 1), (0, 1, 0, 0))


def filler_sentences(rng: random.Random, tokens: int, count: Callable[[str], int]) -> list[tuple[str, int]]:
    """Sentences with their token counts, of one mixture, as many as fit into `tokens`."""
    weights = rng.choice(MIXTURES)
    sentences, total, misses = [], 0, 0
    while total < tokens and misses < 4:
        sentence = rng.choices(FILLERS, weights)[0](rng)
        size = count(" " + sentence)
        if total + size > tokens:
            misses += 1
            continue
        sentences.append((sentence, size))
        total += size
    return sentences


def write_document(
    rng: random.Random, facts: list[Fact], depths: list[float], tokens: int, count: Callable[[str], int]
) -> str:
    """A document of about `tokens` tokens with each fact at its depth, 0 the start and 1 the end.

    `count` gives the tokens of a text. Facts are kept even when `tokens` is too few for them.
    """
    room = tokens - sum(count(" " + fact.sentence) for fact in facts)
    filler = filler_sentences(rng, room, count)
    length = sum(size for _, size in filler)
    placed = sorted(zip(depths, range(len(facts)), strict=True))
    text, passed = [], 0
    for sentence, size in filler:
        while placed and placed[0][0] * length < passed + size / 2:
            text.append(facts[placed.pop(0)[1]].sentence)
        text.append(sentence)
        passed += size
    text += [facts[index].sentence for _, index in placed]
    joint = "\n" if rng.random() < 0.1 else " "
    return joint.join(text)


def hide_in_text(
    rng: random.Random,
    text: str,
    facts: list[Fact],
    depths: list[float],
    tokens: int,
    count: Callable[[str], int],
) -> str:
    """As `write_document`, with a passage of a reader's own text as filler, cut between words.

    Raises MinistralError if the text is shorter than the passage wanted.
    """
    words = text.split()
    room = tokens - sum(count(" " + fact.sentence) for fact in facts)
    if count(text) < room:
        raise MinistralError(f"the text has {count(text)} tokens, {room} are wanted: give a longer one")
    start = rng.randrange(len(words))
    passage: list[str] = []
    while room > 0:
        word = words[(start + len(passage)) % len(words)]
        room -= count(" " + word)
        passage.append(word)
    for depth, fact in sorted(zip(depths, facts, strict=True), key=lambda placed: -placed[0]):
        passage.insert(int(depth * (len(passage) + 1)), fact.sentence)
    return " ".join(passage)
