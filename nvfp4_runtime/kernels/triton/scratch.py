"""Memory that layers reuse, one after the other on one stream: reserved at load, so that no step allocates."""

from __future__ import annotations

import torch
from torch import Tensor


class Scratch:
    """Named buffers on one device, each as large as its largest user said at load.

    CUDA graphs keep the addresses: reserve everything before the first one is captured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def reserve(self, name: str, values: int, dtype: torch.dtype) -> None:
        found = self._buffers.get((name, dtype))
        if found is None or found.numel() < values:
            self._buffers[name, dtype] = torch.empty(values, dtype=dtype, device=self.device)

    def view(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """The start of a buffer, as `shape`. What it holds is whatever the last user left."""
        size = 1
        for axis in shape:
            size *= axis
        return self._buffers[name, dtype][:size].view(shape)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 4 for the interpreter, so that small shapes split K as well."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
