"""Linear layers: weights asked for by exact name where they are used, joined by rows where they share an input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from nvfp4_runtime.batch import AdapterRows
from nvfp4_runtime.checkpoint.checkpoint import Checkpoint
from nvfp4_runtime.config import Dtype
from nvfp4_runtime.errors import MissingTensorError, UnexpectedTensorError
from nvfp4_runtime.kernels.ops import LinearKernel, QuantizedRows, TakesQuantizedRows
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.layers.lora import LinearAdapters
from nvfp4_runtime.nvfp4 import slices
from nvfp4_runtime.nvfp4.weight import NVFP4Weight, Weight, can_fuse, fuse
from nvfp4_runtime.parallel import Team


class PreScaled:
    """A linear kernel whose input is first multiplied by the checkpoint's pre_quant_scale (AWQ), column by column.

    The product is rounded to the activations' type, as the tool that chose the scale does, and quantised after that.
    """

    def __init__(self, kernel: LinearKernel, scale: Tensor) -> None:
        self.kernel = kernel
        self.scale = scale.to(torch.float32)
        self.weight_bytes = kernel.weight_bytes

    def __call__(self, x: Tensor) -> Tensor:
        return self.kernel((x.to(torch.float32) * self.scale).to(x.dtype))


class Linear:
    """One projection, or several of the same input whose outputs lie side by side.

    kernels   usually one; more where the parts are stored in formats that cannot share a kernel
    adapters  what LoRA adapters add, None where none adds anything
    sums      results are partial, each rank of this team having some of the columns, and are added up
    """

    def __init__(
        self, kernels: Sequence[LinearKernel], adapters: LinearAdapters | None = None, sums: Team | None = None
    ) -> None:
        self.kernels = tuple(kernels)
        self.adapters = adapters
        self._sums = sums if sums is not None and sums.size > 1 else None
        self._only = self.kernels[0] if len(self.kernels) == 1 else None
        self._takes_quantized = self.takes_quantized

    @classmethod
    def fused(
        cls,
        ckpt: Checkpoint,
        kernels: Kernels,
        group: str,
        prefixes: Sequence[str],
        n_each: Sequence[int],
        k: int,
        *,
        bias: bool = False,
        rows: Sequence[Sequence[range]] | None = None,
        columns: range | None = None,
        sums: bool = True,
    ) -> Self:
        """The layers `prefixes`, of n_each[i] outputs each and k inputs, as one layer of sum(n_each) outputs.

        Neighbours whose formats (and pre_quant_scales) agree share a kernel; those that differ stay apart and are
        joined at the output.

        rows     of each part, the outputs that this rank computes; None: all
        columns  the inputs that this rank has; None: all. What ranks compute is then partial, and is added up here
                 unless `sums` is False
        Raises MissingTensorError or UnexpectedTensorError when the files' biases are not what `bias` says.
        """
        parts = [load_weight(ckpt, prefix, n, k, bias) for prefix, n in zip(prefixes, n_each, strict=True)]
        if rows is not None:
            parts = [slices.rows(part, runs) for part, runs in zip(parts, rows, strict=True)]
        team = kernels.team
        if columns is not None and team.size > 1:
            parts = [slices.columns(part, columns, with_bias=team.rank == 0) for part in parts]
        made = []
        for run in _fusable_runs(parts):
            weight = parts[run.start] if len(run) == 1 else fuse([parts[i] for i in run])
            made.append(linear_kernel(kernels, group, weight, [prefixes[i] for i in run]))
        adapters = LinearAdapters.load(ckpt.adapters, kernels, group, prefixes, n_each, k)
        return cls(made, adapters, team if columns is not None and sums else None)

    @classmethod
    def single(
        cls,
        ckpt: Checkpoint,
        kernels: Kernels,
        prefix: str,
        n: int,
        k: int,
        *,
        bias: bool = False,
        rows: Sequence[range] | None = None,
        columns: range | None = None,
        sums: bool = True,
    ) -> Self:
        """The layer `prefix`; its last name is its group in the precision report."""
        group, runs = prefix.rpartition(".")[2], None if rows is None else [rows]
        return cls.fused(ckpt, kernels, group, [prefix], [n], k, bias=bias, rows=runs, columns=columns, sums=sums)

    @property
    def only_kernel(self) -> LinearKernel | None:
        """The one kernel, or None where there are several."""
        return self._only

    @property
    def takes_quantized(self) -> TakesQuantizedRows | None:
        """The kernel, where the op before it may write its input quantised; None where it needs plain rows, as
        adapters do."""
        kernel: object = None if self.adapters is not None else self._only
        if isinstance(kernel, TakesQuantizedRows) and kernel.quantized_input_scale is not None:
            return kernel
        return None

    def __call__(self, x: Tensor | QuantizedRows, adapters: AdapterRows | None = None) -> Tensor:
        """x [M, K] -> [M, N]; quantised rows only where `takes_quantized`. `adapters`: which rows pass one."""
        if isinstance(x, QuantizedRows):
            assert self._takes_quantized is not None
            y = self._takes_quantized.multiply_quantized(x)
        else:
            y = self._base(x)
            if adapters is not None and self.adapters is not None:
                y = self.adapters.add(y, x, adapters)
        return y if self._sums is None else self._sums.sum(y)

    def _base(self, x: Tensor) -> Tensor:
        if self._only is not None:
            return self._only(x)
        return torch.cat([kernel(x) for kernel in self.kernels], dim=-1)


def linear_kernel(
    kernels: Kernels,
    group: str,
    weight: Weight,
    names: Sequence[str],
    made_from: str | None = None,
    out_dtype: Dtype | None = None,
) -> LinearKernel:
    """`kernels.linear`, with the weight's pre_quant_scale applied to its input where it has one."""
    kernel = kernels.linear(group, weight, names, made_from, out_dtype)
    scale = weight.pre_quant_scale if isinstance(weight, NVFP4Weight) else None
    return kernel if scale is None else PreScaled(kernel, kernels.place(scale))


def load_weight(ckpt: Checkpoint, prefix: str, n: int, k: int, bias: bool) -> Weight:
    """`ckpt.linear`, and a check that the bias is there exactly when the architecture has one."""
    if bias and not ckpt.has(f"{prefix}.bias"):
        raise MissingTensorError(
            f"{prefix}.bias", str(ckpt.path), "config.json and architecture say this layer has one"
        )
    weight = ckpt.linear(prefix, n, k)
    if weight.bias is not None and not bias:
        raise UnexpectedTensorError([f"{prefix}.bias"], str(ckpt.path))
    return weight


def _fusable_runs(parts: Sequence[Weight]) -> list[range]:
    runs: list[range] = []
    for i in range(len(parts)):
        if runs and can_fuse([parts[j] for j in (*runs[-1], i)]):
            runs[-1] = range(runs[-1].start, i + 1)
        else:
            runs.append(range(i, i + 1))
    return runs
