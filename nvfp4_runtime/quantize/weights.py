"""One fused group's weights to the tensors a checkpoint holds, a matrix in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor

from nvfp4_runtime.checkpoint.pages import release_pages
from nvfp4_runtime.checkpoint.shards import Shards, TensorInfo
from nvfp4_runtime.errors import CheckpointError
from nvfp4_runtime.kernels.registry import Kernels
from nvfp4_runtime.nvfp4.block_scales import BlockMethod, tensor_scale
from nvfp4_runtime.nvfp4.codec import E4M3_MAX
from nvfp4_runtime.nvfp4.weight import DenseWeight, NVFP4Weight
from nvfp4_runtime.quantize.plan import Group

CHUNK_VALUES = 1 << 22  # weights converted at a time: 16 MB in float32, so temporaries stay small

Write = Callable[[str, Tensor], None]


class Sink(Protocol):
    """Where tensors go; what an earlier run wrote is there already."""

    def write(self, name: str, tensor: Tensor) -> None: ...

    def has(self, name: str) -> bool: ...


class MappedPages:
    """Pages of the source that are no longer needed: given back now and then, since they count against this process."""

    LIMIT = 64 << 20  # finding the maps takes a millisecond, so not after every small matrix

    def __init__(self, shards: Shards) -> None:
        self._files = shards.files
        self._bytes = 0

    def touched(self, info: TensorInfo) -> None:
        """`info` has been read and written."""
        self._bytes += info.nbytes
        if self._bytes >= self.LIMIT:
            release_pages(self._files)
            self._bytes = 0


def write_group(
    shards: Shards,
    group: Group,
    kernels: Kernels,
    method: BlockMethod,
    input_scales: Mapping[str, float] | None,
    out: Sink,
    pages: MappedPages,
) -> None:
    """Quantise `group` from `shards` into `out`. Raises CheckpointError on NaN or Inf."""

    def write(name: str, tensor: Tensor) -> None:
        if not out.has(name):
            out.write(name, tensor)

    amax = torch.zeros((), dtype=torch.float32)
    if group.stored == "nvfp4":
        for _, info in group.members:
            amax = torch.maximum(amax, largest(kernels, shards.read(info.name), info))
            pages.touched(info)
    for module, info in group.members:
        weight = shards.read(info.name)
        if group.stored == "nvfp4":
            write_nvfp4(module, nvfp4(kernels, weight, tensor_scale(amax, method), method), write)
        else:
            write_fp8(module, *fp8_per_tensor(weight, largest(kernels, weight, info)), write)
        if input_scales is not None:
            write(f"{module}.input_scale", torch.tensor(input_scales[module], dtype=torch.float32))
        pages.touched(info)


def largest(kernels: Kernels, weight: Tensor, info: TensorInfo) -> Tensor:
    """The largest magnitude, fp32 []. Raises CheckpointError where the weight holds NaN or Inf."""
    amax = kernels.largest(DenseWeight(weight))
    if bool(amax.isnan()):
        raise CheckpointError(f"{info.name} in {info.file.name} holds NaN or Inf; such a layer cannot be quantised")
    return amax


def nvfp4(
    kernels: Kernels, weight: Tensor, scale_2: Tensor, method: BlockMethod, importance: Tensor | None = None
) -> NVFP4Weight:
    """A plain matrix under a given tensor scale. Rows are independent, so native code shares them over the cores."""
    made = kernels.quantize(DenseWeight(weight), "nvfp4", method, scale_2, importance)
    assert isinstance(made, NVFP4Weight)
    return made


def write_nvfp4(module: str, weight: NVFP4Weight, write: Write) -> None:
    write(f"{module}.weight", weight.packed)
    write(f"{module}.weight_scale", weight.block_scale)
    write(f"{module}.weight_scale_2", weight.weight_scale_2.reshape(()))


def fp8_per_tensor(weight: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """ModelOpt's FP8: e4m3 [N, K] = rne(w / scale), scale fp32 [] = amax / 448, both in float32; 1 for zeros.

    ModelOpt divides in bfloat16 first and rounds twice; this is the nearer code where the two differ.
    """
    scale = amax.to(torch.float32) / E4M3_MAX
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    rows = max(1, CHUNK_VALUES // weight.shape[1])
    codes = [
        (chunk.to(torch.float32) / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
        for chunk in torch.split(weight, rows)
    ]
    return torch.cat(codes).view(torch.float8_e4m3fn), scale


def write_fp8(module: str, codes: Tensor, scale: Tensor, write: Write) -> None:
    write(f"{module}.weight", codes)
    write(f"{module}.weight_scale", scale)


def bits_per_weight(stored: Literal["nvfp4", "fp8", "plain"]) -> float:
    """Stored bits per weight, the tensor scales left out; plain counts as 16."""
    return {"nvfp4": 4.5, "fp8": 8.0, "plain": 16.0}[stored]
