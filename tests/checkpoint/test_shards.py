"""Safetensors on disk: what is read, and that every way a file can lie gets its own clear error."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nvfp4_runtime.checkpoint.shards import INDEX, Shards, load_json, read_header
from nvfp4_runtime.errors import CheckpointError, MissingTensorError, TensorShapeError
from tests import tiny

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4, dtype=torch.uint8), "c": torch.tensor(2.5)}


def write_raw(path: Path, header: Any, data: bytes, length: int | None = None) -> Path:
    """A safetensors file with any header at all."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_read_back_exactly_from_one_file_or_several(tmp_path, shards):
    tiny.save_shards(tmp_path, TENSORS, shards)
    files = Shards(tmp_path)
    assert {info.name for info in files} == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(files.read(name, tuple(tensor.shape), ("F32", "U8")), tensor)
    assert files.used == set(TENSORS)
    assert files.notes == []


def test_reading_one_tensor_uses_no_other(tmp_path):
    tiny.save_shards(tmp_path, TENSORS)
    files = Shards(tmp_path)
    files.read("a")
    assert files.used == {"a"}


def test_a_tensor_outlives_the_file_handles(tmp_path):
    tiny.save_shards(tmp_path, TENSORS)
    files = Shards(tmp_path)
    tensor = files.read("a")
    files.close()
    assert torch.equal(tensor, TENSORS["a"])
    assert files.read_scalar("c") == 2.5  # opens again


def test_missing_names_and_wrong_shapes_or_dtypes_say_what_was_expected(tmp_path):
    tiny.save_shards(tmp_path, TENSORS)
    files = Shards(tmp_path)
    with pytest.raises(MissingTensorError, match=r"'z' is missing from .*model\.safetensors"):
        files.read("z")
    with pytest.raises(TensorShapeError, match=r"'a' in model.safetensors: expected .* \[3, 2\], found F32 \[2, 3\]"):
        files.read("a", (3, 2))
    with pytest.raises(TensorShapeError, match=r"expected BF16 or F16 or F32, found U8 \[4\]"):
        files.read("b")
    with pytest.raises(TensorShapeError, match=r"expected one value, \[\] or \[1\], found F32 \[2, 3\]"):
        files.read_scalar("a")


@pytest.mark.parametrize("keep", [0, 7, 8, 40, -1, -20])
def test_a_truncated_shard_is_refused_naming_the_file(tmp_path, keep):
    tiny.save_shards(tmp_path, TENSORS)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*(truncated|not valid JSON)"):
        Shards(tmp_path)


HEADERS = {
    "header longer than the file": ({}, b"", 1 << 40, "announce a header"),
    "header is no JSON": (b"{not json", b"", None, "not valid JSON"),
    "header is a list": ([1], b"", None, "JSON list"),
    "deeply nested header": (b"[" * 200_000, b"", None, "not valid JSON"),
    "entry is no object": ({"a": 3}, b"", None, "no object"),
    "unknown dtype": ({"a": entry("F8_MAGIC", [4], 0, 4)}, b"abcd", None, "'F8_MAGIC'"),
    "dtype is no text": ({"a": entry(["F32"], [1], 0, 4)}, b"abcd", None, "dtype"),
    "negative size": ({"a": entry("U8", [-4], 0, 4)}, b"abcd", None, r"\[-4\]"),
    "size is no integer": ({"a": entry("U8", [4.0], 0, 4)}, b"abcd", None, r"\[4.0\]"),
    "bytes do not fit the shape": ({"a": entry("F32", [4], 0, 4)}, b"abcd", None, "needs 16"),
    "huge shape": ({"a": entry("F32", [1 << 40, 1 << 40], 0, 4)}, b"abcd", None, "needs"),
    "beyond the file": ({"a": entry("U8", [8], 0, 8)}, b"abcd", None, "truncated"),
    "tensors overlap": ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, b"abcdef", None, "expected 4"),
    "a gap between tensors": ({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 3, 5)}, b"abcde", None, "expected 2"),
    "bytes nobody describes": ({"a": entry("U8", [2], 0, 2)}, b"abcdef", None, "longer than it says"),
    "offsets reversed": ({"a": entry("U8", [2], 2, 0)}, b"ab", None, "-2 bytes"),
    "offsets missing": ({"a": {"dtype": "U8", "shape": [2]}}, b"ab", None, "data_offsets None"),
    "a name twice": (
        b'{"a": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}, "a": {"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
        b"ab",
        None,
        "appears twice",
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_lying_header_is_refused_naming_file_and_contradiction(tmp_path, case):
    header, data, length, message = HEADERS[case]
    path = write_raw(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(CheckpointError, match=message) as raised:
        read_header(path)
    assert "model.safetensors" in str(raised.value)


def test_empty_tensors_and_metadata_are_fine(tmp_path):
    header = {"__metadata__": {"format": "pt"}, "e": entry("F32", [0, 3], 0, 0), "a": entry("U8", [2], 0, 2)}
    infos = read_header(write_raw(tmp_path / "model.safetensors", header, b"ab"))
    assert [(i.name, i.shape) for i in infos] == [("e", (0, 3)), ("a", (2,))]


def test_an_index_naming_missing_shards_is_refused_naming_them(tmp_path):
    tiny.save_shards(tmp_path, TENSORS, 3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 shard\(s\) that do not exist: model-00002-of-00003"):
        Shards(tmp_path)


def test_an_index_placing_a_tensor_where_it_is_not_is_refused(tmp_path):
    tiny.save_shards(tmp_path, TENSORS, 3)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00003.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(MissingTensorError, match=r"'ghost' is missing from model-00001-of-00003.* no shard has it"):
        Shards(tmp_path)


def test_a_tensor_in_two_shards_is_refused_naming_both(tmp_path):
    tiny.save_shards(tmp_path, TENSORS, 2)
    first = tmp_path / "model-00001-of-00002.safetensors"
    save_file({"a": torch.zeros(1), "b": TENSORS["b"]}, tmp_path / "model-00002-of-00002.safetensors")
    assert first.exists()
    with pytest.raises(CheckpointError, match=r"'a' is in both model-00001-of-00002.* and model-00002-of-00002"):
        Shards(tmp_path)


def test_a_tensor_the_index_forgot_is_noted_and_still_read(tmp_path):
    tiny.save_shards(tmp_path, TENSORS, 2)
    index = json.loads((tmp_path / INDEX).read_text())
    del index["weight_map"]["c"]  # lies beside "a"
    (tmp_path / INDEX).write_text(json.dumps(index))
    files = Shards(tmp_path)
    assert "c" in files
    assert "'c'" in files.notes[0]


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin"])
def test_an_index_cannot_point_outside_the_folder_or_at_other_files(tmp_path, file):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match="of the same folder"):
        Shards(tmp_path)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": "x"}'])
def test_an_index_without_a_usable_map_is_refused(tmp_path, index):
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=INDEX):
        Shards(tmp_path)


def test_a_folder_with_only_pickles_is_refused_and_the_pickle_never_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin: pickled weights run code"):
        Shards(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_a_folder_without_weights_or_with_several_and_no_index_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no \.safetensors file"):
        Shards(tmp_path)
    for name in ("x", "y"):
        save_file(TENSORS, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"2 \.safetensors files and no"):
        Shards(tmp_path)


def test_a_single_file_beside_an_index_that_ignores_it_is_refused(tmp_path):
    tiny.save_shards(tmp_path, TENSORS, 2)
    tiny.save_shards(tmp_path, TENSORS, 1)
    with pytest.raises(CheckpointError, match=r"has both model\.safetensors and"):
        Shards(tmp_path)


def test_json_that_is_no_object_or_repeats_a_key_is_refused(tmp_path):
    path = tmp_path / "config.json"
    for text, message in (("[1]", "JSON list"), ('{"a": 1, "a": 2}', "appears twice"), ("{", "not valid JSON")):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load_json(path)
    path.write_bytes(b"\xff\xfe{}\x00")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_json(path)
