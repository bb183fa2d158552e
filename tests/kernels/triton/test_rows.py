"""RMSNorm, silu-mul and their fused NVFP4 quantisation, against the reference and the format's own functions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.config import Gate
from nvfp4_runtime.errors import KernelError, NVFP4ShapeError
from nvfp4_runtime.kernels.ops import ActivationSpec, NormSpec
from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
from nvfp4_runtime.kernels.triton.backend import TritonBackend
from nvfp4_runtime.kernels.triton.quantized_rows import QuantizedRows
from nvfp4_runtime.kernels.triton.rms_norm import TritonRMSNorm
from nvfp4_runtime.kernels.triton.silu_mul import TritonSiluMul
from nvfp4_runtime.nvfp4 import codec
from nvfp4_runtime.nvfp4.layouts import swizzle_scales
from tests.kernels.conftest import random_tensor, same_bits

REFERENCE = ReferenceBackend()
EPS = 1e-5
# float32: a few roundings, and sums in another order; bfloat16: half a step of 2^-8, plus the same
TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-8 + 2e-6}


def device_of(backend: TritonBackend, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(backend.device) for t in tensors]


@pytest.mark.parametrize(("rows", "hidden"), [(3, 48), (1, 576)])
@pytest.mark.parametrize(("dtype", "out"), [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("float32", "float32")])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm_is_the_reference_s(triton_backend, rows, hidden, dtype, out, with_residual):
    spec = NormSpec(hidden, dtype, out)
    x = random_tensor(rows, hidden, seed=1, dtype=getattr(torch, dtype)) * 3
    residual = random_tensor(rows, hidden, seed=2, dtype=getattr(torch, dtype)) if with_residual else None
    weight = random_tensor(hidden, seed=3)
    normed, total = REFERENCE.rms_norm(spec)(x, residual, weight, EPS)
    found, carried = triton_backend.rms_norm(spec)(*device_of(triton_backend, x, residual, weight), EPS)
    assert same_bits(carried.cpu(), total), "x + residual is one rounding, and no other"
    torch.testing.assert_close(found.cpu().float(), normed.float(), rtol=TOLERANCE[out], atol=1e-6)
    assert found.dtype == normed.dtype


def test_rms_norm_of_nan_and_of_nothing(triton_backend):
    x = random_tensor(3, 64, seed=1)
    x[1, 7] = torch.nan
    kernel = triton_backend.rms_norm(NormSpec(64, "bfloat16", "bfloat16"))
    found, _ = kernel(*device_of(triton_backend, x, None, random_tensor(64, seed=2)), EPS)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()
    empty, _ = kernel(*device_of(triton_backend, x[:0], None, random_tensor(64, seed=2)), EPS)
    assert empty.shape == (0, 64)
    with pytest.raises(KernelError, match="rows of 64"):
        kernel(*device_of(triton_backend, x[:, :48].contiguous(), None, random_tensor(64, seed=2)), EPS)


@pytest.mark.parametrize(("rows", "width"), [(3, 40), (1, 1100)])
@pytest.mark.parametrize(("dtype", "out"), [("bfloat16", "bfloat16"), ("float32", "float32")])
@pytest.mark.parametrize("gate", [Gate(), Gate("gelu_tanh"), Gate("clamped", 1.702, 7.0)], ids=lambda gate: gate.form)
def test_gates_are_the_reference_s(triton_backend, rows, width, dtype, out, gate):
    spec = ActivationSpec(width, dtype, out, gate)
    x = random_tensor(rows, 2 * width, seed=1, dtype=getattr(torch, dtype)) * 8
    x[0, :4] = torch.tensor([100.0, -100.0, -87.5, 0.0])
    expected, found = REFERENCE.silu_mul(spec)(x), triton_backend.silu_mul(spec)(*device_of(triton_backend, x))
    # Where 1 + tanh cancels, tanh's last bit, 2^-24, is all that is left: times the gate (6 at most where it is not 0)
    # times up (40 at most here).
    atol = 6 * 40 * 2**-24 if gate.form == "gelu_tanh" else 1e-6
    torch.testing.assert_close(found.cpu().float(), expected.float(), rtol=TOLERANCE[out], atol=atol)


def unpacked(rows: QuantizedRows) -> Tensor:
    return codec.unpack_codes(rows.packed.cpu())


@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(3, 48), (2, 1040)])
def test_silu_mul_quantize_is_the_codec_of_what_silu_mul_stores(triton_backend, swizzled, rows, width):
    x = random_tensor(rows, 2 * width, seed=rows) * 4
    x[0, :16] = 0  # a block of zeros
    scale = torch.tensor(0.01)
    stored = triton_backend.silu_mul(ActivationSpec(width, "bfloat16", "bfloat16"))(*device_of(triton_backend, x))
    codes, scales = codec.quantize_activation(stored.cpu(), scale)
    kernel = TritonSiluMul(ActivationSpec(width, "bfloat16", "bfloat16"))
    made = kernel.quantize(*device_of(triton_backend, x, scale), swizzled)
    assert torch.equal(unpacked(made), codes)
    assert same_bits(made.scales.cpu(), swizzle_scales(scales) if swizzled else scales)


@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("rows", "hidden"), [(1, 16), (3, 48)])
def test_rms_norm_quantize_is_the_codec_of_what_the_norm_stores(triton_backend, swizzled, with_residual, rows, hidden):
    x, weight = random_tensor(rows, hidden, seed=rows) * 4, random_tensor(hidden, seed=9)
    residual = random_tensor(rows, hidden, seed=7) if with_residual else None
    scale = torch.tensor(3e-4)  # saturates some block scales
    arguments = device_of(triton_backend, x, None if residual is None else residual.clone(), weight)
    stored, total = triton_backend.rms_norm(NormSpec(hidden, "bfloat16", "bfloat16"))(*arguments, EPS)
    codes, scales = codec.quantize_activation(stored.cpu(), scale)
    arguments = device_of(triton_backend, x, residual, weight)
    kernel = TritonRMSNorm(NormSpec(hidden, "bfloat16", "bfloat16"))
    made, carried = kernel.quantize(*arguments, EPS, scale.to(triton_backend.device), swizzled)
    assert torch.equal(unpacked(made), codes)
    assert same_bits(made.scales.cpu(), swizzle_scales(scales) if swizzled else scales)
    assert same_bits(carried.cpu(), total.cpu())


def test_a_nan_stays_in_its_block_s_scale(triton_backend):
    x = torch.ones(1, 64)
    x[0, 5] = torch.nan
    kernel = TritonSiluMul(ActivationSpec(32, "bfloat16", "bfloat16"))
    made = kernel.quantize(*device_of(triton_backend, x, torch.tensor(0.01)), False)
    assert made.scales.cpu().float().isnan().tolist() == [[True, False]]


def test_widths_that_are_no_whole_blocks_are_refused(triton_backend):
    kernel = TritonSiluMul(ActivationSpec(40, "bfloat16", "bfloat16"))
    with pytest.raises(NVFP4ShapeError, match="multiple of 16"):
        kernel.quantize(*device_of(triton_backend, torch.ones(1, 2 * 40), torch.tensor(0.01)), False)
