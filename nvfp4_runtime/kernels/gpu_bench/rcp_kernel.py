"""`rcp.approx.ftz.f32` over a tensor, as a Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp4_runtime.kernels.compilation import Compilation


@triton.jit
def rcp_kernel(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """out[i] = rcp.approx.ftz(x[i]), float32."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count, other=1.0)
    y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(out_ptr + at, y, mask=at < count)


def reciprocal(x: Tensor) -> Tensor:
    """float32 on a GPU -> float32."""
    out = torch.empty_like(x)
    rcp_kernel[(triton.cdiv(x.numel(), 1024),)](x, out, x.numel(), BLOCK=1024)
    return out


def compilations() -> list[Compilation]:
    """What is compiled without a GPU."""
    signature = {"x_ptr": "*fp32", "out_ptr": "*fp32", "count": "i32"}
    expect = ("rcp.approx.ftz.f32",)
    return [Compilation("rcp", rcp_kernel, signature, {"BLOCK": 1024}, expect=expect, targets=(80, 90, 100, 120))]
