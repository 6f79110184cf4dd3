"""From a folder, a hub id or a published model's name to a folder on disk, downloading what is needed and no more."""

from __future__ import annotations

import fnmatch
import glob
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from .. import catalog
from ..config_files import CONFIG_FILE_NAMES, layout_of
from ..errors import CheckpointError, ConfigError
from .weight_files import STEMS, is_weight_file

logger = logging.getLogger("ministral_jax")

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

# Everything small that a model may come with, in either layout.
SIDE_FILES = (
    *CONFIG_FILE_NAMES.values(),
    "generation_config.json",
    "tekken.json",
    "tokenizer.model*",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.*",
    "SYSTEM_PROMPT.txt",
)


def resolve(model: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder `model` names: itself, or a download of the hub id or published name that it is.

    An existing folder comes first. A download is resumed where one was cut off and shared with other programs through
    the hub's cache; of weights in both layouts only one is fetched, and none without `weights`. `revision` is a branch,
    tag or commit. Raises CheckpointError or ConfigError in one line that says what to do.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(
                f"{folder}: is a folder, which has no revision {revision!r}; expected a hub id or no revision"
            )
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder}: is a file; expected the folder it is in, or a hub id such as org/name")
    return _download(_repo_id(str(model)), revision, weights)


def _repo_id(model: str) -> str:
    if REPO_ID.fullmatch(model):
        return model
    if "/" in model or model.startswith((".", "~")):
        raise CheckpointError(f"{model}: no such folder; expected a checkpoint folder, or a hub id such as org/name")
    try:
        return catalog.find(model).repo_id
    except ConfigError as problem:
        raise ConfigError(f"{problem}; nor is there a folder called so") from None


def needed_files(names: Sequence[str], *, weights: bool) -> list[str]:
    """Of the files at the top of a repository, those to fetch: configs, tokenizer, and the weights of one layout."""
    needed = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in SIDE_FILES)]
    layout = layout_of(names)
    if not weights:
        return needed
    if layout is None:
        raise CheckpointError("holds neither params.json nor config.json; expected a model as published")
    chosen = [name for name in names if is_weight_file(name, layout)]
    if f"{STEMS[layout]}.safetensors" in chosen:
        chosen = [f"{STEMS[layout]}.safetensors"]
    if not any(name.endswith(".safetensors") for name in chosen):
        raise CheckpointError(
            f"holds no {STEMS[layout]}*.safetensors; expected weights in safetensors, never pickle files"
        )
    return needed + chosen


def _download(repo: str, revision: str | None, weights: bool) -> Path:
    # Imported here: it takes longer than all that reading a local folder needs.
    import huggingface_hub
    from huggingface_hub import errors

    try:
        names = _listed(repo, revision)
        if names is None:
            return Path(
                huggingface_hub.snapshot_download(
                    repo, revision=revision, local_files_only=True, allow_patterns=list(CONFIG_FILE_NAMES.values())
                )
            )
        patterns = [glob.escape(name) for name in needed_files(names, weights=weights)]
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except CheckpointError as problem:
        raise CheckpointError(f"{repo}: {problem}") from None
    except (OSError, _transport_error(), errors.HFValidationError) as problem:
        raise CheckpointError(f"{repo}: {_explained(problem, repo, revision)}") from None


def _listed(repo: str, revision: str | None) -> list[str] | None:
    """Names of the files in a repository, or None where the hub cannot be reached and the cache has to do."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return huggingface_hub.HfApi().list_repo_files(repo, revision=revision)
    except errors.HfHubHTTPError:  # it was reached, and refused
        raise
    except (ConnectionError, _transport_error()) as problem:
        logger.warning("%s: the hub was not asked (%s); looking in the cache", repo, type(problem).__name__)
        return None


def _transport_error() -> type[Exception]:
    """The base of all that the HTTP library under huggingface_hub raises; which library depends on its version."""
    from huggingface_hub import errors

    return errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]


def _explained(problem: Exception, repo: str, revision: str | None) -> str:
    """One line for what huggingface_hub raises: what happened and what to do about it."""
    from huggingface_hub import constants, errors

    if isinstance(problem, errors.GatedRepoError):
        return (
            f"access is granted by its authors: accept the terms at {constants.ENDPOINT}/{repo}, then set HF_TOKEN or "
            "run `hf auth login`"
        )
    if isinstance(problem, errors.RepositoryNotFoundError):
        return (
            "neither a folder here nor a model that the hub shows us; check the spelling, or set HF_TOKEN if it is "
            "private" + _never_published(repo)
        )
    if isinstance(problem, errors.RevisionNotFoundError):
        return f"has no revision {revision!r}; expected a branch, tag or commit of it"
    if isinstance(problem, errors.LocalEntryNotFoundError):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        return f"{why} and the model is not in the cache; download it while online, or give a local folder"
    if isinstance(problem, errors.HFValidationError):
        return "not a hub id; expected org/name or a local folder"
    if isinstance(problem, errors.HfHubHTTPError):
        status = problem.response.status_code
        return f"the hub answered with status {status}; try again later, or give a local folder"
    if isinstance(problem, (_transport_error(), ConnectionError)):
        return f"the download broke off ({type(problem).__name__}); run the same again to resume it"
    return f"cannot be downloaded ({getattr(problem, 'strerror', None) or type(problem).__name__})"


def _never_published(repo: str) -> str:
    try:
        catalog.find(repo)
    except ConfigError as problem:
        return f" ({problem})"
    return ""
