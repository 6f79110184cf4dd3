"""`ministral merge`: an adapter into its base model, as a checkpoint of its own, in bounded memory."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .arguments import Commands, new_command
from .convert import byte_count
from .output import note, note_to_people, progress_bar, write, write_json

if TYPE_CHECKING:
    from ..checkpoints.conversion.convert import Report
    from ..checkpoints.conversion.merged import Merging

_DESCRIPTION = """\
Writes the model BASE, a folder or a Hugging Face id, with the LoRA adapter in the folder
ADAPTER merged in, into the new folder DST. The adapter may have either layout: lora.safetensors
as mistral-finetune writes it, or PEFT's adapter_config.json and adapter_model.safetensors.

W + scaling B A is computed in float32 and rounded once to BASE's dtype, tensor by tensor. A
quantised BASE is made dense first. Tokenizer files come along. DST gets its name only when it
is whole; after a kill or a full disk, the same command goes on from the files that were
finished, which lie in DST.partial."""

_EXAMPLE = """\
examples:
  ministral merge ./Ministral-8B ./run/lora ./Ministral-8B-tuned
  ministral merge ./Ministral-8B ./run/lora ./Ministral-8B-tuned-hf --to hf --verify"""


def add_command(commands: Commands) -> None:
    parser = new_command(commands, "merge", "write a model with an adapter merged in", _DESCRIPTION, _EXAMPLE)
    parser.add_argument("base", metavar="BASE", help="the model: a folder as published, or a Hugging Face id")
    parser.add_argument("adapter", metavar="ADAPTER", help="a folder with an adapter, of either layout")
    parser.add_argument("target", metavar="DST", help="a folder that does not exist")
    parser.add_argument("--to", choices=("mistral", "hf"), help="the layout to write (default: that of BASE)")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hugging Face id (default: main)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: that of BASE; where BASE is quantised, that of most of its dense weights)",
    )
    parser.add_argument(
        "--max-shard-size",
        type=byte_count,
        metavar="SIZE",
        help="most bytes of tensors in a file, such as 2GB or 500MiB (default: 5GB for hf, one file for mistral)",
    )
    parser.add_argument("--force", action="store_true", help="replace DST, and begin anew where a run was killed")
    parser.add_argument("--verify", action="store_true", help="read everything again and compare it")
    parser.add_argument("--dry-run", action="store_true", help="show files and sizes; write nothing")
    parser.add_argument("--json", action="store_true", help="print what was merged, the files and sizes as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from ..checkpoints.conversion.merge import merge

    with progress_bar("merging") as progress:
        report, merging = merge(
            arguments.base,
            arguments.adapter,
            arguments.target,
            to=arguments.to,
            dtype=arguments.dtype,
            max_shard_bytes=arguments.max_shard_size,
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
        write_json(_document(report, merging, dry_run=arguments.dry_run))
    else:
        _show(report, merging, dry_run=arguments.dry_run)
    return 0


def _document(report: Report, merging: Merging, *, dry_run: bool) -> dict[str, Any]:
    return {
        "target": str(report.target),
        "from": report.source,
        "to": report.to,
        "dry_run": dry_run,
        "rank": merging.settings.rank,
        "scaling": merging.settings.scaling,
        "modules": merging.modules,
        "dequantized": merging.stored,
        "tensors": report.tensors,
        "bytes": report.n_bytes,
        "files": dict(report.files),
        "resumed": list(report.resumed),
    }


def _show(report: Report, merging: Merging, *, dry_run: bool) -> None:
    verb = "would write" if dry_run else "wrote"
    settings = merging.settings
    write(
        f"{verb} {report.target}: {report.tensors} tensors, {report.n_bytes:,} bytes, in the {report.to} layout, with "
        f"an adapter of rank {settings.rank}, scaling {settings.scaling:g}, in {merging.modules} projections\n"
    )
    for name, n_bytes in report.files.items():
        write(f"  {n_bytes:>16,}  {name}\n")
