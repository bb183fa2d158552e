"""Mamba-2's convolution, selective scan and gated norm, token by token, one sequence at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, StateLayer
from nvfp4_runtime.kernels.ops import Mamba2Spec, Mamba2Weights


class ReferenceMamba2:
    """See `Mamba2Kernel`."""

    def __init__(self, spec: Mamba2Spec) -> None:
        self.spec = spec

    def __call__(self, projected: Tensor, weights: Mamba2Weights, state: StateLayer, batch: ForwardBatch) -> Tensor:
        assert batch.state_slots is not None
        gate, xbc, dt = torch.split(projected.to(torch.float32), self.spec.widths, dim=-1)
        steps = torch.nn.functional.softplus(dt + weights.dt_bias).clamp_min(weights.min_step)
        out = torch.empty(xbc.shape[0], self.spec.inner, dtype=torch.float32, device=xbc.device)
        bounds = batch.cu_seqlens_q.tolist()
        for slot, start, stop in zip(batch.state_slots.tolist(), bounds[:-1], bounds[1:], strict=True):
            conv, ssm = state.conv[slot], state.ssm[slot]
            if int(batch.positions[start]) == 0:
                conv.zero_()
                ssm.zero_()
            for t in range(start, stop):
                out[t] = self._token(xbc[t], steps[t], weights, conv, ssm)
        return self._gated_norm(out, gate, weights)

    def _gated_norm(self, y: Tensor, gate: Tensor, weights: Mamba2Weights) -> Tensor:
        """RMSNorm of y * silu(gate) over each group, [T, inner]."""
        gated = (y * torch.nn.functional.silu(gate)).view(len(y), self.spec.num_groups, -1)
        normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + weights.eps)
        return (normed.flatten(1) * weights.norm).to(getattr(torch, self.spec.out_dtype))

    def _token(self, xbc: Tensor, step: Tensor, weights: Mamba2Weights, conv: Tensor, ssm: Tensor) -> Tensor:
        """One token's y [H * P]; `conv` and `ssm` become the states after it."""
        spec = self.spec
        window = torch.cat([conv, xbc.unsqueeze(0)])  # [conv_width, conv_dim]
        conv.copy_(window[1:])
        mixed = torch.nn.functional.silu((window * weights.conv_weight.t()).sum(0) + weights.conv_bias)
        width = spec.num_groups * spec.state_size
        x, b, c = torch.split(mixed, [spec.inner, width, width])
        x = x.view(spec.num_heads, spec.head_dim)
        per_group = spec.num_heads // spec.num_groups
        b, c = (part.view(spec.num_groups, -1).repeat_interleave(per_group, dim=0) for part in (b, c))  # [H, N]
        decay = torch.exp(step * weights.a)
        ssm.mul_(decay[:, None, None]).add_((step[:, None] * x)[:, :, None] * b[:, None, :])
        return ((ssm * c[:, None, :]).sum(-1) + weights.d[:, None] * x).flatten()
