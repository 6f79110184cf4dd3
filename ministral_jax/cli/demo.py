"""`ministral demo`: the whole path on the bundled model, without a download. It finds a number in a long text."""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import Commands, new_command, positive
from .failures import UsageError
from .output import waiting, write
from .texts import read_text

if TYPE_CHECKING:
    from infer.generate import Generator

BUNDLED_MODEL = Path(__file__).parent.parent / "bundled" / "passkey"

QUESTION = "What is the pass key?"
KEY_SENTENCE = "The pass key is {key}."
SEPARATOR = "\n\n"
WINDOWS_LONG = 6  # of the generated document: further than the windowed layers of one period see
FACTS = 4  # of the generated document: the pass key and three other numbers
PAGE_SIZE, PREFILL_CHUNK = 8, 64  # small, as the model's window is: pages of 64 tokens would hold two windows
MOST_TOKENS = 64  # far more than an answer has: the same number is used to time the model, by the same programs

_DESCRIPTION = """\
Runs the bundled model, a small Ministral with interleaved attention windows: hides a pass
key in a document several windows long, asks for it, and says whether the answer is right,
how fast it came, and what the key/value cache cost against one without windows.

Exit code 0 only if the answer is right."""

_EXAMPLE = """\
example:
  ministral demo
  ministral demo --seed 7
  ministral demo --document letter.txt --key 48213 --depth 0.5"""


def add_command(commands: Commands) -> None:
    parser = new_command(
        commands, "demo", "find a pass key with the bundled model, no download", _DESCRIPTION, _EXAMPLE
    )
    parser.set_defaults(run=run)
    parser.add_argument("--document", metavar="FILE", help="a text of your own to hide the key in")
    parser.add_argument("--key", metavar="DIGITS", help="the five digits to hide (default: drawn from --seed)")
    parser.add_argument(
        "--depth", type=float, metavar="X", help="where it is hidden, 0 the start and 1 the end (default: from --seed)"
    )
    parser.add_argument(
        "--windows-long",
        type=positive,
        default=WINDOWS_LONG,
        metavar="N",
        help=f"length of the generated document in attention windows (default: {WINDOWS_LONG})",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of document, key and depth (default: 0)")


@dataclass(frozen=True)
class HiddenKey:
    """A document, the key in it, and the sentence that states it."""

    document: str
    key: str
    sentence: str


def run(arguments: argparse.Namespace) -> int:
    """Runs the demo; 0 if the answer is right."""
    _check(arguments)
    from infer.generate import Generator

    from ..checkpoints.load import load_model
    from ..compilation import keep_compiled_programs
    from ..tokenizer import Tokenizer

    keep_compiled_programs()
    tokenizer = Tokenizer.load(BUNDLED_MODEL)
    with waiting("loading the bundled model"):
        model = load_model(BUNDLED_MODEL)
    generator = Generator(model, tokenizer, page_size=PAGE_SIZE, prefill_chunk=PREFILL_CHUNK)
    window = next(width for width in model.config.windows if width is not None)

    def count(text: str) -> int:
        return len(tokenizer.encode(text))

    hidden = _hide(arguments, window * arguments.windows_long, count)
    _describe_document(hidden, window, count)
    prompt = f"{hidden.document}{SEPARATOR}{QUESTION}"
    answer = _ask(generator, prompt)
    right = answer.strip() == hidden.key
    write("right\n" if right else f"wrong: it is {hidden.key}\n")
    _describe_cost(generator, prompt)
    return 0 if right else 1


def _check(arguments: argparse.Namespace) -> None:
    if arguments.key is not None and not re.fullmatch(r"[0-9]{5}", arguments.key):
        raise UsageError(f"--key {arguments.key!r}: expected five digits, which is what the model was trained on")
    if arguments.depth is not None and not 0 <= arguments.depth <= 1:
        raise UsageError(f"--depth {arguments.depth}: expected 0 (the start) to 1 (the end)")


def _hide(arguments: argparse.Namespace, tokens: int, count: Callable[[str], int]) -> HiddenKey:
    """The user's document with the key in it, or one like those of the training with a key it never saw."""
    from train.passkey import documents

    rng = random.Random(arguments.seed)
    key = arguments.key or documents.random_number(rng, "held-out")
    depth = rng.random() if arguments.depth is None else arguments.depth
    sentence = KEY_SENTENCE.format(key=key)
    if arguments.document is not None:
        return HiddenKey(_insert(read_text(arguments.document), sentence, depth), key, sentence)
    _, *others = documents.random_facts(rng, FACTS, "held-out")
    facts = [documents.Fact(documents.PASS_KEY, key, sentence), *others]
    depths = [depth, *(rng.random() for _ in others)]
    return HiddenKey(documents.write_document(rng, facts, depths, tokens, count), key, sentence)


def _insert(text: str, sentence: str, depth: float) -> str:
    """`text` with `sentence` between two of its sentences (or words, where it has none), nearest to `depth`."""
    text = text.strip()
    borders = [found.end() for found in re.finditer(r"[.!?]\s+", text)] or [m.end() for m in re.finditer(r"\s+", text)]
    at = min([0, *borders, len(text)], key=lambda border: abs(border - depth * len(text)))
    return f"{text[:at].rstrip()} {sentence} {text[at:]}".strip()


def _describe_document(hidden: HiddenKey, window: int, count: Callable[[str], int]) -> None:
    tokens = count(hidden.document)
    before = count(hidden.document[: hidden.document.index(hidden.sentence)])
    write(
        f"document  {tokens} tokens, {tokens / window:.1f} attention windows of {window}; "
        f"{hidden.sentence!r} stands after {before} tokens\n"
        f"question  {QUESTION}\n"
    )


def _ask(generator: Generator, prompt: str) -> str:
    """Streams the answer and returns it."""
    from infer.sampling import SamplingParams

    stream = generator.stream([{"role": "user", "content": prompt}], SamplingParams(max_tokens=MOST_TOKENS))
    pieces = iter(stream)
    with waiting("compiling"):
        piece = next(pieces, None)
    write("answer    ")
    while piece is not None:
        write(piece.text)
        piece = next(pieces, None)
    write("\n")
    return stream.reply.message.content


def _describe_cost(generator: Generator, prompt: str) -> None:
    """Tokens per second of a run that compiles nothing, and bytes of the cache beside those of one without windows."""
    from infer.sampling import SamplingParams

    from ..cache import plan_cache

    timed = SamplingParams(max_tokens=MOST_TOKENS, ignore_eos=True)
    generator.chat([{"role": "user", "content": prompt}], timed)
    timing, plan, config = generator.timing, generator.cache_plan, generator.model.config
    assert plan is not None  # something was generated
    full = plan_cache(
        config.with_windows(None),
        batch=1,
        length=plan.length,
        chunk=PREFILL_CHUNK,
        page_size=plan.page_size,
        dtype=generator.dtype,
    ).n_bytes
    write(
        f"speed     prefill {timing.prompt_tokens / timing.prefill_seconds:,.0f} tokens/s, "
        f"decode {(timing.new_tokens - 1) / timing.decode_seconds:,.0f} tokens/s\n"
        f"cache     {generator.cache_bytes / 1024:,.0f} KiB for {plan.length} tokens; if every layer were full, "
        f"{full / 1024:,.0f} KiB ({full / generator.cache_bytes:.1f} times as much)\n"
    )
