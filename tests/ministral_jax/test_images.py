"""Pictures that are whole, and pictures that are not: every bad one is a single line."""

from __future__ import annotations

import base64
import io
import logging
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ministral_jax.errors import TokenizerError
from ministral_jax.images import MOST_BYTES, MOST_PIXELS, checked_image, decode_image, image_of_part, open_image


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(mode: str = "RGB") -> Image.Image:
    """Something to see: neighbouring pixels differ."""
    colours = np.arange(16 * 12 * 3, dtype=np.uint8).reshape(12, 16, 3)
    return Image.fromarray(colours).convert(mode)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that says it is of that size, and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_format_is_read(kind: str, tmp_path: Path) -> None:
    (tmp_path / "picture").write_bytes(encoded(gradient(), kind))
    assert open_image(tmp_path / "picture").size == (16, 12)


def test_the_second_view_of_a_photograph_is_left_alone() -> None:
    data = encoded(gradient(), "MPO", save_all=True, append_images=[gradient("L").resize((4, 3))])
    assert decode_image(data, "it").size == (16, 12)


def refused(data: bytes) -> str:
    with pytest.raises(TokenizerError) as error:
        decode_image(data, "it")
    message = str(error.value)
    assert message.startswith("it: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"hello", "not a picture; expected PNG, JPEG, WebP, GIF, BMP or TIFF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (encoded(gradient(), "PNG")[:60], "expected PNG"),
        (encoded(gradient(), "JPEG")[:-40], "truncated"),
        (png_of_size(9000, 9000), "9000 x 9000 pixels; expected at most 67,108,864"),
        (png_of_size(10_000, 10_000), "expected a picture of at most 67,108,864 pixels"),
        (png_of_size(60_000, 60_000), "expected a picture of at most 67,108,864 pixels"),
        (png_of_size(0, 5), "expected"),
        (encoded(gradient(), "GIF", save_all=True, append_images=[gradient("L")]), "2 frames; expected a single"),
        (encoded(gradient(), "WEBP", save_all=True, append_images=[gradient("L")]), "2 frames"),
        (encoded(gradient(), "TIFF", save_all=True, append_images=[gradient("L")]), "2 frames"),
        (encoded(gradient(), "PNG", save_all=True, append_images=[gradient("L")]), "2 frames"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "pixels of mode F; expected grey or colour of 8 or 16 bits"),
    ],
)  # fmt: skip
def test_a_bad_picture_is_one_line(data: bytes, words: str) -> None:
    assert words in refused(data)


def test_a_file_that_is_too_long_or_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="No such file or directory; expected a picture"):
        open_image(tmp_path / "none.png")
    with pytest.raises(TokenizerError, match="Is a directory"):
        open_image(tmp_path)
    with (tmp_path / "long.png").open("wb") as file:
        file.truncate(MOST_BYTES + 1)  # a hole: nothing is written
    with pytest.raises(TokenizerError, match="67,108,865 bytes; expected a picture of at most 67,108,864"):
        open_image(tmp_path / "long.png")


def test_pictures_in_memory_are_checked_too() -> None:
    with pytest.raises(TokenizerError, match="it: 0 x 5 pixels"):
        checked_image(Image.new("RGB", (0, 5)), "it")
    wide = Image.new("1", (MOST_PIXELS // 8 + 1, 8))
    with pytest.raises(TokenizerError, match="expected at most"):
        checked_image(wide, "it")


def test_colours_of_print_become_those_of_screens_with_a_note(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ministral_jax"):
        found = decode_image(encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"), "it")
    assert (found.mode, found.getpixel((0, 0))) == ("RGB", (255, 0, 0))
    assert caplog.messages == ["it: CMYK, turned into RGB without its colour profile"]


def test_sixteen_bits_keep_their_upper_half_with_a_note(caplog: pytest.LogCaptureFixture) -> None:
    """Pillow itself would make everything above 255 white."""
    values = np.arange(0, 65536, 4096, dtype=np.uint16).reshape(4, 4)
    with caplog.at_level(logging.WARNING, "ministral_jax"):
        found = decode_image(encoded(Image.fromarray(values), "PNG"), "it")
    np.testing.assert_array_equal(np.asarray(found), values // 256)
    assert caplog.messages == ["it: 16 bits a pixel, of which the upper 8 are kept"]


WHOLE = {kind: encoded(gradient(), kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")}


@given(
    kind=st.sampled_from(sorted(WHOLE)),
    places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
    kept=st.floats(0.05, 1),
)
def test_a_damaged_file_is_a_picture_or_one_line(kind: str, places: list[tuple[float, int]], kept: float) -> None:
    data = bytearray(WHOLE[kind])
    for place, value in places:
        data[int(place * len(data))] = value
    lines: list[str] = []
    try:
        lines += [f"a picture of {decode_image(bytes(data[: max(1, int(kept * len(data)))]), 'it').size}"]
    except TokenizerError as error:
        lines += str(error).splitlines()
    assert len(lines) == 1


def part(value: Any, local_files: bool = True) -> Any:
    return image_of_part(value, "here", local_files=local_files)


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def test_every_spelling_of_a_part_is_the_same_picture(tmp_path: Path) -> None:
    png = encoded(gradient(), "PNG")
    path = tmp_path / "a picture.png"
    path.write_bytes(png)
    spellings = [
        {"type": "image_url", "image_url": data_url(png)},
        {"type": "image_url", "image_url": {"url": data_url(png), "detail": "high"}},
        {"type": "image_url", "image_url": path.as_uri()},
        {"type": "image", "image": path},
        {"type": "image", "image": png},
        {"type": "image", "image": data_url(png)},
        {"type": "image", "image": gradient()},
    ]
    for spelling in spellings:
        np.testing.assert_array_equal(np.asarray(part(spelling)), np.asarray(gradient()))
    assert part({"type": "text", "text": "a"}) is None


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (
            {"type": "image_url", "image_url": "https://example.com/a.png"},
            "expected a data: URL or file://; nothing is",
        ),
        ({"type": "image_url", "image_url": "data:image/png,abc"}, "expected data:image/png;base64"),
        ({"type": "image_url", "image_url": "data:image/png;base64,a"}, "not base64"),
        ({"type": "image_url", "image_url": 3}, "int, expected a URL"),
        ({"type": "image_url"}, "NoneType, expected a URL"),
        ({"type": "image", "image": 3}, "int; expected a Pillow image"),
    ],
)
def test_a_part_that_names_no_picture_is_one_line(value: Any, words: str) -> None:
    with pytest.raises(TokenizerError, match=r"^here") as error:
        part(value)
    assert words in str(error.value)


def test_files_stay_closed_to_strangers(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(encoded(gradient(), "PNG"))
    for value in ({"type": "image_url", "image_url": path.as_uri()}, {"type": "image", "image": path}):
        with pytest.raises(TokenizerError, match=r"^here"):
            part(value, local_files=False)
