"""Compiled programs kept on disk, so that only a machine's first run of a model waits for the compiler."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """Where programs are kept: `MINISTRAL_CACHE`, else `XDG_CACHE_HOME`/ministral-jax, else ~/.cache/ministral-jax."""
    named = os.environ.get("MINISTRAL_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ministral-jax"


def keep_compiled_programs() -> None:
    """Turns jax's persistent compilation cache on, unless one is set up. An empty MINISTRAL_CACHE keeps it off."""
    import jax

    configured = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if os.environ.get("MINISTRAL_CACHE") == "" or configured is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
