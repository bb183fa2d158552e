"""One pass over a checkpoint's bytes: every layer counted, and compared with its parent, by all cores."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from nvfp4_runtime.checkpoint.doctor.decode import read_any
from nvfp4_runtime.checkpoint.doctor.parent import Comparison, compare
from nvfp4_runtime.checkpoint.doctor.statistics import (
    Advance,
    CodeCounts,
    E4M3Counts,
    Order,
    PlainCounts,
    count_codes,
    count_e4m3,
    count_plain,
    order_of_scales,
    raw_bytes,
)
from nvfp4_runtime.checkpoint.pages import release_pages
from nvfp4_runtime.checkpoint.shards import PLAIN, Shards
from nvfp4_runtime.checkpoint.stored import StoredLayer
from nvfp4_runtime.nvfp4.mx import E8M0_BIAS, E8M0_NAN

_RELEASE_BYTES = 1 << 28  # mapped pages are given back after so many bytes
_BATCH_BYTES, _BATCH_LAYERS = 1 << 23, 256


@dataclass(frozen=True)
class FloatCounts:
    """What a tensor of float scales holds: `values` as stored, `least` and `most` of the finite positive ones."""

    values: tuple[float, ...]
    nonfinite: int
    negative: int
    zero: int
    least: float | None
    most: float | None


@dataclass(frozen=True)
class Measured:
    """What was counted in one layer; None where the layer has no such tensor or it is of another type.

    blocks        E4M3 block scales of a 4-bit layer
    exponents     (smallest, largest, NaN count) of E8M0 block scales, as values
    codes         NVFP4 blocks beside their scales
    order         which order the block scales seem to lie in
    fp8           E4M3 weights
    scale         FP8's scales
    tensor_scale  as stored: a divisor in compressed-tensors
    input_scale   as stored
    plain         an unquantised weight
    comparison    with the parent
    """

    stored: StoredLayer
    blocks: E4M3Counts | None = None
    exponents: tuple[float, float, int] | None = None
    codes: CodeCounts | None = None
    order: Order | None = None
    fp8: E4M3Counts | None = None
    scale: FloatCounts | None = None
    tensor_scale: FloatCounts | None = None
    input_scale: FloatCounts | None = None
    plain: PlainCounts | None = None
    comparison: Comparison | None = None

    @property
    def name(self) -> str:
        return self.stored.prefix

    def multiplier(self, value: float) -> float:
        """A stored tensor or input scale as a multiplier."""
        if not self.stored.divides:
            return value
        return 1 / value if value else math.inf

    @property
    def all_zero(self) -> bool:
        """Whether every weight of the layer is zero."""
        if self.codes is not None:
            return self.codes.zero_blocks == self.codes.blocks
        if self.fp8 is not None:
            return self.fp8.zero == self.fp8.total
        return self.plain is not None and self.plain.zero == self.plain.total


def measure(
    shards: Shards, layers: Sequence[StoredLayer], parent: Shards | None = None, advance: Advance = lambda _: None
) -> list[Measured]:
    """Count every layer of `shards`, largest first over all cores; the answer is in the order of `layers`.

    `advance` is told how many bytes more have been looked at, from any thread, one at a time.
    """
    files = [*shards.files, *(parent.files if parent is not None else ())]
    tell = _Teller(advance)
    done: dict[int, Measured] = {}
    with _one_torch_thread(), ThreadPoolExecutor(_cores()) as pool:
        futures = [pool.submit(_measure_batch, shards, layers, batch, parent, tell) for batch in _batches(layers)]
        released = 0
        try:
            for future in as_completed(futures):
                done |= future.result()
                if tell.total - released > _RELEASE_BYTES:
                    release_pages(files)
                    released = tell.total
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    release_pages(files)
    return [done[i] for i in range(len(layers))]


def _batches(layers: Sequence[StoredLayer]) -> Iterator[list[int]]:
    """Layers by index, largest first; small ones together, since threads quarrel over many small things."""
    batch: list[int] = []
    size = 0
    for i in sorted(range(len(layers)), key=lambda i: -layers[i].nbytes):
        batch.append(i)
        size += layers[i].nbytes
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_LAYERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _measure_batch(
    shards: Shards, layers: Sequence[StoredLayer], batch: list[int], parent: Shards | None, advance: Advance
) -> dict[int, Measured]:
    return {i: _measure(shards, layers[i], parent, advance) for i in batch}


def work_bytes(layers: Sequence[StoredLayer], parent: Shards | None) -> int:
    """About how many bytes `measure` will tell of: for the progress bar."""
    total = sum(layer.nbytes for layer in layers)
    if parent is not None:
        quantised = (layer.prefix for layer in layers if layer.block is not None)
        infos = (parent.info(f"{prefix}.weight") or parent.info(prefix) for prefix in quantised)
        total += sum(info.nbytes for info in infos if info is not None)
    return total


class _Teller:
    """Adds up what the threads report."""

    def __init__(self, advance: Advance) -> None:
        self.total = 0
        self._advance = advance
        self._lock = Lock()

    def __call__(self, nbytes: int) -> None:
        with self._lock:
            self.total += nbytes
            self._advance(nbytes)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Threads started inside use one core each in torch: the layers are what is spread over cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measure(shards: Shards, stored: StoredLayer, parent: Shards | None, advance: Advance) -> Measured:
    tensors = {role: read_any(shards, name) for role, name in stored.tensors.items()}
    weight, block_scale = tensors.get("weight"), tensors.get("block_scale")
    tensor_scale, input_scale = tensors.get("tensor_scale"), tensors.get("input_scale")
    scale = tensors.get("scale")
    blocks = codes = order = exponents = fp8 = plain = floats = None
    if block_scale is None and scale is not None and weight is not None and weight.dtype == torch.uint8:
        block_scale, scale = scale, None  # a packed layer with a problem: its scales can be counted all the same
    if block_scale is not None and block_scale.dtype == torch.float8_e4m3fn:
        blocks = count_e4m3(raw_bytes(block_scale), advance)
        if stored.problem is None and weight is not None and stored.block is not None:
            if not stored.transposed:
                codes = count_codes(raw_bytes(weight), raw_bytes(block_scale), stored.block[1], advance)
            if block_scale.dim() == 2:
                order = order_of_scales(block_scale)
    elif block_scale is not None and block_scale.element_size() == 1:
        exponents = _count_e8m0(block_scale)
        advance(block_scale.nbytes)
    if weight is not None and weight.dtype == torch.float8_e4m3fn:
        fp8 = count_e4m3(raw_bytes(weight), advance)
    if weight is not None and weight.dtype in (torch.bfloat16, torch.float16, torch.float32):
        plain = count_plain(weight, advance)
    if scale is not None and scale.is_floating_point():
        floats = count_floats(scale)
    comparison = None
    if parent is not None and stored.block is not None and stored.problem is None:
        comparison = compare(shards, stored, parent, advance)
    return Measured(
        stored,
        blocks=blocks,
        exponents=exponents,
        codes=codes,
        order=order,
        fp8=fp8,
        scale=floats,
        tensor_scale=count_floats(tensor_scale) if tensor_scale is not None else None,
        input_scale=count_floats(input_scale) if input_scale is not None else None,
        plain=plain,
        comparison=comparison,
    )


def count_floats(tensor: Tensor) -> FloatCounts:
    """Look at every value of a tensor of scales. Kept values are the first 4096: scales per tensor are few."""
    flat = tensor.to(torch.float32).reshape(-1)
    finite = torch.isfinite(flat)
    positive = flat[finite & (flat > 0)]
    return FloatCounts(
        values=tuple(flat[:4096].tolist()),
        nonfinite=int((~finite).sum()),
        negative=int((flat < 0).sum()),
        zero=int((flat == 0).sum()),
        least=float(positive.min()) if positive.numel() else None,
        most=float(positive.max()) if positive.numel() else None,
    )


def _count_e8m0(scale: Tensor) -> tuple[float, float, int]:
    raw = raw_bytes(scale)
    usable = raw[raw != E8M0_NAN]
    least, most = (int(usable.min()), int(usable.max())) if usable.size else (0, 0)
    return 2.0 ** (least - E8M0_BIAS), 2.0 ** (most - E8M0_BIAS), int(raw.size - usable.size)


def is_plain(stored: StoredLayer) -> bool:
    """Whether a layer is unquantised, by its tensor's type."""
    return stored.format in tuple(_PLAIN_NAMES[dtype] for dtype in PLAIN)


_PLAIN_NAMES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
