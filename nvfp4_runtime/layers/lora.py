"""LoRA adapters of a linear layer: several in one batch, each on its own tokens.

To a token of adapter i the layer gives y + B_i (scaling_i * A_i x): A_i x summed in FP32, scaled, rounded to the
activations' type once, multiplied by B_i and added to y in the stream's type. Adapters are to the kernels what experts
are, so a token's result does not depend on the tokens beside it wherever the kernels' results do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor

from nvfp4_runtime.batch import AdapterRows
from nvfp4_runtime.checkpoint.adapter import Adapter, LowRank
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.nvfp4.weight import DenseWeight


class LinearAdapters:
    """What all adapters add to one (possibly fused) linear layer.

    An adapter that leaves a part of it alone has zeros there, and every rank is filled up to the largest with zeros.
    """

    def __init__(
        self, kernels: Kernels, group: str, found: Sequence[Sequence[LowRank | None]], n_each: Sequence[int], k: int
    ) -> None:
        """found[i][j]: what adapter i adds to part j, which has n_each[j] outputs."""
        self.dtype: torch.dtype = getattr(torch, kernels.dtype)
        self.parts = [j for j in range(len(n_each)) if any(each[j] is not None for each in found)]
        self.rank = max(low.rank for each in found for low in each if low is not None)
        into = [DenseWeight(torch.cat([self._a(each[j], k) for j in self.parts])) for each in found]
        out_of = [DenseWeight(self._b(each, n_each)) for each in found]
        self.into = kernels.grouped_linear(f"{group} lora_A", into)
        self.out_of = kernels.grouped_linear(f"{group} lora_B", out_of)
        scaling = [[0.0 if (low := each[j]) is None else low.scaling for j in self.parts] for each in found]
        self.scaling = kernels.place(torch.tensor(scaling).repeat_interleave(self.rank, dim=1))  # [N, parts * rank]

    @classmethod
    def load(
        cls,
        adapters: Sequence[Adapter],
        kernels: Kernels,
        group: str,
        prefixes: Sequence[str],
        n_each: Sequence[int],
        k: int,
    ) -> Self | None:
        """What `adapters` learnt for the layers `prefixes`, of n_each[j] outputs and k inputs; None for nothing."""
        found = [[each.linear(p, n, k) for p, n in zip(prefixes, n_each, strict=True)] for each in adapters]
        if all(low is None for each in found for low in each):
            return None
        return cls(kernels, group, found, n_each, k)

    def add(self, y: Tensor, x: Tensor, adapters: AdapterRows) -> Tensor:
        """y [T, N], the layer's own result on x [T, K], with what the tokens' adapters add. Changes y."""
        low = self.into(adapters.pick(x), adapters.offsets)
        low = (low * self.scaling[adapters.ids]).to(self.dtype)
        return y.add_(adapters.put_back(self.out_of(low, adapters.offsets)))

    def _a(self, low: LowRank | None, k: int) -> Tensor:
        a = torch.zeros(self.rank, k, dtype=self.dtype)
        if low is not None:
            a[: low.rank] = low.a
        return a

    def _b(self, each: Sequence[LowRank | None], n_each: Sequence[int]) -> Tensor:
        """All parts' B side by side and one below the other: each reads its own part of what A gives."""
        b = torch.zeros(sum(n_each), len(self.parts) * self.rank, dtype=self.dtype)
        ends = list(accumulate(n_each))
        for place, j in enumerate(self.parts):
            if (low := each[j]) is not None:
                at = place * self.rank
                b[ends[j] - n_each[j] : ends[j], at : at + low.rank] = low.b
        return b
