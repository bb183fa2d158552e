"""Weights from the mapped file to a GPU: through two pinned buffers in turn, so host memory stays bounded.

The copy of one piece to the GPU runs while the next is read from the map. The driver's own path for memory that is not
pinned is slower, since it waits for every piece.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

CHUNK_BYTES = 32 << 20


class Link(Protocol):
    """How bytes get to a device."""

    def pinned(self, num_bytes: int) -> Tensor:
        """uint8 host memory that is copied from without staging."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> Callable[[], None]:
        """Start copying uint8 `source` (pinned) to `target` (on the device); the answer waits until that is done."""
        ...


class CudaLink:
    def pinned(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> Callable[[], None]:
        target.copy_(source, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]  # PyTorch's
        done.record()
        return done.synchronize


def _nothing() -> None:
    pass


class Uploader:
    """Copies tensors to one device. Its two buffers exist from the first upload until `close`.

    num_bytes, seconds  uploaded so far, and how long callers spent in it
    """

    def __init__(self, device: torch.device, link: Link | None = None, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.device = device
        self.num_bytes = 0
        self.seconds = 0.0
        self._link = link or CudaLink()
        self._chunk_bytes = chunk_bytes
        self._buffers: list[Tensor] = []
        self._waits: list[Callable[[], None]] = [_nothing, _nothing]
        self._turn = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of `tensor`, from host memory, on the device.

        Returns before the last pieces have arrived: what the device is told to do next comes after them.
        """
        started = time.perf_counter()
        source = tensor.contiguous().view(-1).view(torch.uint8)
        target = torch.empty(source.shape[0], dtype=torch.uint8, device=self.device)
        for at in range(0, source.shape[0], self._chunk_bytes):
            self._send(target, source, at)
        self.num_bytes += source.shape[0]
        self.seconds += time.perf_counter() - started
        return target.view(tensor.dtype).view(tensor.shape)

    def _send(self, target: Tensor, source: Tensor, at: int) -> None:
        if not self._buffers:
            self._buffers = [self._link.pinned(self._chunk_bytes) for _ in self._waits]
        piece = source[at : at + self._chunk_bytes]
        staged = self._buffers[self._turn][: piece.shape[0]]
        self._waits[self._turn]()  # what this buffer held before has left it
        staged.copy_(piece)
        self._waits[self._turn] = self._link.copy(target[at : at + piece.shape[0]], staged)
        self._turn = 1 - self._turn

    def close(self) -> None:
        """Wait until everything has arrived, and give the buffers back."""
        started = time.perf_counter()
        for wait in self._waits:
            wait()
        self._waits = [_nothing, _nothing]
        self._buffers = []
        self.seconds += time.perf_counter() - started


_uploaders: dict[torch.device, Uploader] = {}


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`: itself where it is there, from host memory to a GPU by that GPU's `Uploader`.

    For weights while a model loads; `finish_transfers` ends it. All who load share one pair of pinned buffers a GPU,
    which is why they are found here and not handed round.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    if str(device) == "cuda":  # no number: the current one
        device = torch.device("cuda", torch.cuda.current_device())
    if device not in _uploaders:
        _uploaders[device] = Uploader(device)
    return _uploaders[device](tensor)


def finish_transfers(device: torch.device) -> tuple[int, float]:
    """Wait until all has arrived and free the pinned buffers; returns the bytes and seconds of all uploads."""
    uploader = _uploaders.pop(device, None)
    if uploader is None:
        return 0, 0.0
    uploader.close()
    return uploader.num_bytes, uploader.seconds
