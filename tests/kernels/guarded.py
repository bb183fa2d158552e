"""Tensors whose memory ends (or begins) at a page nobody may touch: one byte too far is a SIGSEGV, sanitizer or not.

A vector kernel's classic fault is a whole-register access at the end of a row. In ordinary memory that reads a
neighbour and passes; here it ends the process, so calls under test run in a forked child.
"""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, KVLayer
from nvfp4_runtime.nvfp4.weight import DenseWeight, NVFP4Weight

Side = Literal["end", "start"]
_libc = ctypes.CDLL(None, use_errno=True)
_PROT_NONE = 0
_READ, _READ_WRITE = mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE


def guarded_empty(shape: tuple[int, ...], dtype: torch.dtype, side: Side) -> Tensor:
    """Uninitialised memory for a tensor between two forbidden pages, touching the one at its `side`."""
    count = 1
    for size in shape:
        count *= size
    num_bytes = count * dtype.itemsize
    page = mmap.PAGESIZE
    inside = max(1, -(-num_bytes // page)) * page
    memory = mmap.mmap(-1, inside + 2 * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for at in (base, base + page + inside):
        if _libc.mprotect(ctypes.c_void_p(at), ctypes.c_size_t(page), _PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    if num_bytes == 0:
        return torch.empty(shape, dtype=dtype)
    offset = page if side == "start" else page + inside - num_bytes
    return torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes, offset=offset).view(dtype).view(shape)


def guarded(tensor: Tensor, side: Side) -> Tensor:
    """A copy of `tensor` beside a forbidden page."""
    copy = guarded_empty(tuple(tensor.shape), tensor.dtype, side)
    copy.view(torch.uint8).copy_(tensor.contiguous().view(torch.uint8))
    return copy


def guarded_weight(weight: NVFP4Weight | DenseWeight, side: Side) -> NVFP4Weight | DenseWeight:
    """The same weight, every tensor of it guarded."""
    tensors = {
        f.name: guarded(value, side)
        for f in dataclasses.fields(weight)
        if isinstance(value := getattr(weight, f.name), Tensor)
    }
    return dataclasses.replace(weight, **tensors)


def guarded_kv(kv: KVLayer, side: Side) -> KVLayer:
    scales = [None if t is None else guarded(t, side) for t in (kv.k_blocks, kv.v_blocks)]
    return dataclasses.replace(kv, k=guarded(kv.k, side), v=guarded(kv.v, side), k_blocks=scales[0], v_blocks=scales[1])


def guarded_batch(batch: ForwardBatch, side: Side) -> ForwardBatch:
    names = ("block_tables", "seq_lens", "cu_seqlens_q", "slot_mapping", "positions")
    return dataclasses.replace(batch, **{name: guarded(getattr(batch, name), side) for name in names})


@contextmanager
def guarded_results(side: Side) -> Iterator[None]:
    """Results too: torch.empty hands out guarded memory."""

    def empty(*shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        sizes = shape[0] if shape and not isinstance(shape[0], int) else shape
        return guarded_empty(tuple(sizes), dtype, side)

    with mock.patch.object(torch, "empty", empty):
        yield


def survives(work: Callable[[], bool]) -> str:
    """Run `work` in a forked child: "" when it returned True, else what went wrong, for an assert to print."""
    child = os.fork()
    if child == 0:
        code = 2
        try:
            signal.alarm(60)
            torch.set_num_threads(1)  # the parent's OpenMP threads are not here; nobody must wait for them
            code = 0 if work() else 1
        except Exception:  # noqa: BLE001 - printed, and the status says so
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}: it touched memory it does not own"
    return {0: "", 1: "another result than in ordinary memory"}.get(os.WEXITSTATUS(status), "raised; see stderr")
