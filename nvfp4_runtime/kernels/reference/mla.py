"""One decoding step of multi-head latent attention, absorbed: latent vectors serve as keys and as values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nvfp4_runtime.kernels.ops import MLASpec


class ReferenceMLA:
    """See `MLAKernel`. Everything is float32 until the end; one sequence at a time."""

    def __init__(self, spec: MLASpec) -> None:
        self.rank = spec.kv_lora_rank
        self.out_dtype: torch.dtype = getattr(torch, spec.out_dtype)

    def __call__(
        self, q_nope: Tensor, q_rope: Tensor, cache: Tensor, block_tables: Tensor, seq_lens: Tensor, scale: float
    ) -> Tensor:
        out = torch.zeros(q_nope.shape, dtype=self.out_dtype, device=q_nope.device)
        for b, length in enumerate(seq_lens.tolist()):
            if length == 0:
                continue
            blocks = block_tables[b, : math.ceil(length / cache.shape[1])].to(torch.int64)
            seen = cache[blocks].flatten(0, 1)[:length].to(torch.float32)  # [S, rank + rope]
            latent, key = seen[:, : self.rank], seen[:, self.rank :]
            scores = q_nope[b].to(torch.float32) @ latent.t() + q_rope[b].to(torch.float32) @ key.t()
            out[b] = (torch.softmax(scores * scale, dim=-1) @ latent).to(self.out_dtype)
        return out
