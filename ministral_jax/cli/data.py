"""`ministral data`: checks of training data, and its conversion from other formats."""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import Commands, new_command, positive
from .failures import UsageError
from .output import note, progress_bar, write, write_json

if TYPE_CHECKING:
    from train.data.config import DataConfig
    from train.data.report import DataReport
    from train.data.sources import Source

    from ..tokenizer import Tokenizer

BAD_LINES = 1
_SHOWN_PER_KIND = 5
_LONGEST_PIECE = 400  # characters of the sample's pieces; the middle of longer ones is left out
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_LORA_FLOPS = 4  # operations per parameter and token: forward, and backward through frozen weights

_DESCRIPTION = """\
Training data in jsonl: text, conversations, tools, preference pairs.

`ministral data validate` says what is wrong with which line, and what training would see.
`ministral data convert` makes such files of ShareGPT, OpenAI and Alpaca data."""

_VALIDATE = """\
Reads every line, goes on past bad ones, and reports: bad lines by kind with file, line and
field; tokens of each source; rows and steps of one pass; and one sample as the model sees
it, the trained tokens marked by colour, or by ⟦ ⟧ where stdout is no terminal.

DATA is a jsonl file, a folder of them, a list "path[:weight],path[:weight]", or a YAML
file with a `data` section. Without a model or tokenizer, only the shape of the lines is
checked, and no token counted.

Exit codes: 0 every line is good, 1 some are bad."""

_VALIDATE_EXAMPLE = """\
example:
  ministral data validate chats.jsonl --model ./Ministral-8B --seq-len 8192
  ministral data validate 7B.yaml --write-corrected corrected/"""

_CONVERT = """\
Writes DST, a jsonl file for training, from SRC, a jsonl file or a JSON list. Turns after
the last answer are cut off, records without an answer left out, both counted. Tool calls
get ids of nine characters, the same every time.

Exit codes: 0 every record was understood, 1 some were left out as bad."""

_CONVERT_EXAMPLE = """\
example:
  ministral data convert sharegpt.json chats.jsonl
  ministral data convert calls.jsonl chats.jsonl --from openai"""


@dataclass(frozen=True)
class _Plan:
    """What the arguments or the YAML file say of a run."""

    config: DataConfig
    sources: tuple[Source, ...]
    evaluation: tuple[Source, ...]
    seq_len: int | None
    rows_per_step: int
    max_steps: int | None
    model: str | None


def add_command(commands: Commands) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(  # --debug belongs to the actions
        "data",
        help="check and convert training data",
        description=_DESCRIPTION,
        epilog="`ministral data ACTION --help` shows an action's options and an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    _add_validate(actions)
    _add_convert(actions)


def _add_validate(actions: Commands) -> None:
    parser = new_command(actions, "validate", "report bad lines, tokens and steps", _VALIDATE, _VALIDATE_EXAMPLE)
    parser.set_defaults(run=run_validate)
    parser.add_argument("data", metavar="DATA", help="jsonl file, folder, list of both, or YAML file")
    words = parser.add_mutually_exclusive_group()
    words.add_argument("--model", metavar="MODEL", help="whose tokenizer to use (default: that of the YAML file)")
    words.add_argument("--tokenizer", metavar="FILE", help="a tokenizer file, or its folder")
    parser.add_argument("--seq-len", type=positive, metavar="T", help="tokens per row, to count rows and steps")
    parser.add_argument("--batch-size", type=positive, metavar="B", help="rows per step (default: the file's, or 1)")
    parser.add_argument("--packing", metavar="P", help="first-fit, mistral-finetune or none (default: first-fit)")
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--tokens-per-second", type=positive, metavar="N", help="to tell how long a pass takes")
    speed.add_argument(
        "--teraflops", type=positive, metavar="N", help="sustained, to estimate it from the size of --model, for LoRA"
    )
    parser.add_argument("--write-corrected", metavar="DIR", help="write copies there with the good lines alone")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")


def _add_convert(actions: Commands) -> None:
    parser = new_command(actions, "convert", "make training data of other formats", _CONVERT, _CONVERT_EXAMPLE)
    parser.set_defaults(run=run_convert)
    parser.add_argument("source", metavar="SRC", help="jsonl file, or JSON file with a list")
    parser.add_argument("target", metavar="DST", help="jsonl file to write; it must not exist")
    parser.add_argument(
        "--from", dest="shape", choices=("sharegpt", "openai", "alpaca"), help="what SRC is (default: as it looks)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")


def run_convert(arguments: argparse.Namespace) -> int:
    """Converts and tells what became of it; returns the exit code."""
    from train.data.reshape import convert

    report = convert(Path(arguments.source), Path(arguments.target), arguments.shape)
    if arguments.json:
        write_json(report.to_dict())
    else:
        for problem in report.problems[:_SHOWN_PER_KIND]:
            write(f"{problem}\n")
        if len(report.problems) > _SHOWN_PER_KIND:
            write(f"... and {len(report.problems) - _SHOWN_PER_KIND} more\n")
        write(
            f"{report.shape}: {report.read} records read, {report.written} written; {report.empty} without an answer "
            f"and {len(report.problems)} bad left out; the end cut off {report.cut}\n"
        )
    return BAD_LINES if report.problems else 0


def run_validate(arguments: argparse.Namespace) -> int:
    """Validates and prints; returns the exit code."""
    from train.data.report import validate

    plan = _plan(arguments)
    tokenizer = _tokenizer(arguments, plan.model)
    corrected = None if arguments.write_corrected is None else Path(arguments.write_corrected)
    with progress_bar("reading") as progress:
        report = validate(
            plan.sources,
            tokenizer,
            plan.config,
            evaluation=plan.evaluation,
            seq_len=plan.seq_len,
            corrected=corrected,
            progress=progress,
        )
    steps = _steps(arguments, plan, report)
    if arguments.json:
        write_json(report.to_dict() | {"steps": steps})
    else:
        _show(report, steps, tokenizer)
    return BAD_LINES if report.problems else 0


def _plan(arguments: argparse.Namespace) -> _Plan:
    from train.data.config import DataConfig
    from train.data.report import sources_of
    from train.data.run_file import read_run_file
    from train.data.sources import parse_sources

    options = {} if arguments.packing is None else {"packing": arguments.packing}
    if Path(arguments.data).suffix not in (".yaml", ".yml"):
        sources = parse_sources(arguments.data)
        if not sources:
            raise UsageError("DATA: empty, expected a file, a folder or a list of them")
        return _Plan(DataConfig(**options), sources, (), arguments.seq_len, arguments.batch_size or 1, None, None)
    file = read_run_file(Path(arguments.data), **options)
    return _Plan(
        file.config,
        sources_of(file.config),
        sources_of(file.evaluation) if file.evaluation else (),
        arguments.seq_len or file.seq_len,
        arguments.batch_size or file.rows_per_step,
        file.max_steps,
        file.model,
    )


def _tokenizer(arguments: argparse.Namespace, model: str | None) -> Tokenizer | None:
    from ..checkpoints.hub import resolve
    from ..tokenizer import Tokenizer

    if arguments.tokenizer is not None:
        return Tokenizer.load(arguments.tokenizer)
    model = arguments.model or model
    if model is not None:
        return Tokenizer.load(resolve(model, weights=False))
    if arguments.seq_len is not None:
        raise UsageError("--seq-len: rows are counted in tokens; expected --model or --tokenizer too")
    note("no --model and no --tokenizer: what a line's template would make of it is not checked, no token counted")
    return None


def _steps(arguments: argparse.Namespace, plan: _Plan, report: DataReport) -> dict[str, Any] | None:
    """Steps of a pass and of the run, and seconds where the speed is known; None without packed rows."""
    if report.packing is None or not report.packing.rows:
        return None
    per_pass = -(-report.packing.rows // plan.rows_per_step)
    steps = plan.max_steps or per_pass
    document: dict[str, Any] = {
        "rows_per_step": plan.rows_per_step,
        "per_pass": per_pass,
        "max_steps": plan.max_steps,
        "passes": steps * plan.rows_per_step / report.packing.rows,
    }
    speed = arguments.tokens_per_second or _estimated_speed(arguments, plan.model)
    tokens = steps * plan.rows_per_step * report.packing.seq_len
    return document | {"seconds": None if speed is None else tokens / speed}


def _estimated_speed(arguments: argparse.Namespace, model: str | None) -> float | None:
    """Tokens per second at --teraflops, by the model's parameters; attention's own operations are left out."""
    if arguments.teraflops is None:
        return None
    from ..checkpoints.hub import resolve
    from ..config_files import read_config
    from ..memory import count_parameters

    model = arguments.model or model
    if model is None:
        raise UsageError("--teraflops: needs the size of a model; expected --model")
    parameters = count_parameters(read_config(resolve(model, weights=False))).active
    return arguments.teraflops * 1e12 / (_LORA_FLOPS * parameters)


def _show(report: DataReport, steps: dict[str, Any] | None, tokenizer: Tokenizer | None) -> None:
    _show_problems(report)
    for source in report.sources:
        weight = "" if source.weight is None else f", weight {source.weight:g}"
        write(f"{source.path}{weight}: {source.good} of {source.lines} lines good")
        if source.tokens:
            write(f", {source.tokens} tokens, {source.trained} trained, the longest {source.longest}")
        write(f", {source.too_long} longer than a row\n" if source.too_long else "\n")
    if report.packing is not None:
        packing = report.packing
        write(
            f"{packing.rows} rows of {packing.seq_len}, {packing.fill_rate:.1%} full, "
            f"{packing.trained} of {packing.tokens} tokens trained\n"
        )
    if steps is not None:
        _show_steps(steps)
    for copy in report.corrected:
        write(f"good lines: {copy}\n")
    if report.sample is not None and tokenizer is not None:
        write(f"\nthe first sample ({tokenizer.version}), trained tokens marked:\n\n{_marked(report.sample)}\n")


def _show_problems(report: DataReport) -> None:
    for kind, count in report.kinds.items():
        write(f"{kind}: {count} bad line{'s' if count > 1 else ''}\n")
        shown = [problem for problem in report.problems if problem.kind == kind][:_SHOWN_PER_KIND]
        for problem in shown:
            write(f"  {problem}\n")
        if count > len(shown):
            write(f"  ... and {count - len(shown)} more: --json lists all\n")


def _show_steps(steps: dict[str, Any]) -> None:
    rows = steps["rows_per_step"]
    write(f"{steps['per_pass']} steps of {rows} row{'s' if rows > 1 else ''} are one pass")
    if steps["max_steps"] is not None:
        write(f"; {steps['max_steps']} steps are {steps['passes']:.2f} passes")
    if steps["seconds"] is not None:
        hours, seconds = divmod(round(steps["seconds"]), 3600)
        write(f"; about {hours} h {seconds // 60} min" if hours else f"; about {seconds // 60} min {seconds % 60} s")
    write("\n")


def _marked(sample: list[tuple[str, bool]]) -> str:
    """The sample with its trained pieces in green on a terminal, in brackets elsewhere; long pieces shortened."""
    begin, end = ("\x1b[32m", "\x1b[0m") if sys.stdout.isatty() else ("⟦", "⟧")
    return "".join(f"{begin}{_shortened(text)}{end}" if trained else _shortened(text) for text, trained in sample)


def _shortened(text: str) -> str:
    """The text as a terminal may show it: without control characters, and of a long one the two ends."""
    text = _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)
    if len(text) <= _LONGEST_PIECE:
        return text
    half = _LONGEST_PIECE // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"
