"""Weights moved to a device keep everything they are; those that are there already are not copied."""

from __future__ import annotations

import pytest
import torch

from nvfp4_runtime.kernels.upload import upload
from nvfp4_runtime.nvfp4.fp8 import FP8Weight
from nvfp4_runtime.nvfp4.mx import MXFP4Weight
from nvfp4_runtime.nvfp4.weight import DenseWeight, JoinedNVFP4, NVFP4Weight, Weight, fuse
from tests.kernels.conftest import random_nvfp4, random_tensor

META, CPU = torch.device("meta"), torch.device("cpu")
WEIGHTS: dict[str, Weight] = {
    "nvfp4": random_nvfp4(32, 64, seed=1, bias=True, input_scale=0.1),
    "fp8": FP8Weight(torch.zeros(32, 64).to(torch.float8_e4m3fn), torch.ones(1, 1), (32, 64), input_scale=0.5),
    "dense": DenseWeight(random_tensor(32, 64, seed=2), random_tensor(32, seed=3)),
}


@pytest.mark.parametrize("form", WEIGHTS)
def test_every_tensor_moves_and_every_number_stays(form: str) -> None:
    weight = WEIGHTS[form]
    moved = upload(weight, META)
    assert type(moved) is type(weight)
    for name, value in vars(weight).items():
        found = getattr(moved, name)
        if isinstance(value, torch.Tensor):
            assert found.device == META, name
            assert (found.dtype, found.shape) == (value.dtype, value.shape), name
        else:
            assert found == value, name


def test_fused_parts_move_one_by_one_and_are_not_joined_on_the_way() -> None:
    fused = fuse([random_nvfp4(16, 64, seed=s, bias=True) for s in (1, 2)])
    moved = upload(fused, META)
    assert isinstance(moved, JoinedNVFP4)
    assert [packed.device for packed, _ in moved.parts] == [META, META]
    assert "packed" not in vars(fused), "the parts were joined in host memory"
    assert (moved.n, moved.k, moved.group_rows) == (32, 64, (16, 16))
    assert moved.weight_scale_2.device == META
    assert moved.bias is not None
    assert moved.bias.device == META


def test_what_is_there_already_is_not_copied() -> None:
    joined = fuse([random_nvfp4(16, 64, seed=s) for s in (1, 2)])
    mx = MXFP4Weight(torch.zeros(4, 16, dtype=torch.uint8), torch.zeros(4, 1, dtype=torch.uint8))
    for weight in (*WEIGHTS.values(), joined, mx):
        assert upload(weight, CPU) is weight


def test_an_uploaded_weight_means_the_same() -> None:
    fused = fuse([random_nvfp4(16, 64, seed=s) for s in (1, 2)])
    assert isinstance(fused, NVFP4Weight)
    copied = upload(upload(fused, CPU), CPU)
    assert torch.equal(copied.dequantize(), fused.dequantize())
