"""`ministral quantize`: a dense checkpoint with its projections in eight or four bits, and what that did to it."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import MinistralError, RequestError
from .arguments import Commands, new_command, positive
from .convert import byte_count
from .failures import UsageError
from .output import note_to_people, progress_bar, waiting, write, write_json
from .texts import read_text

if TYPE_CHECKING:
    from pathlib import Path

    from ..checkpoints.conversion.quantize import QuantizationReport
    from ..config_files import Layout
    from ..quantization import LinearFormat
    from ..tokenizer import Tokenizer
    from ..transformer import Transformer

_DESCRIPTION = """\
Writes the dense model SRC, a folder or a Hugging Face id, into the new folder DST with its
projections quantised; embeddings, norms, routers, output head and vision tower stay as they are.

int8       8 bits and a scale for each row; activations in int8, scaled token by token
fp8        8-bit floats; activations too, with static scales if --calibrate is given
fp8-block  8-bit floats and a scale for each 128 x 128; activations too
nvfp4      4-bit floats in groups of 16; activations too if --calibrate is given
nf4        4-bit quantiles in blocks of 64 (QLoRA's), of this program alone

All but the last are compressed-tensors files, which vLLM and transformers load; fp8 in the
mistral layout is written as Mistral publishes it. Matrices are gone through one at a time,
and a run that was cut off is taken up where its last file ended."""

_EXAMPLE = """\
examples:
  ministral quantize ./Ministral-8B ./Ministral-8B-int8 --format int8 --to hf
  ministral quantize ./Ministral-8B ./Ministral-8B-fp8 --format fp8 --calibrate sample.jsonl

Each line of the --calibrate file is {"text": "..."} or {"ids": [1, 5, 9]}. The same lines
give the perplexity before and after, for which SRC and DST are loaded whole."""

FORMATS = ("int8", "fp8", "fp8-block", "nvfp4", "nf4")


def add_command(commands: Commands) -> None:
    parser = new_command(commands, "quantize", "write a checkpoint in fewer bits", _DESCRIPTION, _EXAMPLE)
    parser.add_argument("source", metavar="SRC", help="a folder with a dense model, or a Hugging Face id")
    parser.add_argument("target", metavar="DST", help="a folder that does not exist")
    parser.add_argument("--format", choices=FORMATS, required=True, help="of the projections")
    parser.add_argument("--to", choices=("mistral", "hf"), help="the layout to write (default: that of SRC)")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hugging Face id (default: main)")
    parser.add_argument("--calibrate", metavar="FILE", help="JSON lines to scale activations by, and to score")
    parser.add_argument(
        "--max-length", type=positive, default=2048, metavar="N", help="tokens used of each line (default: 2048)"
    )
    parser.add_argument(
        "--double-quantization", action="store_true", help="nf4 only: keep the constants of blocks in int8"
    )
    parser.add_argument("--max-shard-size", type=byte_count, metavar="SIZE", help="most bytes of tensors in a file")
    parser.add_argument("--force", action="store_true", help="replace DST")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Quantises and prints the errors of layers, and perplexities where there is data; returns the exit code."""
    from ..checkpoints.conversion.quantize import quantize
    from ..checkpoints.conversion.staging import require_free
    from ..checkpoints.hub import resolve
    from ..compilation import keep_compiled_programs

    if arguments.double_quantization and arguments.format != "nf4":
        raise UsageError(f"--double-quantization: expected with --format nf4, not {arguments.format}")
    folder = resolve(arguments.source, arguments.revision)
    layout = _layout(arguments.to, folder)
    keep_compiled_programs()
    sequences, maxima, before = None, None, None
    if arguments.calibrate is not None:
        _refuse_taken(arguments.target, folder, require_free, arguments.force)
        sequences = _sequences(arguments.calibrate, folder, arguments.max_length)
        maxima, before = _calibrated(folder, sequences)
    with progress_bar("quantising") as progress:
        report = quantize(
            folder,
            arguments.target,
            stored=_stored(
                arguments.format, layout, calibrated=maxima is not None, double=arguments.double_quantization
            ),
            to=layout,
            input_maxima=maxima,
            max_shard_bytes=arguments.max_shard_size,
            force=arguments.force,
            progress=progress,
        )
    after = None if sequences is None else _perplexity(report.target, sequences)
    perplexity = None if before is None else {"before": before, "after": after}
    (_print_json if arguments.json else _show)(report, perplexity)
    return 0


def _layout(asked: Layout | None, folder: Path) -> Layout:
    from ..config_files import detect_layout

    return asked or detect_layout(folder)


def _refuse_taken(target: str, folder: Path, require_free: Any, force: bool) -> None:
    """Before a model is loaded for it; a run that was cut off may have left more than is seen here."""
    from pathlib import Path

    destination = Path(target).expanduser().absolute()
    if not destination.with_name(f"{destination.name}.partial").exists():
        require_free(destination, folder, force=force)


def _stored(name: str, layout: Layout, *, calibrated: bool, double: bool) -> LinearFormat:
    """What the runtimes of a layout take: dynamic FP8 has a scale per row, but only one in Mistral's own spelling."""
    from ..quantization import LinearFormat

    if name == "int8":
        return LinearFormat("int8_channel", "dynamic")
    if name == "fp8-block":
        return LinearFormat("fp8_block", "dynamic")
    if name == "nvfp4":
        return LinearFormat("nvfp4", "dynamic" if calibrated else "none")
    if name == "nf4":
        return LinearFormat("nf4", double=double)
    if calibrated:
        return LinearFormat("fp8_tensor", "static")
    return LinearFormat("fp8_channel" if layout == "hf" else "fp8_tensor", "dynamic")


def _sequences(name: str, folder: Path, max_length: int) -> list[list[int]]:
    """Token ids of each line of a file of JSON lines."""
    lines = [line for line in read_text(name).splitlines() if line.strip()]
    words: Tokenizer | None = None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            document = json.loads(line)
        except ValueError as problem:
            raise MinistralError(f"{name}: line {number} is not JSON ({problem})") from None
        text, ids = (document.get("text"), document.get("ids")) if isinstance(document, dict) else (None, None)
        if isinstance(text, str):
            if words is None:
                from ..tokenizer import Tokenizer

                words = Tokenizer.load(folder)
            found.append(words.encode(text, bos=True)[:max_length])
        elif isinstance(ids, list) and ids and all(type(i) is int for i in ids):
            found.append(ids[:max_length])
        else:
            raise MinistralError(f'{name}: line {number}: expected {{"text": "..."}} or {{"ids": [1, 5, 9]}}')
    if not found:
        raise RequestError(f"{name}: holds no lines; expected some text to calibrate with")
    return found


def _calibrated(folder: Path, sequences: Sequence[Sequence[int]]) -> tuple[dict[str, float], float]:
    """Largest inputs of the dense model's projections, and its perplexity."""
    from ..calibration import input_maxima
    from ..checkpoints.load import load_model

    with waiting(f"loading {folder}"):
        model = load_model(folder)
    with waiting(f"calibrating with {sum(map(len, sequences))} tokens"):
        return input_maxima(model, sequences), _perplexity_of(model, sequences)


def _perplexity(folder: Path, sequences: Sequence[Sequence[int]]) -> float:
    from ..checkpoints.load import load_model

    with waiting("scoring what was written"):
        return _perplexity_of(load_model(folder), sequences)


def _perplexity_of(model: Transformer, sequences: Sequence[Sequence[int]]) -> float:
    from infer.scoring import score

    logprobs = [value for ids in sequences for value in score(model, ids).logprobs if value is not None]
    return math.exp(-sum(logprobs) / len(logprobs)) if logprobs else 1.0


def _print_json(report: QuantizationReport, perplexity: dict[str, float | None] | None) -> None:
    write_json(
        {
            "target": str(report.target),
            "to": report.to,
            "bytes_before": report.n_bytes_before,
            "bytes": report.n_bytes,
            "files": dict(report.files),
            "resumed": list(report.resumed),
            "errors": dict(report.errors),
            "perplexity": perplexity,
        }
    )


def _show(report: QuantizationReport, perplexity: dict[str, float | None] | None) -> None:
    if report.resumed:
        note_to_people(f"taken over from a run that was cut off: {', '.join(report.resumed)}")
    write(
        f"wrote {report.target}: {report.n_bytes:,} bytes in the {report.to} layout, {report.n_bytes_before:,} before\n"
        "relative error of the weights, by layer and projection; of experts, the largest\n"
    )
    layers: dict[str, dict[str, float]] = {}
    for module, error in report.errors.items():
        _, layer, rest = module.split(".", 2)
        of_layer, part = layers.setdefault(layer, {}), _part(rest)
        of_layer[part] = max(error, of_layer.get(part, 0.0))
    for layer, errors in layers.items():
        write(f"  {layer:>4}  " + "  ".join(f"{part} {error:.4f}" for part, error in errors.items()) + "\n")
    if perplexity is not None:
        write(f"perplexity {perplexity['before']:.4f} before, {perplexity['after']:.4f} after\n")


def _part(module: str) -> str:
    """What a projection of a layer is called in a report, all experts alike."""
    *_, kind, number, part = ("", "", *module.split("."))
    kind = kind if number.isdigit() else number
    return f"{kind}.{part}" if kind.endswith("experts") else part
