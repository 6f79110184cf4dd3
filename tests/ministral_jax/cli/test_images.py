"""`--image`: drawn pictures through a tiny model, and pictures that are not what they should be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image, ImageDraw

import ministral_jax
from infer.generate import Generator
from infer.sampling import SamplingParams
from ministral_jax.cli import main
from ministral_jax.tokenizer import Tokenizer
from tests.architecture_files import VISION, make, write_example
from tests.checkpoint_files import tiny_config
from tests.tekken_files import tiny_tekken, write_tiny_tekken

pytest.importorskip("cv2")


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that reads images, with its tokenizer."""
    folder = tmp_path_factory.mktemp("seeing") / "model"
    words = tiny_tekken("v13")["config"]["default_vocab_size"]
    config = tiny_config("ministral3", vocab_size=words, max_length=512, n_layers=2, vision=VISION)
    write_example(folder, make(config, dtype=np.dtype(np.float32)), "mistral")
    write_tiny_tekken(folder, "v13")
    return folder


def draw(path: Path, width: int, height: int) -> str:
    """A disc on a ground of another colour."""
    image = Image.new("RGB", (width, height), "navy")
    ImageDraw.Draw(image).ellipse((2, 1, width - 4, height - 2), fill="orange")
    image.save(path)
    return str(path)


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """What XLA compiles, by event, while the test runs."""
    seen: list[str] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def chat(folder: Path, *pictures: str, prompt: str = "what is it?") -> int:
    shown = [word for picture in pictures for word in ("--image", picture)]
    return main(["chat", str(folder), "--prompt", prompt, "--max-tokens", "4", "--json", *shown])


def test_a_second_size_compiles_nothing(seeing, tmp_path, capsys, compilations) -> None:
    assert chat(seeing, draw(tmp_path / "a.png", 20, 13)) == 0
    assert compilations, "the listener hears nothing: the test would pass whatever happens"
    compilations.clear()
    assert chat(seeing, draw(tmp_path / "b.jpg", 30, 11)) == 0
    assert chat(seeing, draw(tmp_path / "c.webp", 9, 17)) == 0
    assert compilations == []
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_the_answer_is_that_of_the_python_interface(seeing, tmp_path, capsys) -> None:
    """Two pictures of one turn stand before its text, in their order."""
    pictures = [draw(tmp_path / "a.png", 20, 13), draw(tmp_path / "b.png", 9, 17)]
    assert chat(seeing, *pictures) == 0
    content = [{"type": "image", "image": Path(path)} for path in pictures] + [{"type": "text", "text": "what is it?"}]
    generator = Generator(ministral_jax.load(seeing), Tokenizer.load(seeing))
    reply = generator.chat([{"role": "user", "content": content}], SamplingParams(max_tokens=4))
    assert json.loads(capsys.readouterr().out)["content"] == reply.message.content


def test_generate_shows_pictures_before_the_text_or_at_given_ids(seeing, tmp_path, capsys) -> None:
    path, tokenizer = draw(tmp_path / "a.png", 20, 13), Tokenizer.load(seeing)
    options = ["--image", path, "--max-tokens", "4", "--json"]
    assert main(["generate", str(seeing), "--prompt", "it is", *options]) == 0
    with Image.open(path) as picture:
        image = tokenizer.encode_image(picture)
    ids = [tokenizer.bos_id, *image.tokens, *tokenizer.encode("it is")]
    assert main(["generate", str(seeing), "--ids", ",".join(map(str, ids)), *options]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first == second
    assert main(["generate", str(seeing), "--prompt", "a", "--prompt", "b", *options]) == 2
    assert "--image: expected a single prompt" in capsys.readouterr().err


def test_bad_pictures_are_one_line(seeing, tmp_path, capsys) -> None:
    animated = tmp_path / "animated.gif"
    Image.new("L", (4, 4)).save(animated, save_all=True, append_images=[Image.new("L", (4, 4), 255)])
    (tmp_path / "damaged.png").write_bytes(Path(draw(tmp_path / "whole.png", 20, 13)).read_bytes()[:70])
    (tmp_path / "empty.png").touch()
    for name in ("animated.gif", "damaged.png", "empty.png", "none.png"):
        assert chat(seeing, str(tmp_path / name)) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.startswith(f"ministral: {tmp_path / name}: ")


def test_pictures_of_other_depths_and_colours_are_shown_with_one_line(seeing, tmp_path, capsys) -> None:
    Image.new("CMYK", (20, 13), (0, 90, 200, 10)).save(tmp_path / "print.jpg")
    Image.new("I;16", (20, 13), 40000).save(tmp_path / "deep.png")
    for name, words in (("print.jpg", "CMYK"), ("deep.png", "16 bits a pixel")):
        assert chat(seeing, str(tmp_path / name)) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if name in line]
        assert len(lines) == 1
        assert words in lines[0]


def test_a_model_that_reads_text_says_so(checkpoint, tmp_path, capsys) -> None:
    assert chat(checkpoint, draw(tmp_path / "a.png", 20, 13)) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("1 images in the conversation: this model reads text only")


def test_at_a_terminal_a_picture_goes_with_the_next_message(seeing, tmp_path, capsys, monkeypatch) -> None:
    seen: list[int] = []

    def stream_ids(self: Generator, prompts: Any, params: Any, *, images: Any) -> Iterator[Any]:
        seen.append(len(images[0]))
        return iter(())

    monkeypatch.setattr(Generator, "stream_ids", stream_ids)
    lines = iter(
        ["hello", f"/image {draw(tmp_path / 'b.png', 9, 17)}", f"/image {tmp_path / 'none'}", "and now?", "/exit"]
    )
    monkeypatch.setattr("builtins.input", lambda _="": next(lines))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert main(["chat", str(seeing), "--image", draw(tmp_path / "a.png", 20, 13)]) == 0
    assert seen == [1, 1]  # answers without words are as if never asked for
    assert "none: No such file" in capsys.readouterr().err
