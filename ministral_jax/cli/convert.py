"""`ministral convert`: a checkpoint or adapter from one layout to another, in bounded memory."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from .arguments import Commands, new_command
from .output import note, note_to_people, progress_bar, write, write_json

if TYPE_CHECKING:
    from ..checkpoints.conversion.convert import Report

_DESCRIPTION = """\
Writes the model or adapter SRC, a folder or a Hugging Face id, in another layout into the
new folder DST: mistral (params.json, consolidated*.safetensors), hf (config.json,
model*.safetensors; for adapters PEFT's) or orbax (a config beside the folder orbax).

Tensors are streamed, and every dtype is kept; tokenizer files come along, and configs are
translated. DST gets its name only when it is whole. After a kill or a full disk, the same
command goes on from the files that were finished, which lie in DST.partial."""

_EXAMPLE = """\
examples:
  ministral convert ./Ministral-8B ./Ministral-8B-hf --to hf --verify
  ministral convert ./run/lora ./peft-adapter --to hf"""


def add_command(commands: Commands) -> None:
    parser = new_command(commands, "convert", "write a checkpoint in another layout", _DESCRIPTION, _EXAMPLE)
    parser.add_argument("source", metavar="SRC", help="a folder with a model or an adapter, or a Hugging Face id")
    parser.add_argument("target", metavar="DST", help="a folder that does not exist")
    parser.add_argument("--to", choices=("mistral", "hf", "orbax"), required=True, help="the layout to write")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hugging Face id (default: main)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the dense weights; quantised ones and scales are never changed (default: as they are)",
    )
    parser.add_argument(
        "--max-shard-size",
        type=byte_count,
        metavar="SIZE",
        help="most bytes of tensors in a file, such as 2GB or 500MiB (default: 5GB for hf, one file for mistral)",
    )
    parser.add_argument("--base", metavar="MODEL", help="the model of a PEFT adapter: a folder or a published name")
    parser.add_argument("--force", action="store_true", help="replace DST, and begin anew where a run was killed")
    parser.add_argument("--verify", action="store_true", help="read everything again and compare it with SRC")
    parser.add_argument("--dry-run", action="store_true", help="show files and sizes; write nothing")
    parser.add_argument("--json", action="store_true", help="print the files and their sizes as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from ..checkpoints.conversion.convert import convert

    with progress_bar("converting") as progress:
        report = convert(
            arguments.source,
            arguments.target,
            to=arguments.to,
            dtype=arguments.dtype,
            max_shard_bytes=arguments.max_shard_size,
            base=arguments.base,
            revision=arguments.revision,
            force=arguments.force,
            verify=arguments.verify,
            dry_run=arguments.dry_run,
            progress=progress,
        )
    for kind, count in report.dropped.items():
        note(f"left behind: {count} tensors of the kind {kind}")
    if report.resumed:
        note_to_people(f"taken over from a run that was cut off: {', '.join(report.resumed)}")
    if arguments.json:
        write_json(_document(report, dry_run=arguments.dry_run, verified=arguments.verify and not arguments.dry_run))
    else:
        _show(report, dry_run=arguments.dry_run)
    return 0


def _document(report: Report, *, dry_run: bool, verified: bool) -> dict[str, Any]:
    return {
        "target": str(report.target),
        "from": report.source,
        "to": report.to,
        "dry_run": dry_run,
        "verified": verified,
        "tensors": report.tensors,
        "bytes": report.n_bytes,
        "files": dict(report.files),
        "dropped": dict(report.dropped),
        "resumed": list(report.resumed),
    }


def _show(report: Report, *, dry_run: bool) -> None:
    verb = "would write" if dry_run else "wrote"
    write(
        f"{verb} {report.target}: {report.tensors} tensors, {report.n_bytes:,} bytes, "
        f"from the {report.source} to the {report.to} layout\n"
    )
    for name, n_bytes in report.files.items():
        write(f"  {n_bytes:>16,}  {name}\n")


def byte_count(text: str) -> int:
    """A number of bytes: 500000, 2GB, 500MiB."""
    found = re.fullmatch(r"([0-9]{1,18})(?:\.([0-9]{1,9}))?\s*(|[KMGT]i?)B?", text.strip(), re.IGNORECASE | re.ASCII)
    if found:
        unit = found[3].upper()
        factor = (1024 if unit.endswith("I") else 1000) ** " KMGT".index(unit[0] if unit else " ")
        count = int(found[1]) * factor + int(found[2] or 0) * factor // 10 ** len(found[2] or "")
        if count > 0:
            return count
    raise argparse.ArgumentTypeError(f"{text[:60]!r}: expected bytes such as 2GB or 500MiB")
