"""RMSNorm with the residual sum fused in front, and optionally NVFP4 quantisation of what it gives behind."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.compilation import Compilation
from nvfp4_runtime.kernels.ops import NormSpec
from nvfp4_runtime.kernels.triton.common import emulated, round_to
from nvfp4_runtime.kernels.triton.quantized_rows import QuantizedRows, allocate_rows, store_quantized, zero_padding


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    scales,
    input_scale,
    rows,
    eps,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    QUANTIZE: tl.constexpr,
    SWIZZLED: tl.constexpr,
    ROUND_BF16: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Program t norms row t. The sum overwrites the residual.

    QUANTIZE: `out` takes packed codes and `scales` their block scales, of the row as it would have been stored
    (ROUND_BF16: in bfloat16). Programs past the last row zero the padding of the swizzled scales.
    """
    row = tl.program_id(0).to(tl.int64)
    if SWIZZLED:  # noqa: SIM102 - the compiler's condition, apart from the device's
        if row >= rows:
            zero_padding(scales, row, 0, H, BLOCK)
            return
    cols = tl.arange(0, BLOCK)
    mask = cols < H
    v = tl.load(x + row * H + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        v += tl.load(residual + row * H + cols, mask=mask, other=0.0).to(tl.float32)
        total = round_to(v, residual.dtype.element_ty, EMULATED)
        tl.store(residual + row * H + cols, total, mask=mask)
        v = total.to(tl.float32)
    w = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(v * v, axis=0) / H
    y = v * (tl.rsqrt(mean + eps)) * w
    if QUANTIZE:
        if ROUND_BF16:
            y = round_to(y, tl.bfloat16, EMULATED).to(tl.float32)
        store_quantized(y, out, scales, input_scale, row, 0, H, BLOCK, SWIZZLED)
    else:
        tl.store(out + row * H + cols, round_to(y, out.dtype.element_ty, EMULATED), mask=mask)


class TritonRMSNorm:
    """See `RMSNormKernel`. The sum is written over the residual; a row's result depends on that row alone."""

    def __init__(self, spec: NormSpec) -> None:
        self.hidden = spec.hidden
        self.out_dtype: torch.dtype = getattr(torch, spec.out_dtype)
        self._block = max(64, triton.next_power_of_2(spec.hidden))  # 64: see store_quantized, zero_padding
        self._warps = warps_for(self._block)

    def __call__(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        self._check(x, residual)
        out = torch.empty(x.shape, dtype=self.out_dtype, device=x.device)
        self._launch(x, residual, weight, eps, out, None, None)
        return out, x if residual is None else residual

    def quantize(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, input_scale: Tensor, swizzled: bool
    ) -> tuple[QuantizedRows, Tensor]:
        """The norm's result as codec.quantize_activation gives it, without its 16-bit form touching memory.

        input_scale  fp32 []  on x's device
        swizzled     scales in the 128x4 layout of nvfp4/layouts.py, zero in the padding; else row-major
        returns      the quantised rows, and the sum to carry on

        Raises NVFP4ShapeError where the hidden size is no multiple of 16.
        """
        self._check(x, residual)
        rows = allocate_rows(x.shape[0], self.hidden, swizzled, x.device)
        self._launch(x, residual, weight, eps, rows.packed, rows, input_scale)
        return rows, x if residual is None else residual

    def _check(self, x: Tensor, residual: Tensor | None) -> None:
        for name, tensor in (("x", x), ("residual", residual)):
            if tensor is not None and not (tensor.shape[1:] == (self.hidden,) and tensor.is_contiguous()):
                raise KernelError(
                    f"{name} is {list(tensor.shape)}, expected contiguous rows of {self.hidden} (the hidden size)"
                )

    def _launch(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        out: Tensor,
        rows: QuantizedRows | None,
        input_scale: Tensor | None,
    ) -> None:
        num_rows = x.shape[0]
        if num_rows == 0:
            return
        rms_norm_kernel[(num_rows if rows is None else rows.num_programs,)](
            x,
            x if residual is None else residual,
            weight,
            out,
            out if rows is None else rows.scales.view(torch.uint8),
            weight if input_scale is None else input_scale,
            num_rows,
            eps,
            H=self.hidden,
            BLOCK=self._block,
            HAS_RESIDUAL=residual is not None,
            QUANTIZE=rows is not None,
            SWIZZLED=rows is not None and rows.swizzled,
            ROUND_BF16=self.out_dtype == torch.bfloat16,
            EMULATED=emulated(),
            num_warps=self._warps,
        )


def warps_for(block: int) -> int:
    """At least 16 values a thread, between one warp and sixteen: a program holds a whole row in registers."""
    return max(1, min(16, block // 512))


def compilations() -> list[Compilation]:
    signature = dict.fromkeys(("x", "residual", "weight"), "*bf16") | {"rows": "i32", "eps": "fp32"}
    return [
        Compilation(
            name=name,
            kernel=rms_norm_kernel,
            signature=signature
            | ({"out": "*u8", "scales": "*u8"} if quantize else {"out": "*bf16", "scales": "*bf16"})
            | {"input_scale": "*fp32"},
            constexprs={
                "H": hidden,
                "BLOCK": triton.next_power_of_2(hidden),
                "HAS_RESIDUAL": True,
                "QUANTIZE": quantize,
                "SWIZZLED": quantize,
                "ROUND_BF16": True,
                "EMULATED": False,
            },
            num_warps=warps_for(triton.next_power_of_2(hidden)),
            expect=("MUFU.RSQ",),
            unaligned=("rows",),
        )
        for name, hidden, quantize in (
            ("norm_4096", 4096, False),
            ("norm_576", 576, False),
            ("quantize_8192", 8192, True),
        )
    ]
