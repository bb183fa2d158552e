"""The activation of a gated feed-forward, and optionally NVFP4 quantisation of what it gives."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.compilation import Compilation
from nvfp4_runtime.kernels.ops import ActivationSpec
from nvfp4_runtime.kernels.triton.common import emulated, round_to
from nvfp4_runtime.kernels.triton.quantized_rows import QuantizedRows, allocate_rows, store_quantized, zero_padding

_BLOCK = 1024  # columns of a program: a multiple of 64, see store_quantized, zero_padding
_GATES = {"silu": 0, "gelu_tanh": 1, "clamped": 2}


@triton.jit(do_not_specialize=["rows"])
def silu_mul_kernel(
    gate_up,
    out,
    scales,
    input_scale,
    rows,
    alpha,
    limit,
    GATE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    QUANTIZE: tl.constexpr,
    SWIZZLED: tl.constexpr,
    ROUND_BF16: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Program (t, b) does columns b * BLOCK .. of row t; see rms_norm_kernel for QUANTIZE and the rest.

    GATE  0 silu, 1 gelu_tanh, 2 clamped; see config.Gate
    """
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    if SWIZZLED:  # noqa: SIM102 - the compiler's condition, apart from the device's
        if row >= rows:
            zero_padding(scales, row, start, WIDTH, BLOCK)
            return
    cols = start + tl.arange(0, BLOCK)
    mask = cols < WIDTH
    gate = tl.load(gate_up + row * (2 * WIDTH) + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * WIDTH) + WIDTH + cols, mask=mask, other=0.0).to(tl.float32)
    z = gate
    if GATE == 1:
        z = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    elif GATE == 2:
        gate = tl.where(gate > limit, limit, gate)  # a NaN passes
        z = alpha * gate
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up)) + 1.0
    y = gate / (1.0 + tl.exp(-z)) * up
    if QUANTIZE:
        if ROUND_BF16:
            y = round_to(y, tl.bfloat16, EMULATED).to(tl.float32)
        store_quantized(y, out, scales, input_scale, row, start, WIDTH, BLOCK, SWIZZLED)
    else:
        tl.store(out + row * WIDTH + cols, round_to(y, out.dtype.element_ty, EMULATED), mask=mask)


class TritonSiluMul:
    """See `ActivationSpec`. A row's result depends on that row alone."""

    def __init__(self, spec: ActivationSpec) -> None:
        self.width, self.gate = spec.width, spec.gate
        self.out_dtype: torch.dtype = getattr(torch, spec.out_dtype)
        self._block = min(_BLOCK, max(64, triton.next_power_of_2(spec.width)))

    def __call__(self, gate_up: Tensor) -> Tensor:
        self._check(gate_up)
        out = torch.empty((gate_up.shape[0], self.width), dtype=self.out_dtype, device=gate_up.device)
        self._launch(gate_up, out, None, None)
        return out

    def quantize(self, gate_up: Tensor, input_scale: Tensor, swizzled: bool) -> QuantizedRows:
        """The result as codec.quantize_activation gives it; arguments as in TritonRMSNorm.quantize.

        Raises NVFP4ShapeError where the width is no multiple of 16.
        """
        self._check(gate_up)
        rows = allocate_rows(gate_up.shape[0], self.width, swizzled, gate_up.device)
        self._launch(gate_up, rows.packed, rows, input_scale)
        return rows

    def _check(self, gate_up: Tensor) -> None:
        if gate_up.shape[1:] != (2 * self.width,) or not gate_up.is_contiguous():
            raise KernelError(
                f"gate_up is {list(gate_up.shape)}, expected contiguous rows of {2 * self.width}: {self.width} gates, "
                "then as many ups"
            )

    def _launch(self, gate_up: Tensor, out: Tensor, rows: QuantizedRows | None, input_scale: Tensor | None) -> None:
        num_rows = gate_up.shape[0]
        if num_rows == 0:
            return
        grid = (num_rows if rows is None else rows.num_programs, triton.cdiv(self.width, self._block))
        silu_mul_kernel[grid](
            gate_up,
            out,
            out if rows is None else rows.scales.view(torch.uint8),
            gate_up if input_scale is None else input_scale,
            num_rows,
            self.gate.alpha,
            self.gate.limit,
            GATE=_GATES[self.gate.form],
            WIDTH=self.width,
            BLOCK=self._block,
            QUANTIZE=rows is not None,
            SWIZZLED=rows is not None and rows.swizzled,
            ROUND_BF16=self.out_dtype == torch.bfloat16,
            EMULATED=emulated(),
            num_warps=max(1, self._block // 256),
        )


def compilations() -> list[Compilation]:
    signature = {"gate_up": "*bf16", "input_scale": "*fp32", "rows": "i32", "alpha": "fp32", "limit": "fp32"}
    return [
        Compilation(
            name=name,
            kernel=silu_mul_kernel,
            signature=signature | dict.fromkeys(("out", "scales"), "*u8" if quantize else "*bf16"),
            constexprs={
                "GATE": 0,
                "WIDTH": 14336,
                "BLOCK": _BLOCK,
                "QUANTIZE": quantize,
                "SWIZZLED": quantize,
                "ROUND_BF16": True,
                "EMULATED": False,
            },
            num_warps=_BLOCK // 256,
            expect=("MUFU.EX2",),
            unaligned=("rows",),
        )
        for name, quantize in (("silu_mul", False), ("quantize", True))
    ]
