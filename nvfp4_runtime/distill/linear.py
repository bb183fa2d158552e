"""A linear layer that computes as the serving reference does and learns straight through the rounding."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from nvfp4_runtime.distill.compilation import compiled
from nvfp4_runtime.distill.fake_quant import activation_operand


class Site:
    """The one input of q/k/v, or of gate/up: rounded once, used by every linear that reads it.

    input_scale  fp32 [], frozen; None: activations are not quantised (W4A16)
    """

    def __init__(self, input_scale: Tensor | None, readers: int) -> None:
        self.input_scale = input_scale
        self.readers = readers
        self._seen: weakref.ref[Tensor] | None = None
        self._operand: Tensor | None = None
        self._left = 0

    def operand(self, x: Tensor) -> Tensor:
        """`x` as the GEMM takes it, in x's dtype."""
        if self.input_scale is None:
            return x
        if self._operand is None or self._seen is None or self._seen() is not x:
            self._operand = compiled(activation_operand)(x.detach(), self.input_scale).to(x.dtype)
            self._seen = weakref.ref(x)
            self._left = self.readers
        operand = self._operand
        self._left -= 1
        if self._left == 0:
            self._operand = None
        return operand


class FakeQuantLinear(nn.Module):
    """y = x W^T + b with NVFP4 weights, and NVFP4 activations where its site has an input_scale.

    weight   [N, K] in the working dtype: code * block scale, exact in bfloat16. Its gradient is that of the
             dequantised weight: the rounding is passed straight through, and so is that of the activations
    scale_2  the frozen tensor scale
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, operand: Tensor, bias: Tensor | None, scale_2: float, site: Site) -> None:
        super().__init__()
        self.weight = nn.Parameter(operand, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.scale_2 = scale_2
        self.site = site
        self.out_features, self.in_features = operand.shape

    def forward(self, x: Tensor) -> Tensor:
        input_scale = 1.0 if self.site.input_scale is None else float(self.site.input_scale)
        operand = self.site.operand(x)
        apply: Callable[..., Tensor] = _StraightThrough.apply  # torch leaves it untyped
        y = apply(x, operand, self.weight, input_scale, self.scale_2)
        return y if self.bias is None else y + self.bias


class _StraightThrough(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, operand: Tensor, weight: Tensor, input_scale: float, scale_2: float) -> Tensor:
        ctx.save_for_backward(operand, weight)
        ctx.input_scale, ctx.scale_2 = input_scale, scale_2
        rows = operand.reshape(-1, operand.shape[-1])
        y = _times(rows, weight.t(), _product(input_scale, scale_2))
        return y.reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        operand, weight = ctx.saved_tensors
        dy = grads[0].reshape(-1, weight.shape[0])
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = _times(dy, weight, ctx.scale_2).reshape(operand.shape)
        if ctx.needs_input_grad[2]:
            dw = _times(dy.t(), operand.reshape(-1, operand.shape[-1]), ctx.input_scale)
        return dx, None, dw, None, None


def _product(input_scale: float, scale_2: float) -> float:
    """The reference multiplies the two scales in float32."""
    return float(torch.tensor(input_scale, dtype=torch.float32) * torch.tensor(scale_2, dtype=torch.float32))


def _times(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """alpha * a b: the multiplier meets the FP32 sum before its one rounding, as in the reference."""
    return torch.addmm(torch.zeros((), dtype=a.dtype, device=a.device), a, b, beta=0, alpha=alpha)
