"""Pictures from files, data URLs and memory, checked before they are decoded. What becomes of them is mistral-common's.

Whoever sends a picture may mean harm: sizes are looked at before anything is decoded, only formats of pictures are
tried, and nothing is fetched from a network.
"""

from __future__ import annotations

import base64
import binascii
import io
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import numpy as np

from .errors import TokenizerError

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("ministral_jax")

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MOST_BYTES = 64 * 2**20
# 8192 x 8192: mistral-common resizes in float32, which takes 16 bytes for each of them.
MOST_PIXELS = 2**26

_PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX")
_SIXTEEN_BITS = "I;16"
_LONGEST_REASON = 120


def open_image(path: str | Path) -> Image:
    """The picture in a file, decoded.

    Raises:
        TokenizerError: one line naming the file and what is wrong with it.
    """
    path = Path(path).expanduser()
    try:
        size = path.stat().st_size
        data = b"" if size > MOST_BYTES else path.read_bytes()
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: {getattr(error, 'strerror', None) or error}; expected a picture") from None
    _require_size(size, str(path))
    return decode_image(data, str(path))


def decode_image(data: bytes, name: str) -> Image:
    """The picture in the bytes of a file, decoded; `name` is what errors call it. Raises TokenizerError."""
    from PIL import Image

    _require_size(len(data), name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _require_still(image, name)
            image.load()
        except TokenizerError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise TokenizerError(
                f"{name}: expected a picture of at most {MOST_PIXELS:,} pixels; this has more"
            ) from None
        except Exception as error:  # Pillow's readers raise nearly everything on damaged files
            raise TokenizerError(f"{name}: {_reason(error)}; expected PNG, JPEG, WebP, GIF, BMP or TIFF") from None
    return checked_image(image, name)


def checked_image(image: Image, name: str) -> Image:
    """The picture with eight bits a channel. Raises TokenizerError for one that is empty, huge, moving or odd."""
    _require_still(image, name)
    if image.mode in _PLAIN_MODES:
        return image
    if image.mode in ("CMYK", "YCbCr"):
        logger.warning("%s: %s, turned into RGB without its colour profile", name, image.mode)
        return image.convert("RGB")
    if image.mode.startswith(_SIXTEEN_BITS):
        logger.warning("%s: 16 bits a pixel, of which the upper 8 are kept", name)
        return _upper_bits(image)
    raise TokenizerError(f"{name}: pixels of mode {image.mode}; expected grey or colour of 8 or 16 bits")


def _upper_bits(image: Image) -> Image:
    from PIL import Image as pillow

    return pillow.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))


def image_of_part(part: Mapping[str, Any], where: str, *, local_files: bool) -> Image | None:
    """The picture of a content part, None for a part of another type.

    `{"type": "image_url", "image_url": URL or {"url": URL}}`, of which `data:` and, with `local_files`, `file://` are
    read; `{"type": "image", "image": ...}` with a Pillow image, the bytes of a file, or, with `local_files`, a Path.
    Raises TokenizerError naming the part.
    """
    if part.get("type") == "image":
        return _image_of_value(part.get("image"), where, local_files)
    if part.get("type") != "image_url":
        return None
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, Mapping) else url
    if not isinstance(url, str):
        raise TokenizerError(f"{where}.image_url: {type(url).__name__}, expected a URL or an object with url")
    return _image_of_url(url, f"{where}.image_url", local_files)


def _image_of_value(value: Any, where: str, local_files: bool) -> Image:
    from PIL import Image

    if isinstance(value, Image.Image):
        return checked_image(value, f"{where}.image")
    if isinstance(value, bytes):
        return decode_image(value, f"{where}.image")
    if isinstance(value, str):
        return decode_image(_from_base64(value.rpartition(",")[2], f"{where}.image"), f"{where}.image")
    if isinstance(value, Path) and local_files:
        return open_image(value)
    found = "a path, which is not opened here" if isinstance(value, Path) else type(value).__name__
    raise TokenizerError(f"{where}.image: {found}; expected a Pillow image, bytes or base64")


def _image_of_url(url: str, where: str, local_files: bool) -> Image:
    scheme, _, rest = url.partition(":")
    if scheme == "data":
        head, comma, payload = rest.partition(",")
        if not comma or not head.endswith(";base64"):
            raise TokenizerError(f"{where}: {url[:40]!r}, expected data:image/png;base64,... or the like")
        return decode_image(_from_base64(payload, where), where)
    if scheme == "file" and local_files:
        return open_image(unquote(urlsplit(url).path))
    raise TokenizerError(
        f"{where}: {url[:60]!r}, expected a data: URL" + (" or file://; nothing is downloaded" if local_files else "")
    )


def _from_base64(text: str, where: str) -> bytes:
    if len(text) > MOST_BYTES // 3 * 4 + 4:
        _require_size(len(text) // 4 * 3, where)
    try:
        return base64.b64decode(text)
    except (binascii.Error, ValueError):
        raise TokenizerError(f"{where}: not base64; expected the bytes of a picture, encoded so") from None


def _require_size(n_bytes: int, name: str) -> None:
    if not n_bytes:
        raise TokenizerError(f"{name}: empty; expected a picture")
    if n_bytes > MOST_BYTES:
        raise TokenizerError(f"{name}: {n_bytes:,} bytes; expected a picture of at most {MOST_BYTES:,}")


def _require_still(image: Image, name: str) -> None:
    width, height = image.size
    if not width or not height:
        raise TokenizerError(f"{name}: {width} x {height} pixels; expected at least one")
    if width * height > MOST_PIXELS:
        raise TokenizerError(f"{name}: {width} x {height} pixels; expected at most {MOST_PIXELS:,} in all")
    # MPO is what some cameras write: a JPEG photograph, then its preview or a second view.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise TokenizerError(f"{name}: {getattr(image, 'n_frames', 2)} frames; expected a single picture")


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if "cannot identify image file" in text:
        text = "not a picture"
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + "..."
