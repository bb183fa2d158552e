"""relu(x)^2, the activation of a feed-forward without a gate."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.compilation import Compilation
from nvfp4_runtime.kernels.ops import ReluSquaredSpec
from nvfp4_runtime.kernels.triton.common import emulated, round_to

_BLOCK = 1024  # values of a program


@triton.jit(do_not_specialize=["count"])
def relu_squared_kernel(x, out, count, BLOCK: tl.constexpr, EMULATED: tl.constexpr):
    """Program i does values i * BLOCK .. of `count`; the square is rounded to x's type, then to out's."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
    value = tl.where(value < 0.0, 0.0, value)  # a NaN passes
    square = round_to(value * value, x.dtype.element_ty, EMULATED).to(tl.float32)
    tl.store(out + at, round_to(square, out.dtype.element_ty, EMULATED), mask=at < count)


class TritonReluSquared:
    """See `ReluSquaredSpec`."""

    def __init__(self, spec: ReluSquaredSpec) -> None:
        self.width = spec.width
        self.out_dtype: torch.dtype = getattr(torch, spec.out_dtype)

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[1:] != (self.width,) or not x.is_contiguous():
            raise KernelError(f"x is {list(x.shape)}, expected contiguous rows of {self.width}")
        out = torch.empty(x.shape, dtype=self.out_dtype, device=x.device)
        if (count := x.numel()) > 0:
            relu_squared_kernel[(triton.cdiv(count, _BLOCK),)](
                x, out, count, BLOCK=_BLOCK, EMULATED=emulated(), num_warps=4
            )
        return out


def compilations() -> list[Compilation]:
    return [
        Compilation(
            name="relu_squared",
            kernel=relu_squared_kernel,
            signature={"x": "*bf16", "out": "*bf16", "count": "i32"},
            constexprs={"BLOCK": _BLOCK, "EMULATED": False},
            unaligned=("count",),
        )
    ]
