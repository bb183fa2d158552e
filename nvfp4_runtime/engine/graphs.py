"""Steps that only decode, captured as one launch per batch size over fixed memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nvfp4_runtime.engine.device import Device
from nvfp4_runtime.engine.staging import Layout, StepLists, StepSizes

_FIRST = (1, 2, 4)
_STEP = 8

Forward = Callable[[Layout, Tensor], Tensor]


def capture_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, 16, 24, 32, ... and `max_num_seqs` itself, rising: beyond four, at most seven rows are padding."""
    sizes = {size for size in (*_FIRST, *range(_STEP, max_num_seqs, _STEP)) if size < max_num_seqs}
    return sorted(sizes | {max_num_seqs})


class DecodeGraphs:
    """One captured launch per batch size; a step of another size is padded up to the next.

    The launch reads the head of the staged bytes (see `Layout.of`) and `tables`, and leaves its answer in `logits`.
    """

    def __init__(self, device: Device, staged: Tensor, max_num_seqs: int, width: int, vocab_size: int) -> None:
        """
        staged  uint8, the device's side of a step's staging
        width   blocks of the longest sequence
        """
        self._device, self._staged = device, staged
        self._tables = torch.zeros(max_num_seqs, width, dtype=torch.int32, device=device.torch_device)
        # the launches' own results lie in a pool that the next launch writes over, and would keep it from shrinking
        self._logits = torch.zeros(max_num_seqs, vocab_size, device=device.torch_device)
        self._replay: dict[int, Callable[[], None]] = {}
        self.sizes: list[int] = []

    def padded_size(self, num_seqs: int) -> int | None:
        """The smallest captured size that holds `num_seqs`, or None."""
        return next((size for size in self.sizes if size >= num_seqs), None)

    def replay(self, size: int, tables: Tensor) -> Tensor:
        """Run the staged step: tables int32 [size, any width up to the longest] -> logits float32 [size, V]."""
        self._tables[:, : tables.shape[1]][:size].copy_(tables)  # what lies right of it belongs to no sequence
        self._replay[size]()
        return self._logits[:size]

    def capture(self, sizes: Sequence[int], forward: Forward, progress: Callable[[float], None]) -> None:
        """Capture `forward(layout, tables)`, float32 [size, V], for each size; the largest first, whose memory serves
        all. It runs twice before, so that what is done once is done."""
        for done, size in enumerate(sorted(sizes, reverse=True)):
            work = functools.partial(self._run, forward, self._stage_idle(size), size)
            for _ in range(2):
                self._device.submit(work)
            self._device.mark()()
            self._replay[size] = self._device.capture(work)
            self.sizes = sorted(self._replay)
            progress((done + 1) / len(sizes))

    def _run(self, forward: Forward, layout: Layout, size: int) -> None:
        self._logits[:size].copy_(forward(layout, self._tables[:size]))

    def _stage_idle(self, size: int) -> Layout:
        """A step of nothing but padding, in the staged bytes."""
        lists = StepLists()
        lists.pad_decodes(size)
        layout = Layout.of(StepSizes(tokens=size, seqs=size, logits=size, samples=0, host=0, width=1, drawn=False))
        pinned = self._device.pinned(layout.num_bytes)
        lists.fill(layout, pinned.numpy(), width=1)
        layout.fill(pinned.numpy(), "sources", [-1] * size)
        self._device.submit(lambda: _copy(self._staged, pinned))
        return layout


def _copy(target: Tensor, source: Tensor) -> None:
    target[: source.shape[0]].copy_(source, non_blocking=True)
