"""Held-out accuracy of a passkey model: `python -m train.passkey.evaluate DIR [--text FILE]`. Trains nothing.

Every document hides a held-out pass key among three held-out distractors. A document counts when all five digits and
the end token are the model's first choice, each given the right ones before it: the same as greedy decoding giving
exactly the key. The ablation runs the same weights with every layer windowed, where what stands further back
than L * (W - 1) tokens cannot reach the answer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from ministral_jax.checkpoints.load import load_model
from ministral_jax.errors import MinistralError
from ministral_jax.transformer import Transformer

from . import documents
from .conversations import ConversationEncoder
from .documents import Conversation

LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 48)  # in windows
REQUIRED_LENGTHS = 4  # windows up to which REQUIRED_ACCURACY is asked for
REQUIRED_ACCURACY = 0.95
DEPTH_BINS = 5
DOCUMENTS_PER_CELL = 12
SHORTEST_ROW = 128  # tokens; rows are padded to this or a doubling of it, so that few shapes are compiled
TOKENS_PER_BATCH = 8192
SEED = "evaluation"


@dataclass(frozen=True)
class Case:
    """One document with its question and answer, as the ids of the whole chat, and where the key stands in it."""

    windows: int
    depth: float
    ids: tuple[int, ...]
    answer: int  # index of the answer's first token
    document_tokens: int
    distance: int  # from the key's last digit to the token that the first digit is read from


def make_case(
    rng: random.Random,
    encoder: ConversationEncoder,
    windows: int,
    depth: float,
    window: int,
    text: str | None = None,
) -> Case:
    """A held-out document of `windows` windows with the key at `depth`; filler is cut from `text` if it is given."""
    facts = documents.random_facts(rng, 4, "held-out")
    depths = [depth, *(rng.random() for _ in facts[1:])]
    tokens = windows * window
    if text is None:
        document = documents.write_document(rng, facts, depths, tokens, encoder.count)
    else:
        document = documents.hide_in_text(rng, text, facts, depths, tokens, encoder.count)
    question = rng.choice(documents.QUESTIONS).format(label=documents.PASS_KEY)
    conversation = Conversation(document, rng.choice(documents.SEPARATORS), (question,), (facts[0].number,))
    ids, answered = encoder.conversation(conversation)
    answer = answered.index(True)
    digits = ids[answer : answer + 5]
    key_end = 4 + max(i for i in range(answer - 5) if ids[i : i + 5] == digits)
    return Case(windows, depth, tuple(ids), answer, encoder.count(document), answer - 1 - key_end)


def make_cases(
    encoder: ConversationEncoder,
    window: int,
    *,
    lengths: Sequence[int] = LENGTHS,
    per_cell: int = DOCUMENTS_PER_CELL,
    text: str | None = None,
) -> list[Case]:
    """`per_cell` documents for every length and every fifth of the depth; the same at every call."""
    rng = random.Random(SEED)
    return [
        make_case(rng, encoder, windows, (part + rng.random()) / DEPTH_BINS, window, text)
        for windows in lengths
        for part in range(DEPTH_BINS)
        for _ in range(per_cell)
    ]


def exact_answers(model: Transformer, cases: Sequence[Case]) -> list[bool]:
    """For each case, whether greedy decoding gives exactly the key and then ends."""

    @jax.jit
    def all_right(tokens: Int[Array, "B T"], answered: Bool[Array, "B T"]) -> Bool[Array, "B"]:
        best = model(tokens[:, :-1]).argmax(-1)  # [B, T-1]
        return ((best == tokens[:, 1:]) | ~answered[:, 1:]).all(-1)

    right = [False] * len(cases)
    order = sorted(range(len(cases)), key=lambda index: len(cases[index].ids))
    while order:
        length = SHORTEST_ROW
        while length < len(cases[order[0]].ids):
            length *= 2
        chosen = [index for index in order[: TOKENS_PER_BATCH // length] if len(cases[index].ids) <= length]
        order = order[len(chosen) :]
        tokens = np.zeros((TOKENS_PER_BATCH // length, length), np.int32)
        answered = np.zeros(tokens.shape, bool)
        for row, index in enumerate(chosen):
            case = cases[index]
            tokens[row, : len(case.ids)] = case.ids
            answered[row, case.answer : len(case.ids)] = True
        for index, exact in zip(chosen, np.asarray(all_right(tokens, answered)), strict=False):
            right[index] = bool(exact)
    return right


def share(right: Sequence[bool]) -> float | None:
    """The share of true values, None of nothing."""
    return round(sum(right) / len(right), 4) if right else None


def table(cases: Sequence[Case], right: Sequence[bool]) -> list[dict[str, Any]]:
    """One row per length: documents, their mean size in tokens, accuracy, and accuracy by fifths of the depth."""
    rows: list[dict[str, Any]] = []
    for windows in sorted({case.windows for case in cases}):
        chosen = [(case, ok) for case, ok in zip(cases, right, strict=True) if case.windows == windows]
        by_depth = [
            share([ok for case, ok in chosen if int(case.depth * DEPTH_BINS) == part]) for part in range(DEPTH_BINS)
        ]
        rows.append(
            {
                "windows": windows,
                "documents": len(chosen),
                "mean_tokens": round(sum(case.document_tokens for case, _ in chosen) / len(chosen)),
                "accuracy": share([ok for _, ok in chosen]),
                "accuracy_by_depth": by_depth,
            }
        )
    return rows


def evaluate(directory: Path, text: str | None = None) -> dict[str, Any]:
    """Accuracy by length and depth, of the model and of the same weights with every layer windowed."""
    model = load_model(directory)
    window = min(window for window in model.config.windows if window is not None)
    windowed_model = load_model(directory, windows=[window])
    cases = make_cases(ConversationEncoder(directory / "tekken.json"), window, text=text)
    right, windowed = exact_answers(model, cases), exact_answers(windowed_model, cases)
    required = [ok for case, ok in zip(cases, right, strict=True) if case.windows <= REQUIRED_LENGTHS]
    return {
        "documents": len(cases),
        "window": window,
        "accuracy": share(right),
        "accuracy_up_to_four_windows": share(required),
        "by_length": table(cases, right),
        "every_layer_windowed": ablation(cases, right, windowed, model.config.n_layers * (window - 1), window),
    }


def ablation(
    cases: Sequence[Case], right: Sequence[bool], windowed: Sequence[bool], reach: int, window: int
) -> dict[str, Any]:
    """What the model without its full layers still finds, within one window and beyond what the stack reaches."""
    far = [index for index, case in enumerate(cases) if case.distance > reach]
    near = [index for index, case in enumerate(cases) if case.distance < window]
    return {
        "reach_in_tokens": reach,
        "documents_beyond_reach": len(far),
        "accuracy_beyond_reach": share([windowed[index] for index in far]),
        "intact_model_on_the_same": share([right[index] for index in far]),
        "documents_within_one_window": len(near),
        "accuracy_within_one_window": share([windowed[index] for index in near]),
        "by_length": table(cases, windowed),
    }


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Prints a table of `table`'s rows."""
    parts = [f"{part * 100 // DEPTH_BINS}-{(part + 1) * 100 // DEPTH_BINS} %" for part in range(DEPTH_BINS)]
    print(f"\n{title}\nwindows  documents  tokens  accuracy   by depth" + "".join(f"{part:>10}" for part in parts))
    for row in rows:
        depths = "".join(f"{value:10.1%}" for value in row["accuracy_by_depth"])
        size = f"{row['windows']:>7}  {row['documents']:>9}  {row['mean_tokens']:>6}"
        print(f"{size}  {row['accuracy']:>8.1%}           {depths}")


def report(result: dict[str, Any]) -> None:
    """Prints what `evaluate` found."""
    windowed = result["every_layer_windowed"]
    show("Held-out exact match", result["by_length"])
    show("The same weights, every layer windowed", windowed["by_length"])
    print(
        f"\n{result['documents']} documents. Up to {REQUIRED_LENGTHS} windows:"
        f" {result['accuracy_up_to_four_windows']:.1%} (required: {REQUIRED_ACCURACY:.0%}).\n"
        f"{windowed['documents_beyond_reach']} keys further back than {windowed['reach_in_tokens']} tokens:"
        f" {windowed['intact_model_on_the_same']:.1%} intact,"
        f" {windowed['accuracy_beyond_reach']:.1%} with every layer windowed.\n"
        f"{windowed['documents_within_one_window']} keys within one window:"
        f" {windowed['accuracy_within_one_window']:.1%} with every layer windowed."
    )


def read_text(path: Path) -> str:
    """The text in a file. Raises MinistralError if it cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MinistralError(f"{path} cannot be read as UTF-8 text: {error}") from error


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Held-out accuracy of a passkey model, by length and depth.")
    parser.add_argument("directory", type=Path, help="directory with params.json, weights and tekken.json")
    parser.add_argument("--text", type=Path, help="cut the filler from this file; only prints")
    arguments = parser.parse_args()
    try:
        text = read_text(arguments.text) if arguments.text else None
        result = evaluate(arguments.directory, text)
    except MinistralError as error:
        raise SystemExit(f"error: {error}") from None
    report(result)
    if text is None:
        path = arguments.directory / "evaluation.json"
        temporary = path.with_suffix(".partial")
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(temporary, path)


if __name__ == "__main__":
    main()
