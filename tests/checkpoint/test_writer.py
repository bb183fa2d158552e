"""Streaming shards to disk, and folders that appear whole or not at all."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from nvfp4_runtime.checkpoint.shards import DTYPES, Shards
from nvfp4_runtime.checkpoint.writer import ShardWriter, TensorSpec, new_folder, temporary_prefix
from nvfp4_runtime.errors import ConfigError

TENSORS = {
    "bytes": torch.arange(7, dtype=torch.uint8),
    "scalar": torch.tensor(1.5),
    "matrix": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
    "scales": torch.arange(6, dtype=torch.uint8).reshape(2, 3).view(torch.float8_e4m3fn),
    "empty": torch.zeros(0, 4),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SPECS = [TensorSpec(name, NAMES[t.dtype], tuple(t.shape)) for name, t in TENSORS.items()]


@pytest.mark.parametrize("max_bytes", [1, 20, 10_000])
def test_what_is_written_in_any_order_reads_back_exactly(tmp_path, max_bytes):
    with ShardWriter(tmp_path, SPECS, max_bytes) as writer:
        for name in reversed(TENSORS):
            writer.write(name, TENSORS[name])
    shards = Shards(tmp_path)
    assert shards.notes == []
    for name, tensor in TENSORS.items():
        found = shards.read(name, tuple(tensor.shape), (NAMES[tensor.dtype],))
        assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == {1: 5, 20: 3, 10_000: 1}[max_bytes]
    for file in files:
        load_file(file)  # the safetensors library agrees with our header


def test_a_tensor_other_than_announced_or_never_written_is_our_bug(tmp_path):
    with pytest.raises(AssertionError, match="announced"), ShardWriter(tmp_path, SPECS) as writer:
        writer.write("scalar", torch.zeros(2))
    with pytest.raises(AssertionError, match="never written"), ShardWriter(tmp_path, SPECS):
        pass


def test_a_folder_appears_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with new_folder(out) as folder:
        (folder / "file").write_text("x")
        assert not out.exists()
        assert folder.name.startswith(temporary_prefix(out))
    assert (out / "file").read_text() == "x"
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_a_folder_that_fails_half_way_leaves_nothing(tmp_path):
    def interrupted() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_may_be_filled_but_nothing_is_overwritten(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with new_folder(out) as folder:
        (folder / "file").write_text("x")
    with pytest.raises(ConfigError, match="is not an empty folder"), new_folder(out):
        pass
    assert (out / "file").read_text() == "x"
