"""Activations quantised by the kernel have the codes and block scales of codec.quantize_activation, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.kernels.triton.backend import TritonBackend
from nvfp4_runtime.kernels.triton.quantize_activation import ActivationQuantizer, ExpertQuantizer
from nvfp4_runtime.nvfp4 import codec
from tests.kernels.conftest import random_tensor, same_bits


def hostile(dtype: torch.dtype) -> Tensor:
    """Rows of ties, tiny and huge blocks, zeros of both signs, infinity, NaN; K is an odd number of blocks."""
    x = random_tensor(12, 80, seed=1, dtype=torch.float32)
    x *= torch.exp(4 * random_tensor(12, 1, seed=2, dtype=torch.float32))
    x[1] = torch.tensor(
        [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, -6]
    ).repeat(5)
    x[2], x[3], x[4] = 0.0, -0.0, x[4] * 1e-30
    x[5] *= 1e30
    x[6, 3], x[7, 20], x[8, 64] = float("inf"), float("-inf"), float("nan")
    x[9] = x[9] * 1e-6
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("input_scale", [1.0, 0.0017, 1 / 2688, 3e-7])
def test_codes_and_scales_are_the_definition_s(
    triton_backend: TritonBackend, dtype: torch.dtype, input_scale: float
) -> None:
    x = hostile(dtype)
    codes, scales = ActivationQuantizer(input_scale, 80, triton_backend.device).codes(x.to(triton_backend.device))
    expected_codes, expected_scales = codec.quantize_activation(x, torch.tensor(input_scale))
    assert same_bits(scales.cpu(), expected_scales)
    spoilt = expected_scales.float().isnan().repeat_interleave(16, dim=1)  # codes under a NaN scale mean nothing
    assert torch.equal(codec.unpack_codes(codes.cpu())[~spoilt], expected_codes[~spoilt])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_operand_is_code_times_scale(triton_backend: TritonBackend, dtype: torch.dtype) -> None:
    x = hostile(dtype)
    found = ActivationQuantizer(0.0017, 80, triton_backend.device).operand(x.to(triton_backend.device)).cpu()
    expected = codec.activation_operand(x, torch.tensor(0.0017))
    assert found.dtype == dtype
    assert torch.equal(found.isnan(), expected.isnan())
    assert same_bits(found.float().nan_to_num(), expected.float().nan_to_num())


def test_each_expert_s_rows_meet_its_own_scale(triton_backend: TritonBackend) -> None:
    x, offsets = random_tensor(40, 48, seed=3), torch.tensor([0, 0, 17, 18, 40, 40], dtype=torch.int32)
    scales = [0.001, 0.002, 0.01, 0.0003, 0.7]
    quantizer = ExpertQuantizer(scales, 48, triton_backend.device)
    found = quantizer.operand(x.to(triton_backend.device), offsets.to(triton_backend.device)).cpu()
    for scale, start, stop in zip(scales, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        assert same_bits(found[start:stop], codec.activation_operand(x[start:stop], torch.tensor(scale)))
