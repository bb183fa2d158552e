"""Pages of mapped files are given back, and their contents stay readable."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.checkpoint.pages import release_pages
from tests.tiny import tiny_llama

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="maps are released on Linux only")


def resident_bytes(file: Path) -> int:
    """Bytes of this process's maps of `file` that are in memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(file.resolve()))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_what_was_read_is_no_longer_resident_and_reads_the_same_again(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    values = torch.arange(1 << 20, dtype=torch.float32)
    save_file({"a": values}, file)
    with safe_open(file, framework="pt") as handle:
        mapped = handle.get_tensor("a")
    assert torch.equal(mapped, values)
    assert resident_bytes(file) >= values.nbytes // 2
    assert release_pages([file]) >= values.nbytes
    assert resident_bytes(file) == 0
    assert torch.equal(mapped, values)


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    assert release_pages([tmp_path / "absent.safetensors"]) == 0


def test_a_loaded_checkpoint_gives_its_pages_back(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(tiny_llama(tmp_path)))
    mapped = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    before = {name: tensor.clone() for name, tensor in mapped.items()}
    checkpoint.finish()
    assert resident_bytes(tmp_path / "model.safetensors") == 0
    assert all(torch.equal(mapped[name], tensor) for name, tensor in before.items())
