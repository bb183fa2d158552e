"""Feed-forwards: a gated one (fused gate and up, silu(gate) * up or another, down) and the plain one of relu(x)^2."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from nvfp4_runtime.batch import AdapterRows
from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.config import SILU, Gate
from nvfp4_runtime.kernels.ops import QuantizedRows, QuantizingActivation
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.kernels.whole_ops import FeedForwardOps
from nvfp4_runtime.layers.linear import Linear


class MLP:
    """One layer's feed-forward, `prefix` being e.g. "model.layers.3.mlp".

    fused  the files hold gate and up as one matrix
    """

    def __init__(
        self,
        ckpt: Checkpoint,
        kernels: Kernels,
        hidden: int,
        inner: int,
        prefix: str,
        *,
        bias: bool = False,
        fused: bool = False,
        gate: Gate = SILU,
    ) -> None:
        self.gate_up_proj = Linear.fused(
            ckpt,
            kernels,
            "gate_up_proj",
            [f"{prefix}.gate_up_proj"] if fused else [f"{prefix}.gate_proj", f"{prefix}.up_proj"],
            [2 * inner] if fused else [inner, inner],
            hidden,
            bias=bias,
        )
        self.down_proj = Linear.single(ckpt, kernels, f"{prefix}.down_proj", hidden, inner, bias=bias)
        self.silu_mul = kernels.silu_mul(inner, gate)
        self._quantizes: QuantizingActivation | None = None
        self._quantized_under: Tensor | None = None
        taker, kernel = self.down_proj.takes_quantized, cast(object, self.silu_mul)
        if taker is not None and isinstance(kernel, QuantizingActivation):
            self._quantizes, self._quantized_under = kernel, taker.quantized_input_scale
            kernels.record_fusion("silu_mul", "down_proj")

    def __call__(self, x: Tensor | QuantizedRows, adapters: AdapterRows | None = None) -> Tensor:
        """x [T, hidden] -> [T, hidden]."""
        gate_up = self.gate_up_proj(x, adapters)
        if self._quantizes is not None and self._quantized_under is not None:
            return self.down_proj(self._quantizes.quantize(gate_up, self._quantized_under, True))
        return self.down_proj(self.silu_mul(gate_up), adapters)

    def ops(self) -> FeedForwardOps:
        """The same for a backend that runs a decoder as one call."""
        return FeedForwardOps(self.gate_up_proj.only_kernel, self.silu_mul, self.down_proj.only_kernel)


class PlainMLP:
    """down(relu(up(x))^2), `prefix` being e.g. "backbone.layers.3.mixer"."""

    def __init__(self, ckpt: Checkpoint, kernels: Kernels, hidden: int, inner: int, prefix: str) -> None:
        self.up_proj = Linear.single(ckpt, kernels, f"{prefix}.up_proj", inner, hidden)
        self.down_proj = Linear.single(ckpt, kernels, f"{prefix}.down_proj", hidden, inner)
        self.relu_squared = kernels.relu_squared(inner)

    def __call__(self, x: Tensor, adapters: AdapterRows | None = None) -> Tensor:
        """x [T, hidden] -> [T, hidden]."""
        return self.down_proj(self.relu_squared(self.up_proj(x, adapters)), adapters)

    def ops(self) -> FeedForwardOps:
        """The same for a backend that runs a decoder as one call."""
        return FeedForwardOps(self.up_proj.only_kernel, self.relu_squared, self.down_proj.only_kernel)
