"""Text files that users name on the command line."""

from __future__ import annotations

import sys
from pathlib import Path

from ..errors import MinistralError


def read_text(name: str) -> str:
    """The UTF-8 text of a file, or of stdin for `-`. Raises MinistralError, naming the byte, if it is anything else."""
    data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise MinistralError(f"{name}: byte {error.start} is not UTF-8: expected a text file") from None
