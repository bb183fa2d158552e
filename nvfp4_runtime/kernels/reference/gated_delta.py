"""The gated delta rule behind its convolution, token by token, one sequence at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, StateLayer
from nvfp4_runtime.kernels.ops import DeltaSpec, DeltaWeights


class ReferenceDelta:
    """See `DeltaKernel`."""

    def __init__(self, spec: DeltaSpec) -> None:
        self.spec = spec

    def __call__(
        self, qkv: Tensor, b: Tensor, dt: Tensor, weights: DeltaWeights, state: StateLayer, batch: ForwardBatch
    ) -> Tensor:
        assert batch.state_slots is not None
        qkv, beta = qkv.to(torch.float32), b.to(torch.float32).sigmoid()
        decay = torch.exp(torch.nn.functional.softplus(dt.to(torch.float32) + weights.dt_bias) * weights.a)
        out = torch.empty(qkv.shape[0], self.spec.values, dtype=torch.float32, device=qkv.device)
        bounds = batch.cu_seqlens_q.tolist()
        for slot, start, stop in zip(batch.state_slots.tolist(), bounds[:-1], bounds[1:], strict=True):
            conv, memory = state.conv[slot], state.ssm[slot]
            if int(batch.positions[start]) == 0:
                conv.zero_()
                memory.zero_()
            for t in range(start, stop):
                out[t] = self._token(qkv[t], beta[t], decay[t], weights, conv, memory)
        return out

    def _token(
        self, qkv: Tensor, beta: Tensor, decay: Tensor, weights: DeltaWeights, conv: Tensor, memory: Tensor
    ) -> Tensor:
        """One token's y [H_v * D_v]; `conv` and `memory` become the states after it."""
        spec = self.spec
        window = torch.cat([conv, qkv.unsqueeze(0)])  # [conv_width, conv_dim]
        conv.copy_(window[1:])
        mixed = torch.nn.functional.silu((window * weights.conv_weight.t()).sum(0))
        q, k, v = torch.split(mixed, [spec.keys, spec.keys, spec.values])
        each = spec.num_value_heads // spec.num_key_heads
        q, k = (normalised(x.view(-1, spec.key_dim)).repeat_interleave(each, dim=0) for x in (q, k))  # [H_v, D_k]
        q = q * spec.key_dim**-0.5
        memory.mul_(decay[:, None, None])
        wanted = beta[:, None] * (v.view(-1, spec.value_dim) - (memory * k[:, None, :]).sum(-1))  # [H_v, D_v]
        memory.add_(wanted[:, :, None] * k[:, None, :])
        y: Tensor = (memory * q[:, None, :]).sum(-1).flatten()
        return y


def normalised(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
