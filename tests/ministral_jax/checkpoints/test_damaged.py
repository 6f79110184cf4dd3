"""Damaged and hostile checkpoints, generated from valid ones: each is one line that names the file."""

import contextlib
import copy
import json
import os
import random
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ministral_jax.checkpoints.load import load_model
from ministral_jax.checkpoints.safetensors import SafetensorsFile
from ministral_jax.checkpoints.safetensors_header import MAX_HEADER_BYTES
from ministral_jax.checkpoints.save import save_hf, save_mistral
from ministral_jax.errors import CheckpointError
from ministral_jax.parameters import parameters
from tests.checkpoint_files import tiny_config, write_tiny_checkpoint

CONFIG = tiny_config(n_layers=1, dim=16, n_heads=2, n_kv_heads=1, head_dim=8, hidden_dim=24, vocab_size=32)
FILE = "consolidated.safetensors"
# One seed that never changes, and one that always does; both are in the message of a failure.
SEEDS = [0, random.SystemRandom().randrange(2**32)]

HUGE = 2**63
HOSTILE: list[Any] = [
    None, True, False, -1, 0, 1, 7, 1.5, 2**31, HUGE, 10**300, "", "F32", "é", [], [0], [-1, 0], [0, 0], [1, 0],
    [0, -4], [True, 4], [1.0, 2.0], ["0", "4"], [0, HUGE], [HUGE, HUGE + 4], [2**40, 2**40], [0, HUGE, HUGE], [1] * 40,
    [[1]], {}, {"a": 1}, "BF17", "f32", "I8", "U8", "BOOL", "F64", "F8_E4M3", "F4", "C64",
]  # fmt: skip


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("valid")
    write_tiny_checkpoint(folder, CONFIG)
    return (folder / FILE).read_bytes()


@pytest.fixture
def folder(tmp_path) -> Path:
    write_tiny_checkpoint(tmp_path, CONFIG)
    return tmp_path


def split(raw: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def joined(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def is_one_line_about(problem: CheckpointError, path: Path) -> bool:
    message = str(problem)
    return "\n" not in message and len(message) < 1000 and message.startswith(f"{path}: ")


def refusal(directory: Path, file_name: str = FILE) -> str:
    """The error of loading `directory`: one line that begins with `file_name` in it."""
    with pytest.raises(CheckpointError) as caught:
        load_model(directory)
    assert is_one_line_about(caught.value, directory / file_name), caught.value
    return str(caught.value)


def read(path: Path) -> None:
    """By the reader alone, which is quick, then into the model."""
    SafetensorsFile(path).close()
    load_model(path.parent)


def assert_refused(directory: Path, raw: bytes, what: object) -> None:
    path = directory / FILE
    path.write_bytes(raw)
    try:
        with pytest.raises(CheckpointError) as caught:
            read(path)
        assert is_one_line_about(caught.value, path), caught.value
    except BaseException as problem:
        raise AssertionError(f"with {what} (seeds {SEEDS})") from problem


def test_the_file_that_everything_here_is_made_of_is_valid(folder, valid):
    header, data = split(valid)
    (folder / FILE).write_bytes(joined(header, data))
    assert parameters(load_model(folder))


def test_a_file_cut_off_anywhere_is_refused(folder, valid):
    header, data = split(valid)
    start = len(valid) - len(data)
    edges = {0, 8, start, len(valid)} | {start + place for info in header.values() for place in info["data_offsets"]}
    cuts = {edge + shift for edge in edges for shift in (-1, 0, 1)} | {1, 4, start // 2, start + len(data) // 2}
    for cut in sorted(cuts):
        if 0 <= cut < len(valid):
            assert_refused(folder, valid[:cut], f"{cut} of {len(valid)} bytes")


def test_bytes_after_the_last_tensor_are_refused(folder, valid):
    for count in (1, 8, 4096):
        assert_refused(folder, valid + bytes(count), f"{count} bytes more")


def test_a_lying_length_of_the_header_is_refused(folder, valid):
    length = struct.unpack("<Q", valid[:8])[0]
    lies = {0, 1, length - 1, length + 1, length + 8, len(valid) - 8, len(valid), 2**31, 2**63, 2**64 - 1}
    lies |= {MAX_HEADER_BYTES, MAX_HEADER_BYTES + 1} | {length ^ (1 << bit) for bit in range(64)}
    for lie in sorted(lies):
        assert_refused(folder, struct.pack("<Q", lie) + valid[8:], f"length {lie} for {length}")


def changed_headers(header: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The header with one thing changed: each field of some tensors set to each hostile value, and fields removed."""
    names = list(header)
    for name in (names[0], names[len(names) // 2], names[-1]):
        for value in HOSTILE:
            yield f"{name}={value!r}", header | {name: value}
        for key, original in header[name].items():
            values = [value for value in HOSTILE if value != original or type(value) is not type(original)]
            if isinstance(original, list):
                for i in range(len(original)):
                    for item in (*HOSTILE[:14], original[i] - 1, original[i] + 1, original[i] + 4):
                        if item != original[i] or type(item) is not int:
                            values.append([*original[:i], item, *original[i + 1 :]])
                values += [original[:-1], [*original, 1], original[::-1]]
            for value in values:
                if value != original or type(value) is not type(original):
                    yield f"{name}.{key}={value!r}", header | {name: header[name] | {key: value}}
            yield f"{name} without {key}", header | {name: {k: v for k, v in header[name].items() if k != key}}
        yield f"without {name}", {other: info for other, info in header.items() if other != name}
        yield f"{name} renamed", {other + "x" * (other == name): info for other, info in header.items()}
    for metadata in (None, 1, "x", [], {"a": 1}, {"a": None}, {"a": {"b": "c"}}):
        yield f"metadata {metadata!r}", {"__metadata__": metadata} | header
    first, second = names[:2]
    yield "two tensors at one place", header | {first: header[second] | {"shape": header[second]["shape"]}}
    yield "an empty header", {}


def test_every_field_of_the_header_with_every_hostile_value_is_refused(folder, valid):
    header, data = split(valid)
    cases = 0
    for what, changed in changed_headers(header):
        if changed == header and json.dumps(changed) == json.dumps(header):
            continue
        # A norm of one layer may be called by any shape that multiplies to its size; all else is impossible.
        assert_refused(folder, joined(changed, data), what)
        cases += 1
    assert cases > 500


def tensor(dtype: Any, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        # Sizes and lengths agree in all of these; each is wrong in one way only.
        ({"a": tensor("F32", [2], 0, 8), "b": tensor("F32", [2], 4, 12)}, "'b' begins .* overlap"),
        ({"a": tensor("F32", [3], 0, 12), "b": tensor("F32", [1], 4, 8)}, "'b' begins .* overlap"),
        ({"a": tensor("F32", [3], 0, 12), "b": tensor("F32", [3], 0, 12)}, "begins .* overlap"),
        ({"a": tensor("F32", [1], 0, 4), "b": tensor("F32", [1], 8, 12)}, "'b' begins .* belong to no tensor"),
        ({"a": tensor("F32", [2], 4, 12)}, "'a' begins .* the header ends: the bytes between belong to no tensor"),
        ({"a": tensor("F32", [2], 0, 8)}, "4 bytes follow 'a'"),
        ({"a": tensor("F32", [4], 0, 16)}, "'a' ends at byte .* truncated"),
        ({"a": tensor("F32", [-3, -1], 0, 12)}, r"'a' has shape \[-3, -1\]"),
        ({"a": tensor("F32", [3, True], 0, 12)}, r"'a' has shape \[3, True\]"),
        ({"a": tensor("F32", [3.0], 0, 12)}, r"'a' has shape \[3\.0\]"),
        ({"a": tensor("F32", [3], False, 12)}, r"'a' has data_offsets \[False, 12\]"),
        ({"a": tensor("F32", [3], 0, 12), "b": tensor("U8", [HUGE // 2, 0, HUGE], 12, 12)}, "'b' .* fits a memory"),
        ({"a": tensor("F32", [3], 0, 12), "b": tensor("U8", [1] * 33, 0, 1)}, "'b' has shape .* at most 32"),
        ({"a": tensor("F32", [3], 0, 12) | {"dtype": ["F32"]}}, "'a' has dtype .* expected one of F64"),
        ({"__metadata__": {"x": 1}, "a": tensor("F32", [3], 0, 12)}, "'__metadata__', 'x', .* expected '\"'"),
    ],
)  # fmt: skip
def test_a_header_wrong_in_one_way_is_told_which(tmp_path, header, reason):
    (tmp_path / FILE).write_bytes(joined(header, bytes(12)))
    with pytest.raises(CheckpointError, match=rf"{FILE}: .*{reason}"):
        SafetensorsFile(tmp_path / FILE)


def test_a_header_that_leaves_nothing_to_object_to_is_taken(tmp_path):
    header = {"b": tensor("F32", [2], 4, 12), "empty": tensor("F32", [0, 7], 4, 4), "a": tensor("F32", [], 0, 4)}
    (tmp_path / FILE).write_bytes(joined(json.dumps(header).encode() + b"   \n", bytes(12)))
    with SafetensorsFile(tmp_path / FILE) as file:
        assert {name: info.shape for name, info in file.tensors.items()} == {"b": (2,), "empty": (0, 7), "a": ()}


def texts(text: bytes, header: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Headers that are no JSON, or JSON that no header may be."""
    name = next(iter(header)).encode()
    yield "a list", b"[]"
    yield "a number", b"17"
    yield "NaN", text.replace(b"0", b"NaN", 1)
    yield "Infinity as an offset", text.replace(b"[0,", b"[-Infinity,", 1)
    yield "a blank before", b" " + text
    yield "a byte order mark", b"\xef\xbb\xbf" + text
    yield "something after", text + b"x"
    yield "another object after", text + b"{}"
    yield "a NUL after", text + b"\0"
    yield "a comma at the end", text.rstrip()[:-1] + b",}"
    yield "a comma at the start", b"{," + text[1:]
    yield "two commas", text.replace(b"},", b"},,", 1)
    yield "no colon", text.replace(b":", b" ", 1)
    yield "a number for a name", b"{1" + text[text.index(b":") :]
    yield "no closing brace", text.rstrip()[:-1]
    yield "single quotes", text.replace(b'"', b"'")
    yield "UTF-16", text.decode().encode("utf-16")
    yield "a lone surrogate", text.replace(name, b"\\ud800", 1)
    yield "a name of several lines", text.replace(name, b"a\\nb\\rc\\u2028d", 1)
    yield "a name of a terminal's", text.replace(name, b"\\u001b[31m", 1)
    yield "a very long name", text.replace(name, b"x" * 3000, 1)
    yield "a name longer than any", text.replace(name, b"x" * 10_000, 1)
    yield "a tensor twice", text[:-1] + b',"' + name + b'":' + json.dumps(header[name.decode()]).encode() + b"}"
    yield "metadata twice", b'{"__metadata__":{},"__metadata__":{},' + text[1:]
    yield "a key twice", text.replace(b'"dtype"', b'"dtype": "F32", "dtype"', 1)
    yield "lists within lists", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    yield "objects within objects", b'{"a":' * 100_000 + b"}" * 100_000
    yield "deep metadata", b'{"__metadata__":' + b'{"a":' * 100_000 + b"}" * 100_001
    yield "a number of 100,000 digits", text.replace(b"[0,", b"[" + b"9" * 100_000 + b",", 1)
    yield "a number of 4,000 digits", text.replace(b"[0,", b"[" + b"9" * 4000 + b",", 1)
    yield "a long number in metadata", b'{"__metadata__":{"a":' + b"9" * 100_000 + b"}," + text[1:]
    yield "nothing but blanks", b" " * len(text)
    for byte in (0x80, 0xFF, 0xC0, 0xED):
        for place in (1, 2, len(text) // 2, len(text) - 1):
            yield f"byte {byte:#x} at {place}", text[:place] + bytes([byte]) + text[place + 1 :]


def test_headers_that_are_not_what_the_format_says_are_refused(folder, valid):
    header, data = split(valid)
    for what, text in texts(json.dumps(header).encode(), header):
        assert_refused(folder, joined(text, data), what)


@pytest.mark.parametrize("seed", SEEDS, ids=["fixed", "fresh"])
def test_a_byte_changed_anywhere_in_the_header_is_refused_unless_it_says_the_same(folder, valid, seed):
    generator = random.Random(seed)
    _, data = split(valid)
    end = len(valid) - len(data)
    expected = {name: np.asarray(array) for name, array in parameters(load_model(folder)).items()}
    for _ in range(150):
        place, byte = generator.randrange(end), generator.randrange(256)
        raw = valid[:place] + bytes([byte]) + valid[place + 1 :]
        (folder / FILE).write_bytes(raw)
        try:
            found = parameters(load_model(folder))
        except CheckpointError as problem:
            refused = is_one_line_about(problem, folder / FILE)
            assert refused, f"seed {seed}: byte {place} set to {byte}: {problem}"  # noqa: PT017
        except BaseException as problem:
            raise AssertionError(f"seed {seed}: byte {place} set to {byte}") from problem
        else:
            for name, values in expected.items():
                np.testing.assert_array_equal(np.asarray(found[name]), values, err_msg=f"seed {seed}: {place}, {byte}")


class TestTheModelsTensors:
    """A sound file that is not the model's: the line names the tensor, what was found and what was expected."""

    @pytest.fixture
    def tensors(self, folder, valid) -> dict[str, np.ndarray]:
        with SafetensorsFile(folder / FILE) as file:
            return {name: file.read(name) for name in file.tensors}

    def rewrite(self, folder: Path, tensors: dict[str, np.ndarray]) -> None:
        from safetensors.numpy import save_file

        save_file(tensors, folder / FILE)

    def test_missing(self, folder, tensors):
        del tensors["layers.0.ffn_norm.weight"]
        self.rewrite(folder, tensors)
        with pytest.raises(CheckpointError, match=r"tensor 'layers\.0\.ffn_norm\.weight' is missing.* by params\.json"):
            load_model(folder)

    def test_many_missing(self, folder, tensors):
        self.rewrite(folder, {name: array for name, array in tensors.items() if "attention." not in name})
        with pytest.raises(CheckpointError, match=r"tensor 'layers\.0\.attention\.wk\.weight' \(and 3 more\)"):
            load_model(folder)

    def test_extra(self, folder, tensors):
        self.rewrite(folder, tensors | {"layers.1.ffn_norm.weight": np.ones(16, np.float32)})
        assert "tensor 'layers.1.ffn_norm.weight' is not part of the model in params.json" in refusal(folder)

    @pytest.mark.parametrize("shape", [(16, 15), (15, 16), (16,), (16, 16, 1), (0, 16), ()])
    def test_misshapen(self, folder, tensors, shape):
        self.rewrite(folder, tensors | {"layers.0.attention.wq.weight": np.ones(shape, np.float32)})
        assert f"has shape {list(shape)}, expected [16, 16] by params.json" in refusal(folder)

    @pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64, np.bool_, "float8_e4m3fn"])
    def test_of_a_dtype_that_no_dense_weight_has(self, folder, tensors, dtype):
        self.rewrite(folder, tensors | {"layers.0.attention.wq.weight": np.ones((16, 16)).astype(dtype)})
        assert "tensor 'layers.0.attention.wq.weight' has dtype " in refusal(folder)


INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sharded_source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    weights = write_tiny_checkpoint(folder / "whole", CONFIG)
    save_hf(folder / "parts", weights, CONFIG, max_shard_bytes=4000)
    return folder / "parts"


@pytest.fixture
def sharded(sharded_source, tmp_path) -> Path:
    folder = tmp_path / "sharded"
    folder.mkdir()
    for path in sharded_source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def index_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / INDEX).read_text())


class TestTheIndex:
    def refused(self, folder: Path, index: object, what: object = "", file_name: str = INDEX) -> str:
        text = index if isinstance(index, bytes) else json.dumps(index).encode()
        (folder / INDEX).write_bytes(text)
        try:
            return refusal(folder, file_name)
        except BaseException as problem:
            raise AssertionError(f"with {what}") from problem

    def test_it_is_valid_before_it_is_changed(self, sharded):
        assert len(set(index_of(sharded)["weight_map"].values())) > 2
        assert parameters(load_model(sharded))

    def test_names_that_leave_the_folder_are_refused(self, sharded, tmp_path):
        index = index_of(sharded)
        name, shard = next(iter(index["weight_map"].items()))
        (tmp_path / shard).write_bytes((sharded / shard).read_bytes())
        (sharded / "inner").mkdir()
        (sharded / "inner" / shard).write_bytes((sharded / shard).read_bytes())
        escapes = [f"../{shard}", f"{tmp_path}/{shard}", f"./{shard}", f"inner/{shard}", f"..\\{shard}", "/dev/zero"]
        escapes += [f"x/../{shard}", "..", ".", "", f"{shard}\0", f"{shard}\n", "config.json", f"file:{shard}"]
        escapes += ["x" * 5000 + ".safetensors", ".hidden.safetensors"]
        for escape in (*escapes, 1, None, [shard], {"a": shard}, True):
            changed = copy.deepcopy(index)
            changed["weight_map"][name] = escape
            self.refused(sharded, changed, repr(escape))

    def test_links_that_leave_the_folder_are_refused(self, sharded, tmp_path):
        shard = next(iter(index_of(sharded)["weight_map"].values()))
        (sharded / shard).rename(tmp_path / shard)
        (sharded / shard).symlink_to(tmp_path / shard)
        assert "a link out of the folder" in refusal(sharded, INDEX)

    @pytest.mark.parametrize("target", ["nowhere", "itself"])
    def test_links_to_nothing_are_refused(self, sharded, target):
        shard = next(iter(index_of(sharded)["weight_map"].values()))
        (sharded / shard).unlink()
        (sharded / shard).symlink_to(shard if target == "itself" else "nowhere")
        refusal(sharded, shard if target == "nowhere" else INDEX)

    def test_a_listed_file_that_is_missing_is_named(self, sharded):
        shard = sorted(set(index_of(sharded)["weight_map"].values()))[1]
        (sharded / shard).unlink()
        assert "no such file" in refusal(sharded, shard)

    def test_a_tensor_listed_and_not_there_is_named_with_its_file(self, sharded):
        index = index_of(sharded)
        shard = next(iter(index["weight_map"].values()))
        index["weight_map"]["model.layers.7.ghost.weight"] = shard
        assert "tensor 'model.layers.7.ghost.weight'" in self.refused(sharded, index, file_name=shard)

    def test_a_tensor_there_and_not_listed_is_named(self, sharded):
        index = index_of(sharded)
        name = next(name for name in index["weight_map"] if "q_proj" in name)
        del index["weight_map"][name]
        assert f"tensor '{name}'" in self.refused(sharded, index)

    def test_a_tensor_in_another_file_than_listed_is_named(self, sharded):
        index = index_of(sharded)
        name, shard = next(iter(index["weight_map"].items()))
        index["weight_map"][name] = next(other for other in index["weight_map"].values() if other != shard)
        assert f"tensor '{name}' is in {shard}, the index says" in self.refused(sharded, index)

    def test_a_tensor_in_two_files_is_named(self, sharded):
        index = index_of(sharded)
        first, second = sorted(set(index["weight_map"].values()))[:2]
        (sharded / second).write_bytes((sharded / first).read_bytes())
        assert f"is also in {first}" in refusal(sharded, second)

    def test_a_numbered_file_beside_the_index_and_not_in_it_is_named(self, sharded):
        stray = "model-00009-of-00009.safetensors"
        shard = next(iter(index_of(sharded)["weight_map"].values()))
        (sharded / stray).write_bytes((sharded / shard).read_bytes())
        assert "not listed" in refusal(sharded, stray)

    def test_everything_else_that_an_index_may_not_be_is_refused(self, sharded):
        text = (sharded / INDEX).read_bytes()
        index = index_of(sharded)
        for weight_map in (None, [], {}, "x", 1, True):
            self.refused(sharded, index | {"weight_map": weight_map}, weight_map)
        self.refused(sharded, {"metadata": {}}, "no weight_map")
        for cut in (0, 1, 10, len(text) // 2, len(text) - 2):
            self.refused(sharded, text[:cut], f"{cut} bytes")
        total = b'"total_size": '
        texts = [
            b"[]",
            b"17",
            b"\xff" + text,
            text + b"x",
            b'{"weight_map":' + b"[" * 100_000,
            text.replace(b"{", b"", 1),
        ]
        texts += [text.replace(total, total + b'NaN, "x": '), b'{"weight_map": {}, ' + text.strip()[1:]]
        texts += [text.replace(total, total + b"9" * 9999), b'{"x":' + b"[]," * 5_000_000]
        for hostile in texts:
            self.refused(sharded, hostile, hostile[:40])

    def test_a_damaged_shard_is_the_file_that_is_named(self, sharded):
        shard = sorted(set(index_of(sharded)["weight_map"].values()))[1]
        os.truncate(sharded / shard, (sharded / shard).stat().st_size - 1)
        assert "truncated" in refusal(sharded, shard)


class TestOddFolders:
    def test_a_missing_one_of_numbered_files_is_named(self, sharded):
        (sharded / INDEX).unlink()
        shard = sorted(sharded.glob("*.safetensors"))[1]
        shard.unlink()
        assert "missing beside" in refusal(sharded, shard.name)

    def test_numbered_files_of_two_checkpoints_are_refused(self, sharded):
        (sharded / INDEX).unlink()
        stray = sharded / "model-00001-of-00099.safetensors"
        stray.write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"does not belong|missing beside"):
            load_model(sharded)

    @pytest.mark.parametrize("count", ["00000", "99999999999999999999", "9" * 200])
    def test_numbers_without_sense_are_refused_at_once(self, folder, count):
        (folder / FILE).rename(folder / f"consolidated-00001-of-{count}.safetensors")
        started = time.monotonic()
        with pytest.raises(CheckpointError, match="consolidated-"):
            load_model(folder)
        assert time.monotonic() - started < 10

    @pytest.mark.parametrize("name", ["consolidated.00.pth", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
    def test_pickle_files_are_refused_unopened(self, folder, name):
        (folder / FILE).unlink()
        (folder / name).write_bytes(b"\x80\x04cos\nsystem\n")
        (folder / name).chmod(0)
        assert "pickle files are never opened" in refusal(folder, name)

    def test_no_weights_at_all_is_said(self, folder):
        (folder / FILE).unlink()
        with pytest.raises(
            CheckpointError, match=r"no weight files of the mistral layout; expected consolidated\.safe"
        ):
            load_model(folder)

    def make_folder(path: Path) -> None:
        path.mkdir()

    def make_pipe(path: Path) -> None:
        os.mkfifo(path)

    def make_link_to_device(path: Path) -> None:
        path.symlink_to("/dev/zero")

    def make_dangling_link(path: Path) -> None:
        path.symlink_to("nowhere")

    def make_circular_link(path: Path) -> None:
        path.symlink_to(path.name)

    @pytest.mark.parametrize(
        "make", [make_folder, make_pipe, make_link_to_device, make_dangling_link, make_circular_link]
    )
    def test_what_is_no_regular_file_is_refused(self, folder, make: Callable[[Path], None]):
        (folder / FILE).unlink()
        make(folder / FILE)
        refusal(folder)


def sparse(path: Path, header: bytes, size: int) -> None:
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(size)


@contextlib.contextmanager
def bounded(n_bytes: int, seconds: float):
    tracemalloc.start()
    started = time.monotonic()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < n_bytes
    assert time.monotonic() - started < seconds


class TestBounds:
    """What a header claims costs nothing until it is believed; times are loose, machines are shared."""

    @pytest.mark.parametrize(
        "fill",
        [b"[],", b"{},", b'"ab",', b"1.5,", b"[[],[]],"],
        ids=["lists", "objects", "strings", "numbers", "nested lists"],
    )
    @pytest.mark.parametrize("where", ["tensor", "metadata"])
    def test_a_large_header_of_small_things_takes_little_memory(self, folder, fill, where):
        key = b"a" if where == "tensor" else b"__metadata__"
        header = b'{"' + key + b'":[' + fill * (20_000_000 // len(fill)) + b"1]}"
        sparse(folder / FILE, header, len(header) + 8)
        with bounded(4 * len(header), 60):
            refusal(folder)

    def test_the_longest_header_is_read_and_one_byte_more_is_not(self, folder):
        for length, reason in [
            (MAX_HEADER_BYTES, "header begins with"),
            (MAX_HEADER_BYTES + 1, "expected at most 100000000"),
        ]:
            with open(folder / FILE, "wb") as file:
                file.write(struct.pack("<Q", length))
                file.truncate(length + 8)
            with bounded(4 * MAX_HEADER_BYTES, 60):
                assert reason in refusal(folder)

    def test_a_tensor_of_a_terabyte_that_is_not_there_is_refused_before_memory_is_taken(self, folder, valid):
        header, data = split(valid)
        size = 2**40
        header["big"] = {"dtype": "U8", "shape": [size], "data_offsets": [len(data), len(data) + size]}
        with bounded(50_000_000, 60):
            assert_refused(folder, joined(header, data), "a terabyte")

    def test_a_tensor_of_a_terabyte_that_is_there_is_not_read_when_it_is_not_the_models(self, folder, valid):
        header, data = split(valid)
        size = 2**40
        header["big"] = {"dtype": "U8", "shape": [size], "data_offsets": [len(data), len(data) + size]}
        raw = joined(header, data)
        (folder / FILE).write_bytes(raw)
        os.truncate(folder / FILE, len(raw) + size)
        with bounded(50_000_000, 60):
            assert "tensor 'big' is not part of the model" in refusal(folder)


def test_a_mistral_index_is_checked_like_any_other(tmp_path):
    weights = write_tiny_checkpoint(tmp_path / "whole", CONFIG)
    save_mistral(tmp_path / "parts", weights, CONFIG, max_shard_bytes=4000)
    path = tmp_path / "parts" / "consolidated.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["norm.weight"] = "../whole/consolidated.safetensors"
    path.write_text(json.dumps(index))
    assert "expected a .safetensors file in the same folder" in refusal(tmp_path / "parts", path.name)
