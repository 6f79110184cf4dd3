"""`ministral inspect`: what a model is and what it needs. Reads configs and headers of weight files, never weights."""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, ConfigError, RequestError
from .arguments import Commands, add_cache, add_mesh, add_model, new_command, positive
from .mesh_plan import MeshPlan, detected_memory, show_mesh_plan
from .models import windows_of
from .output import size, write, write_json

if TYPE_CHECKING:
    from ..config import ModelConfig, VisionConfig
    from ..memory import MemoryPlan

_DESCRIPTION = """\
Shows a model's architecture, parameters, weight files and memory: weights, and key/value
cache by group of layers, for a context and a batch.

MODEL may be a folder with nothing but a config, or the name of a published model, such as
ministral-8b-instruct-2410, which needs neither files nor network; of a Hugging Face id only
the config is downloaded. Weight files that are there are compared with the config by their
headers; no weights are read."""

_EXAMPLE = """\
example:
  ministral inspect ministral-8b-instruct-2410 --context 131072 --batch 4
  ministral inspect ./Ministral-8B --json
  ministral inspect ministral-8b-instruct-2410 --mesh fsdp=4,tensor=2 --device-memory v5e"""


@dataclass(frozen=True)
class Subject:
    """What is inspected: its config, where that is from, and the folder with its files if there is one."""

    name: str
    source: str
    config: ModelConfig
    folder: Path | None


@dataclass(frozen=True)
class FilesReport:
    """Weight files as their headers have them: tensors and bytes by dtype.

    `mismatch` is how the config does not fit them, None if it fits.
    """

    names: tuple[str, ...]
    tensors: int
    bytes_by_dtype: dict[str, int]
    mismatch: str | None = None


def add_command(commands: Commands) -> None:
    parser = new_command(commands, "inspect", "what a model is and what it needs", _DESCRIPTION, _EXAMPLE)
    parser.set_defaults(run=run)
    add_model(parser, weights=False)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument(
        "--context", type=positive, metavar="N", help="tokens of a sequence (default: what the model was published for)"
    )
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="sequences at once (default: 1)")
    add_cache(parser)
    add_mesh(parser)
    parser.add_argument(
        "--device-memory",
        metavar="SIZE",
        help="of one device: 16GB, or a name such as v5e, v6e, h100, h200 (default: that of the devices here)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Inspects and prints. Raises CheckpointError, after that, if the weight files do not fit the config."""
    from ..memory import plan_memory
    from ..sharding.plan import platform_of

    subject = _find(arguments)
    if arguments.context is not None and arguments.context > subject.config.max_length:
        raise RequestError(f"--context {arguments.context}: expected at most {subject.config.max_length}, the model's")
    files = None if subject.folder is None else _report_files(subject.folder, subject.config)
    dtype = _choose_dtype(arguments.dtype, files)
    cache_dtype = arguments.cache_dtype or dtype
    plan = plan_memory(
        subject.config,
        length=arguments.context,
        batch=arguments.batch,
        cache_dtype=cache_dtype,
        platform=platform_of(arguments.device_memory),
    )
    mesh = _plan_mesh(arguments, subject.config, dtype, cache_dtype)
    if arguments.json:
        write_json(_document(subject, files, dtype, plan, mesh))
    else:
        _show(subject, files, dtype, plan)
        if mesh is not None:
            show_mesh_plan(mesh)
    if files is not None and files.mismatch:
        raise CheckpointError(files.mismatch)
    return 0


def _find(arguments: argparse.Namespace) -> Subject:
    """The model that the arguments name: a folder, else a published model, else a hub id."""
    from ..catalog import find, with_windows
    from ..checkpoints.hub import resolve
    from ..config_files import read_config

    windows = windows_of(arguments)
    folder = Path(arguments.model).expanduser()
    if folder.is_dir() or "/" in arguments.model or arguments.revision is not None:
        folder = resolve(arguments.model, arguments.revision, weights=False)
        return Subject(arguments.model, str(folder), read_config(folder, windows=windows), folder)
    try:
        entry = find(arguments.model)
    except ConfigError as error:
        raise ConfigError(f"{error}; nor is there a folder called so") from None
    note = f" ({entry.note})" if entry.note else ""
    config = entry.config if windows is None else with_windows(entry.config, windows)
    return Subject(entry.name, f"the catalog, for {entry.repo_id}{note}", config, None)


def _report_files(folder: Path, config: ModelConfig) -> FilesReport | None:
    """What the headers of the folder's weight files say; None where it has none. Damaged ones are an error."""
    from ..checkpoints.load import match_tensors, with_decided_vision
    from ..checkpoints.safetensors_header import DTYPE_NAMES
    from ..checkpoints.weight_files import WeightFiles, is_weight_file
    from ..config_files import detect_layout

    layout = detect_layout(folder)
    if not any(is_weight_file(entry.name, layout) for entry in folder.iterdir()):
        return None
    with WeightFiles(folder, layout) as files:
        sizes: Counter[str] = Counter()
        for tensor in files.tensors.values():
            sizes[DTYPE_NAMES[tensor.dtype]] += tensor.n_bytes
        names = sorted({files.path_of(name).name for name in files.tensors})
        report = FilesReport(tuple(names), len(files.tensors), dict(sizes))
        try:
            match_tensors(files, with_decided_vision(config, files))
        except CheckpointError as error:
            return dataclasses.replace(report, mismatch=str(error))
        return report


def _choose_dtype(asked: str, files: FilesReport | None) -> str:
    """The dtype to plan with: for auto, that of most bytes of the files if one can compute in it, else bfloat16."""
    if asked != "auto":
        return asked
    stored = max(files.bytes_by_dtype, key=files.bytes_by_dtype.__getitem__) if files else "BF16"
    return {"F32": "float32", "F16": "float16"}.get(stored, "bfloat16")


def _plan_mesh(arguments: argparse.Namespace, config: ModelConfig, dtype: str, cache_dtype: str) -> MeshPlan | None:
    if arguments.mesh is None:
        return None
    from ..sharding.meshes import parse_mesh
    from ..sharding.plan import abstract_layout, parse_memory, plan_sharding, platform_of

    memory = None if arguments.device_memory is None else parse_memory(arguments.device_memory)
    if arguments.mesh == "auto":
        import jax

        from ..sharding.meshes import default_sizes

        sizes = default_sizes(config, len(jax.devices()))
    else:
        sizes = parse_mesh(arguments.mesh)
    layout = abstract_layout(config, sizes, arguments.rules)
    plan = plan_sharding(
        config, layout, dtype=dtype, cache_dtype=cache_dtype, batch=arguments.batch, length=arguments.context,
        platform=platform_of(arguments.device_memory),
    )  # fmt: skip
    return MeshPlan(plan, memory if memory is not None else detected_memory())


def _document(
    subject: Subject, files: FilesReport | None, dtype: str, plan: MemoryPlan, mesh: MeshPlan | None
) -> dict[str, Any]:
    return {
        "mesh": None if mesh is None else mesh.to_json(),
        "model": subject.name,
        "source": subject.source,
        "config": dataclasses.asdict(subject.config),
        "files": None if files is None else dataclasses.asdict(files),
        "dtype": dtype,
        "memory": plan.to_json(),
    }


def _show(subject: Subject, files: FilesReport | None, dtype: str, plan: MemoryPlan) -> None:
    sections = [
        ("model", [("name", subject.name), ("from", subject.source)]),
        ("architecture", _architecture(subject.config)),
        ("parameters", _parameters(plan)),
        ("files", [] if files is None else _files(files)),
        ("weights, in bytes", [(name, size(n_bytes)) for name, n_bytes in plan.weight_bytes.items()]),
        (f"memory in {dtype}, for {plan.batch} x {plan.length:,} tokens", _memory(subject.config, dtype, plan)),
    ]
    for title, rows in sections:
        if rows:
            write(title + "\n" + "".join(f"  {name:<14}{value}\n" for name, value in rows))


def _architecture(config: ModelConfig) -> list[tuple[str, str]]:
    groups = ", ".join(_group(window, len(layers)) for window, layers in config.window_groups)
    rows = [
        ("layers", f"{groups}, of width {config.dim}"),
        ("attention", f"{config.n_heads} query heads, {config.n_kv_heads} key heads of {config.head_dim}"),
        ("rope", f"theta {config.rope.theta:g}" + _yarn(config)),
        ("feed-forward", f"{config.hidden_dim}"),
        ("vocabulary", f"{config.vocab_size:,}, output head {'tied' if config.tied_embeddings else 'of its own'}"),
        ("context", f"{config.max_length:,}"),
    ]
    return rows + _special_parts(config)


def _special_parts(config: ModelConfig) -> list[tuple[str, str]]:
    """What not every model has."""
    latent, moe, vision, stored = config.latent, config.moe, config.vision, config.quantization
    rows = []
    if latent:
        rows.append(("latent", f"rank {latent.q_rank} of queries, {latent.kv_rank} of keys and values"))
    if moe:
        used = f"{moe.experts_per_token} for a token and {moe.n_shared_experts} for all"
        rows.append(("experts", f"{moe.n_experts} of {moe.expert_hidden_dim}: {used}"))
    if vision:
        rows.append(("vision", _vision(vision)))
    if stored:
        rows.append(("quantised", f"{stored.format}, activations {stored.activations}"))
    return rows


def _vision(vision: VisionConfig) -> str:
    side = -(-vision.image_size // (vision.patch_size * vision.spatial_merge_size))
    return (
        f"{vision.n_layers} layers of width {vision.dim}, patches of {vision.patch_size}; up to {side} x {side} tokens "
        "an image"
    )


def _group(window: int | None, n_layers: int) -> str:
    layers = "1 layer" if n_layers == 1 else f"{n_layers} layers"
    return f"{layers} with full attention" if window is None else f"{layers} with a window of {window:,}"


def _yarn(config: ModelConfig) -> str:
    yarn, temperature = config.rope.yarn, config.temperature
    stretched = f", YaRN x {yarn.factor:g} from {yarn.original_length:,}" if yarn else ""
    return stretched + (f", attention temperature {temperature.beta:g}" if temperature else "")


def _parameters(plan: MemoryPlan) -> list[tuple[str, str]]:
    count = plan.parameters
    names = ("embeddings", "attention", "feed_forward", "experts", "norms", "output", "vision", "projector")
    rows = [(name.replace("_", "-"), f"{getattr(count, name):,}") for name in names if getattr(count, name)]
    total = f"{count.total:,}" + ("" if count.total == count.text else f", of which text {count.text:,}")
    return [*rows, ("in all", total if count.active == count.text else f"{total}; a token passes {count.active:,}")]


def _files(files: FilesReport) -> list[tuple[str, str]]:
    first = files.names[0] if len(files.names) == 1 else f"{len(files.names)} files, {files.names[0]} the first"
    stored = ", ".join(f"{name} {size(n_bytes)}" for name, n_bytes in files.bytes_by_dtype.items())
    verdict = f"do not fit the config: {files.mismatch}" if files.mismatch else "fit the config"
    return [("in", first), ("tensors", f"{files.tensors}: {stored}"), ("they", verdict)]


def _memory(config: ModelConfig, dtype: str, plan: MemoryPlan) -> list[tuple[str, str]]:
    stored = config.quantization.format if config.quantization else None
    weights = plan.weight_bytes[stored or ("float32" if dtype == "float32" else "bfloat16")]
    rows = [("weights", size(weights) + (f", projections in {stored}" if stored else ""))]
    for group in plan.groups:
        pages = f"{group.pages:,} pages of {plan.page_size} tokens"
        rows.append(("cache", f"{size(group.n_bytes)}; {_group(group.window, len(group.layers))}: {pages}"))
    saved = f"{size(plan.cache_bytes)}; {size(plan.full_cache_bytes)} if every layer were full"
    if plan.cache_bytes != plan.full_cache_bytes:
        rows.append(("cache in all", saved))
    return [*rows, ("together", f"{size(weights + plan.cache_bytes)}, activations not counted")]
