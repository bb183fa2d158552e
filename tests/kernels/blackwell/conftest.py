"""Where the Blackwell kernels run here: on its GPU natively, on another GPU or under the interpreter emulated."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from nvfp4_runtime.kernels.blackwell.capability import CAPABILITIES, capability
from nvfp4_runtime.kernels.triton.backend import NO_DEVICE

NEEDS_TRITON = ("test_quantize.py", "test_few_tokens.py", "test_linear.py", "test_device.py", "test_fused.py")


class Place(NamedTuple):
    """emulated: without FP4 tensor cores; integer arithmetic and FP32 products in their place."""

    device: torch.device
    emulated: bool


def find_place() -> Place:
    if not torch.cuda.is_available():
        return Place(torch.device("cpu"), True)
    device = torch.device("cuda", torch.cuda.current_device())
    return Place(device, capability(device) not in CAPABILITIES)


@pytest.fixture(scope="session")
def place() -> Place:
    return find_place()


@pytest.fixture(scope="session")
def blackwell_place(place: Place) -> Place:
    """A GPU with FP4 tensor cores, or a skip."""
    if place.device.type != "cuda":
        pytest.skip(f"blackwell: {NO_DEVICE}")
    if place.emulated:
        pytest.skip("blackwell: this GPU has no FP4 tensor cores that we know")
    return place


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Modules that import kernels need the triton package; test_backend.py of tests/kernels/triton says so."""
    missing = importlib.util.find_spec("triton") is None
    return True if missing and collection_path.name in NEEDS_TRITON else None
