"""Rows of a stored layer as float32, a chunk at a time: what a parent is compared with and a repair verified by.

Written for speed beside `nvfp4.codec`, which defines correct; a test compares the two bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nvfp4_runtime.checkpoint.shards import Shards
from nvfp4_runtime.checkpoint.stored import StoredLayer
from nvfp4_runtime.nvfp4 import codec, mx
from nvfp4_runtime.nvfp4.layouts import unswizzle_scales

CHUNK_VALUES = 1 << 18  # 1 MB in float32: a chunk and its parent stay in the processor's cache


def _pairs() -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Per byte of codes its two float32 values, low nibble first, as one word."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).unsqueeze(1)
    values = codec.decode_e2m1(codec.unpack_codes(codes))  # [256, 2]
    words: np.ndarray[tuple[int], np.dtype[np.uint64]] = values.contiguous().numpy().view(np.uint64).reshape(256)
    return words


_PAIRS = _pairs()


@dataclass(frozen=True)
class Matrix:
    """One quantised matrix [n, k] as its bytes stand, views of the mapped file.

    codes    uint8 [n, k/2] (4-bit), or e4m3 [n, k] (FP8)
    scale    e4m3 [n, k/16], uint8 E8M0 [n, k/32], or fp32 [ceil(n/block[0]), ceil(k/block[1])] (FP8)
    tensor   fp32 [n, 1] or [1, 1]: the tensor scale, NVFP4 only
    divides  `tensor` is a divisor
    block    rows and columns under one scale
    columns  fp32 [k], or None: AWQ's pre_quant_scale, by which activations, or else the weight, must be multiplied
    """

    format: str
    codes: Tensor
    scale: Tensor
    tensor: Tensor
    divides: bool
    block: tuple[int, int]
    columns: Tensor | None = None

    @property
    def n(self) -> int:
        return int(self.codes.shape[0])

    @property
    def k(self) -> int:
        return int(self.codes.shape[1]) * (1 if self.format == "fp8" else 2)

    @property
    def rows_per_chunk(self) -> int:
        return max(1, CHUNK_VALUES // max(1, self.k))

    def rows(self, start: int, stop: int) -> Tensor:
        """float32 [stop - start, k], as the codec dequantises them."""
        values = self._rows(start, stop)
        return values if self.columns is None else values.mul_(self.columns)

    def _rows(self, start: int, stop: int) -> Tensor:
        codes = self.codes[start:stop]
        if self.format == "fp8":
            row_blocks = torch.arange(start, min(stop, self.n)) // self.block[0]
            steps = self.scale[row_blocks]
            if steps.shape[1] > 1:
                steps = steps.repeat_interleave(self.block[1], dim=1)[:, : self.k]
            return codes.to(torch.float32) * steps
        step = self.scale[start:stop]
        if self.format == "mxfp4":
            step = mx.decode_e8m0(step)
        else:
            tensor = self.tensor if self.tensor.shape[0] == 1 else self.tensor[start:stop]
            step = step.to(torch.float32) / tensor if self.divides else step.to(torch.float32) * tensor
        words = np.empty(codes.shape, np.uint64)
        # every byte is a valid index; "clip" spares NumPy's check and its buffer
        np.take(_PAIRS, codes.numpy(), out=words, mode="clip")
        values = torch.from_numpy(words.view(np.float32))
        return values.view(values.shape[0], -1, self.block[1]).mul_(step.unsqueeze(-1)).flatten(1)

    def swapped(self) -> Matrix:
        """The same bytes read with the high nibble first."""
        return replace(self, codes=swap_nibbles(self.codes))

    def unswizzled(self) -> Matrix:
        """The same scales read as tiles of 128 rows and 4 columns."""
        return replace(self, scale=unswizzle_scales(self.scale.reshape(-1), *self.scale.shape))

    def inverted(self) -> Matrix:
        """The tensor scale read the other way round."""
        return replace(self, divides=not self.divides)

    def head(self, rows: int) -> Matrix:
        """The first rows; a number of them that the block divides."""
        tensor = self.tensor[:rows]
        scale_rows = -(-rows // self.block[0])
        return replace(self, codes=self.codes[:rows], scale=self.scale[:scale_rows], tensor=tensor)


def swap_nibbles(codes: Tensor) -> Tensor:
    return (codes >> 4) | (codes << 4)


def matrix(shards: Shards, stored: StoredLayer, expert: int = 0) -> Matrix | None:
    """One matrix of a layer that is stored soundly and [out, in]; None for other layers (plain, transposed, broken)."""
    found = _matrix(shards, stored, expert)
    factors = shards.info(stored.tensors.get("pre_quant_scale", ""))
    if found is None or factors is None or factors.shape != (stored.k,):
        return found
    return replace(found, columns=read_any(shards, factors.name).to(torch.float32))


def _matrix(shards: Shards, stored: StoredLayer, expert: int) -> Matrix | None:
    if stored.problem is not None or stored.transposed or stored.block is None:
        return None
    codes = _one(read_any(shards, stored.tensors["weight"]), stored, expert)
    if stored.format == "nvfp4":
        scale = _one(read_any(shards, stored.tensors["block_scale"]), stored, expert)
        tensor = _tensor_scale(shards, stored, expert)
        if tensor is None:
            return None
        shape = (stored.n, stored.k // stored.block[1])
        codes = codes.reshape(stored.n, stored.k // 2)
        return Matrix("nvfp4", codes, scale.reshape(shape), tensor, stored.divides, stored.block)
    one = torch.ones(1, 1)
    if stored.format == "mxfp4":
        scale = _one(read_any(shards, stored.tensors["block_scale"]), stored, expert).view(torch.uint8)
        shape = (stored.n, stored.k // stored.block[1])
        return Matrix("mxfp4", codes.reshape(stored.n, stored.k // 2), scale.reshape(shape), one, False, stored.block)
    if stored.format == "fp8":
        rows, columns = -(-stored.n // stored.block[0]), -(-stored.k // stored.block[1])
        scale = read_any(shards, stored.tensors["scale"]).to(torch.float32).reshape(-1)
        scale = scale.reshape(-1, rows, columns)
        scale = scale[expert if scale.shape[0] > 1 else 0]
        return Matrix("fp8", codes.reshape(stored.n, stored.k), scale, one, False, stored.block)
    return None


def read_any(shards: Shards, name: str) -> Tensor:
    """A tensor whatever its dtype; a view of the mapped file."""
    return shards.read(name, None, (shards.require(name).dtype,))


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype and shape hold the same bytes, compared a chunk at a time."""
    mine, other = a.contiguous().reshape(-1), b.contiguous().reshape(-1)
    if mine.dtype != other.dtype or mine.shape != other.shape:
        return False
    return all(
        torch.equal(mine[i : i + CHUNK_VALUES].view(torch.uint8), other[i : i + CHUNK_VALUES].view(torch.uint8))
        for i in range(0, mine.numel(), CHUNK_VALUES)
    )


def plain_matrix(shards: Shards, name: str, shape: tuple[int, ...], experts: int, expert: int) -> Tensor | None:
    """[n, k] of the plain tensor `name`, or None where that is missing or of another shape."""
    info = shards.info(name)
    wanted = (experts, *shape) if experts else shape
    if info is None or info.shape != wanted or info.dtype not in ("BF16", "F16", "F32"):
        return None
    tensor = shards.read(name)
    return tensor[expert] if experts else tensor


def _one(tensor: Tensor, stored: StoredLayer, expert: int) -> Tensor:
    return tensor[expert] if stored.experts else tensor


def _tensor_scale(shards: Shards, stored: StoredLayer, expert: int) -> Tensor | None:
    """[1, 1], or [n, 1] where parts of the rows (gate and up in one) have scales of their own; None: does not fit."""
    scales = read_any(shards, stored.tensors["tensor_scale"]).to(torch.float32)
    experts = max(1, stored.experts)
    if scales.numel() != 1 and (scales.numel() == 0 or scales.numel() % experts):
        return None
    mine = scales.reshape(experts, -1)[expert] if scales.numel() > 1 else scales.reshape(1)
    if mine.numel() == 1:
        return mine.reshape(1, 1)
    if stored.n % mine.numel():
        return None
    return mine.repeat_interleave(stored.n // mine.numel()).unsqueeze(1)
