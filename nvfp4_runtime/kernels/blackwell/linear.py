"""One W4A4 layer on FP4 tensor cores: its weight, swizzled and padded once at load, and which product runs for which M.

Up to `few_tokens.MAX_TOKENS` rows our own kernel multiplies, beyond that scaled_mm; the number of rows is known on the
host, so a captured graph holds one of the two.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from nvfp4_runtime.kernels.blackwell.scaled_mm import K_STEP, ROW_STEP, TILE_ROWS, Operand, multiply
from nvfp4_runtime.kernels.ops import LinearSpec, QuantizedRows
from nvfp4_runtime.kernels.transfer import to_device
from nvfp4_runtime.nvfp4.layouts import swizzle_scales
from nvfp4_runtime.nvfp4.weight import NVFP4Weight

Quantizer = Callable[[Tensor, Tensor | None], Operand]
Product = Callable[[Operand], Tensor]


def upload(weight: NVFP4Weight, device: torch.device) -> Operand:
    """The weight on `device`, rows padded to 16 and K to 32 with zeros, scales swizzled; without tensor_scale.

    Parts that lie apart are copied one by one, so that the host never joins them.
    """
    rows, k = _up(weight.n, ROW_STEP), _up(weight.k, K_STEP)
    codes = torch.zeros(rows, k // 2, dtype=torch.uint8, device=device)
    scales = torch.zeros(rows, k // 16, dtype=torch.uint8, device=device)
    row = 0
    for packed, block_scale in weight.parts:
        stop = row + packed.shape[0]
        codes[row:stop, : packed.shape[1]].copy_(to_device(packed, device))
        scales[row:stop, : block_scale.shape[1]].copy_(to_device(block_scale.view(torch.uint8), device))
        row = stop
    return Operand(codes, swizzle_scales(scales), None)


class LargeProduct:
    """y = x W^T by scaled_mm, for any number of rows.

    One call where the weight has one weight_scale_2. Fused parts with scales of their own are one call each where they
    begin at tiles of scales (128 rows); else the FP32 sums come out unscaled and are multiplied row by row.
    """

    def __init__(self, operand: Operand, weight: NVFP4Weight, multipliers: Tensor, out_dtype: torch.dtype) -> None:
        """multipliers  fp32 [N], of the FP32 sums"""
        self.n, self.out_dtype = weight.n, out_dtype
        device = operand.codes.device
        starts = list(accumulate(weight.group_rows, initial=0))
        bias = weight.bias
        exact_bias = bias is None or bias.dtype == out_dtype == torch.bfloat16
        self.parts: list[tuple[Operand, Tensor | None]] = []
        self.whole = operand
        if exact_bias and all(start % TILE_ROWS == 0 for start in starts[:-1]):
            for group, (start, stop) in enumerate(pairwise(starts)):
                end = operand.codes.shape[0] if stop == weight.n else stop  # the last takes the padding along
                scale_2 = weight.weight_scale_2[group].to(device, torch.float32)
                self.parts.append((operand.rows(start, end, scale_2), _padded(bias, start, stop, end, device)))
        self._multipliers = multipliers
        self._bias = None if bias is None else bias.to(device, torch.float32)

    @property
    def splits(self) -> bool:
        """Whether scales and bias are applied inside scaled_mm."""
        return bool(self.parts)

    def __call__(self, x: Operand) -> Tensor:
        """x [M, K] under its tensor_scale if `splits`, else without -> [M, n] contiguous."""
        if self.splits:
            found = [multiply(x, part, self.out_dtype, bias) for part, bias in self.parts]
            y = found[0] if len(found) == 1 else torch.cat(found, dim=1)
            return y[:, : self.n].contiguous()
        y = multiply(x, self.whole, torch.float32)[:, : self.n] * self._multipliers
        if self._bias is not None:
            y += self._bias
        return y.to(self.out_dtype)


class BlackwellLinear:
    """See `LinearKernel`.

    quantizer      x [M, K] and a tensor_scale -> its operand
    few            the product for up to `few_limit` rows, or None: scaled_mm takes those too
    weight_bytes   codes and scales as kept, padding included
    """

    def __init__(
        self,
        operand: Operand,
        weight: NVFP4Weight,
        spec: LinearSpec,
        quantizer: Quantizer,
        make_few: Callable[[Operand, Tensor, Tensor | None], Product] | None,
        few_limit: int,
    ) -> None:
        """make_few  (operand, multipliers [N], bias [N] in FP32) -> the product for few rows"""
        assert weight.input_scale is not None  # Kernels.linear refuses w4a4 without it
        device = operand.codes.device
        out_dtype: torch.dtype = getattr(torch, spec.out_dtype)
        self.n, self.out_dtype = weight.n, out_dtype
        self._input_scale = torch.tensor(weight.input_scale, dtype=torch.float32, device=device)
        multipliers = self._input_scale * weight.row_scale_2().to(device, torch.float32)
        self._large = LargeProduct(operand, weight, multipliers, out_dtype)
        bias = None if weight.bias is None else weight.bias.to(device, torch.float32)
        self._few = None if make_few is None else make_few(operand, multipliers, bias)
        self._few_limit, self._quantizer = few_limit, quantizer
        # rows that come quantised have no columns of padding
        self.quantized_input_scale = self._input_scale if weight.k % K_STEP == 0 else None
        self.weight_bytes = operand.codes.nbytes + operand.scales.nbytes + weight.weight_scale_2.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """x [M, K] contiguous -> [M, N]."""
        m = x.shape[0]
        if m == 0:
            return torch.empty(0, self.n, dtype=self.out_dtype, device=x.device)
        if self._few is not None and m <= self._few_limit:
            return self._few(self._quantizer(x, None))
        return self._large(self._quantizer(x, self._input_scale if self._large.splits else None))

    def multiply_quantized(self, rows: QuantizedRows) -> Tensor:
        """See `TakesQuantizedRows`: what __call__ gives for the rows before they were quantised."""
        assert rows.swizzled
        assert self.quantized_input_scale is not None
        m = rows.packed.shape[0]
        if m == 0:
            return torch.empty(0, self.n, dtype=self.out_dtype, device=rows.packed.device)
        scales = rows.scales.view(torch.uint8)
        if self._few is not None and m <= self._few_limit:
            return self._few(Operand(rows.packed, scales, None))
        return self._large(Operand(rows.packed, scales, self._input_scale if self._large.splits else None))


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def _padded(bias: Tensor | None, start: int, stop: int, end: int, device: torch.device) -> Tensor | None:
    if bias is None:
        return None
    found = torch.zeros(end - start, dtype=bias.dtype, device=device)
    found[: stop - start].copy_(bias[start:stop])
    return found
