"""`ministral score`: the log-probability of each token of a sequence, and perplexity."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import MinistralError, RequestError
from .arguments import Commands, add_model, new_command, token_ids
from .hosts import add_hosts
from .models import OpenModel, open_model
from .output import waiting, write, write_json
from .texts import read_text

if TYPE_CHECKING:
    from infer.scoring import Score

_DESCRIPTION = """\
Scores a sequence in one pass: the natural log-probability of each token given those
before it, and the likeliest token at each place.

--ids are taken as they are, no bos is added, and no tokenizer file is needed. --text and
--file begin with the model's bos. A --file longer than --max-length is scored in blocks
of that many tokens, each beginning with bos and unaware of the one before."""

_EXAMPLE = """\
example:
  ministral score ./Ministral-8B --text 'The capital of France is Paris.'
  ministral score ./Ministral-8B --file book.txt --max-length 4096
  ministral score ./Ministral-8B --ids 1,5,9 --json

--json prints {"ids": [...], "logprobs": [null, ...], "top": [[id, logprob], ...]}, all of
one length; top[i] is the best prediction of ids[i+1]."""


def add_command(commands: Commands) -> None:
    parser = new_command(commands, "score", "log-probability of each token, perplexity", _DESCRIPTION, _EXAMPLE)
    parser.set_defaults(run=run)
    add_model(parser)
    add_hosts(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--ids", type=token_ids, metavar="A,B,C", help="token ids to score")
    what.add_argument("--text", help="text to score")
    what.add_argument("--file", metavar="FILE", help="UTF-8 text to score; `-` reads stdin")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")


def run(arguments: argparse.Namespace) -> int:
    """Scores and prints; returns the exit code."""
    opened = open_model(arguments, tokenizer="not used" if arguments.ids else "needed")
    sequences = _sequences(arguments, opened)
    with waiting(f"scoring {sum(map(len, sequences))} tokens"):
        scores = _score_all(opened, sequences)
    if arguments.json:
        write_json(
            {
                "ids": [token for score in scores for token in score.ids],
                "logprobs": [value for score in scores for value in score.logprobs],
                "top": [list(pair) for score in scores for pair in score.top],
            }
        )
        return 0
    if arguments.file is None:
        _show_tokens(opened, scores[0])
    _show_summary(scores)
    return 0


def _sequences(arguments: argparse.Namespace, opened: OpenModel) -> list[list[int]]:
    """What is scored at once: one sequence, or the blocks of a file."""
    published = opened.model.config.max_length
    limit = min(arguments.max_length or published, published)
    if arguments.file is not None:
        tokenizer = opened.required_tokenizer
        ids = tokenizer.encode(read_text(arguments.file))
        size = max(limit - 1, 1)
        return [[tokenizer.bos_id, *ids[at : at + size]] for at in range(0, max(len(ids), 1), size)]
    ids = arguments.ids or opened.required_tokenizer.encode(arguments.text, bos=True)
    if len(ids) > limit:
        raise RequestError(
            f"{len(ids)} tokens to score: expected at most {limit}; --file scores longer texts in blocks"
        )
    return [ids]


def _score_all(opened: OpenModel, sequences: Sequence[Sequence[int]]) -> list[Score]:
    from infer.scoring import score

    scores = [score(opened.model, ids) for ids in sequences]
    for result in scores:
        numbers = [value for value in result.logprobs if value is not None] + [value for _, value in result.top]
        if not all(map(math.isfinite, numbers)):
            raise MinistralError(
                "the model's log-probabilities are not finite: its weights hold NaN or infinity, "
                "or overflow this dtype; --dtype float32 rules the latter out"
            )
    return scores


def _show_tokens(opened: OpenModel, score: Score) -> None:
    """A line per token: id, text where there is a tokenizer, log-probability, and what was likeliest there."""

    def text(token: int) -> str:
        return "" if opened.tokenizer is None else "\t" + repr(opened.tokenizer.decode([token], keep_special=True))

    expected = [None, *score.top[:-1]]
    for token, logprob, best in zip(score.ids, score.logprobs, expected, strict=True):
        if logprob is None or best is None:
            write(f"{token}{text(token)}\n")
        else:
            write(f"{token}{text(token)}\t{logprob:.4f}\tbest {best[0]}{text(best[0])}\t{best[1]:.4f}\n")


def _show_summary(scores: Sequence[Score]) -> None:
    known = [value for score in scores for value in score.logprobs if value is not None]
    blocks = f" in {len(scores)} blocks" if len(scores) > 1 else ""
    if not known:
        write("1 token: nothing before it to predict it from\n")
        return
    mean = -sum(known) / len(known)
    perplexity = f"{math.exp(mean):.4f}" if mean < 700 else "beyond 1e300"
    write(f"{len(known)} tokens scored{blocks}: {mean:.4f} nats each, perplexity {perplexity}\n")
