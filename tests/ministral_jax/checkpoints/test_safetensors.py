"""Our reader and writer of safetensors files against the safetensors library, and against each other."""

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from ministral_jax.checkpoints.safetensors import ALIGNMENT, SafetensorsFile
from ministral_jax.checkpoints.safetensors_header import DTYPES
from ministral_jax.checkpoints.safetensors_writer import TensorSpec, write_safetensors, write_sharded
from ministral_jax.errors import CheckpointError


def bits(shape: tuple[int, ...], dtype: np.dtype, seed: int = 0) -> np.ndarray:
    """An array of any bit patterns that `dtype` allows, NaN of all kinds included."""
    count = int(np.prod(shape)) * dtype.itemsize
    raw = np.random.default_rng(seed).integers(0, 256, count, np.uint8)
    return (raw % 2 if dtype == np.bool_ else raw).view(dtype).reshape(shape)


def write(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    specs = {name: TensorSpec(array.dtype, array.shape) for name, array in tensors.items()}
    write_safetensors(path, specs, tensors.__getitem__, metadata)


def read_all(path: Path) -> dict[str, np.ndarray]:
    with SafetensorsFile(path) as file:
        return {name: file.read(name) for name in file.tensors}


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


def of_every_dtype() -> dict[str, np.ndarray]:
    return {name: bits((3, 5), dtype, seed) for seed, (name, dtype) in enumerate(DTYPES.items())}


def test_a_file_of_the_safetensors_library_reads_bit_for_bit_in_every_dtype(tmp_path):
    tensors = of_every_dtype()
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert_same_bits(read_all(tmp_path / "x.safetensors"), tensors)
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        assert file.metadata == {"format": "pt"}


def test_the_safetensors_library_reads_our_file_bit_for_bit_in_every_dtype(tmp_path):
    tensors = of_every_dtype()
    write(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    found = dict(safetensors.deserialize((tmp_path / "x.safetensors").read_bytes()))
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        assert found[name]["dtype"] == name
        assert tuple(found[name]["shape"]) == array.shape
        assert bytes(found[name]["data"]) == array.tobytes()
    with safetensors.safe_open(tmp_path / "x.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(lambda name: name != "__metadata__"),
        st.tuples(shapes, st.sampled_from(list(DTYPES.values()))),
        max_size=6,
    ),
    st.none() | st.dictionaries(st.text(max_size=9), st.text(max_size=9), min_size=1, max_size=3),
)
def test_what_is_written_is_read_whatever_the_names_shapes_and_dtypes(tmp_path_factory, described, metadata):
    path = tmp_path_factory.mktemp("round") / "x.safetensors"
    tensors = {name: bits(shape, dtype) for name, (shape, dtype) in described.items()}
    write(path, tensors, metadata)
    assert_same_bits(read_all(path), tensors)
    with SafetensorsFile(path) as file:
        assert file.metadata == (metadata or {})
    assert safetensors.deserialize(path.read_bytes()) is not None  # the library finds nothing to object to


@given(st.data())
def test_a_slice_is_what_numpy_cuts_out_of_the_whole(tmp_path_factory, data):
    shape = data.draw(st.lists(st.integers(0, 6), max_size=4).map(tuple))
    path = tmp_path_factory.mktemp("slice") / "x.safetensors"
    whole = bits(shape, np.dtype(np.int16))
    write(path, {"before": bits((3,), np.dtype(np.int16), 1), "x": whole, "after": bits((3,), np.dtype(np.int16), 2)})
    edge = st.none() | st.integers(-7, 7)
    index = tuple(slice(data.draw(edge), data.draw(edge)) for _ in shape)
    with SafetensorsFile(path) as file:
        found = file.read_slice("x", index)
    np.testing.assert_array_equal(found, whole[index], strict=True)


def test_a_slice_reads_only_its_own_bytes(tmp_path):
    write(tmp_path / "x.safetensors", {"x": bits((64, 32), np.dtype(np.float32))})
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        read = []
        original = file._file

        class Counting:
            def seek(self, place):
                return original.seek(place)

            def readinto(self, target):
                read.append(len(target))
                return original.readinto(target)

            def close(self):
                original.close()

        file._file = Counting()
        file.read_slice("x", (slice(8, 16), slice(None)))
        assert sum(read) == 8 * 32 * 4
        assert len(read) == 1
        read.clear()
        file.read_slice("x", (slice(8, 16), slice(4, 6)))
        assert sum(read) == 8 * 2 * 4


def test_memory_is_aligned_and_owned_for_jax_to_take_over(tmp_path):
    write(tmp_path / "x.safetensors", {"odd": bits((3,), np.dtype(np.int8)), "x": bits((7, 3), np.dtype(np.float32))})
    for array in read_all(tmp_path / "x.safetensors").values():
        assert array.ctypes.data % ALIGNMENT == 0
        assert array.flags.writeable


def test_a_file_shortened_while_open_is_an_error_that_names_the_tensor_not_a_crash(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path, {"x": bits((1000,), np.dtype(np.float32))})
    with SafetensorsFile(path) as file:
        os.truncate(path, path.stat().st_size - 100)
        with pytest.raises(CheckpointError, match=r"x\.safetensors: tensor 'x' ends after 3900 of its 4000 bytes"):
            file.read("x")


def test_a_file_replaced_while_open_is_read_as_it_was(tmp_path):
    path = tmp_path / "x.safetensors"
    old, new = bits((100,), np.dtype(np.float32), 1), bits((200,), np.dtype(np.float32), 2)
    write(path, {"x": old})
    with SafetensorsFile(path) as file:
        write(path, {"x": new})
        assert file.read("x").tobytes() == old.tobytes()
    assert read_all(path)["x"].tobytes() == new.tobytes()


def test_an_interrupted_writer_leaves_neither_the_file_nor_a_temporary_one(tmp_path):
    specs = {name: TensorSpec(np.dtype(np.float32), (4,)) for name in "ab"}

    def produce(name):
        if name == "b":
            raise KeyboardInterrupt
        return np.zeros(4, np.float32)

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path / "x.safetensors", specs, produce)
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_cannot_be_written_is_a_one_line_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"none/x\.safetensors: cannot be written \(No such file or directory\)"):
        write(tmp_path / "none" / "x.safetensors", {"x": np.zeros(3, np.float32)})


def test_values_other_than_announced_are_a_bug_of_the_caller(tmp_path):
    specs = {"x": TensorSpec(np.dtype(np.float32), (4,))}
    with pytest.raises(ValueError, match="announced as"):
        write_safetensors(tmp_path / "x.safetensors", specs, lambda name: np.zeros(5, np.float32))


def test_shards_stay_under_their_limit_and_the_index_lists_every_tensor(tmp_path):
    tensors = {f"t{i}": bits((10 + i,), np.dtype(ml_dtypes.bfloat16), i) for i in range(9)} | {
        "big": bits((500,), np.dtype(np.float32))
    }
    specs = {name: TensorSpec(array.dtype, array.shape) for name, array in tensors.items()}
    paths = write_sharded(tmp_path, "model", specs, tensors.__getitem__, max_shard_bytes=100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    found: dict[str, np.ndarray] = {}
    for i, path in enumerate(paths, start=1):
        assert path.name == f"model-{i:05d}-of-{len(paths):05d}.safetensors"
        held = safetensors.numpy.load_file(path)
        assert sum(array.nbytes for array in held.values()) <= 100 or list(held) == ["big"]
        assert all(index["weight_map"][name] == path.name for name in held)
        found |= held
    assert_same_bits(found, tensors)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())


def test_one_shard_is_one_file_without_an_index(tmp_path):
    specs = {"x": TensorSpec(np.dtype(np.float32), (4,))}
    write_sharded(tmp_path, "model", specs, lambda name: np.zeros(4, np.float32), max_shard_bytes=16)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
