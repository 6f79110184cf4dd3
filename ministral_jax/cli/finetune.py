"""`ministral finetune`: a training run as its YAML file says."""

from __future__ import annotations

import argparse
import dataclasses
import signal
from typing import Any

from .arguments import Commands, new_command
from .failures import INTERRUPTED
from .hosts import add_hosts
from .output import note, write

_DESCRIPTION = """\
Trains adapters (LoRA, also beside int8, fp8 or nf4 weights) or every weight, as CONFIG.yaml
says: ours, or one of mistral-finetune, which is run by its rules. docs/finetuning.md lists
the keys.

The folder run_dir gets the configuration as it was resolved, metrics as JSONL, checkpoints,
and in the end the adapter or the model under final/. SIGTERM and Ctrl-C save after the step
in progress; --resume goes on, bit for bit, and begins the run where there is none yet.

Exit codes: 0 done, or saved after SIGTERM; 1 failed; 130 saved after Ctrl-C."""

_EXAMPLE = """\
examples:
  ministral finetune examples/3b_qlora_24gb.yaml --set data.instruct_data=chats.jsonl
  ministral finetune run.yaml --resume --mesh fsdp=8"""


def add_command(commands: Commands) -> None:
    parser = new_command(commands, "finetune", "train an adapter, or the whole model", _DESCRIPTION, _EXAMPLE)
    parser.set_defaults(run=run)
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, ours or mistral-finetune's")
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="A.B=C",
        help="a key of the file and its value, as YAML, in place of the file's; may be given several times",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in run_dir, or begin it")
    parser.add_argument(
        "--mesh", metavar="SIZES", help="spread it over devices: fsdp=4,tensor=2, or auto (default: the file's)"
    )
    add_hosts(parser)


def run(arguments: argparse.Namespace) -> int:
    """Trains; returns the exit code."""
    from train.config import read_run_config
    from train.metrics import progress_line
    from train.run import run as train

    from ..compilation import keep_compiled_programs

    config, notes = read_run_config(arguments.config, arguments.settings)
    if arguments.mesh is not None:
        config = dataclasses.replace(config, mesh=arguments.mesh)
    for line in notes:
        note(line)
    _require_same_config(config)
    keep_compiled_programs()
    steps = config.max_steps
    result = train(config, resume=arguments.resume, report=lambda row: note(progress_line(row, steps)))
    if result.stopped_by is not None:
        note(f"saved after step {result.step} of {steps}; --resume goes on from there")
        return INTERRUPTED if result.stopped_by == signal.SIGINT else 0
    write(f"{result.result}\n")
    return 0


def _require_same_config(config: Any) -> None:
    from ..sharding.agreement import digest, require_agreement

    require_agreement("configuration", {"CONFIG": digest(repr(config.document()).encode())})
