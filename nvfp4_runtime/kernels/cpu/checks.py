"""What must hold before an address is handed to native code.

A decode step makes some three hundred calls, so a tensor that was checked once is recognised by identity: per kernel
for what belongs to its layer (norm weights, tables, cache), per backend for what a whole step shares (the batch).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch
from nvfp4_runtime.errors import KernelError

MOST = 2**30  # csrc counts rows and columns in 32 bits, and rounds them up
TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3}  # csrc/types.h: Type


def check_matrix(name: str, tensor: Tensor, dtype: torch.dtype, width: int) -> None:
    """`check_tensor` for [any, width], the case of every activation; written for speed."""
    if (
        tensor.dtype is dtype
        and tensor.is_cpu
        and tensor.dim() == 2
        and tensor.size(1) == width
        and tensor.is_contiguous()
        and tensor.size(0) <= MOST
    ):
        return
    _refuse(name, tensor, dtype, (-1, width))


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise KernelError unless `tensor` is a contiguous CPU tensor of this dtype and shape (-1: any length)."""
    found = tensor.shape
    if (
        tensor.dtype is dtype
        and tensor.is_cpu
        and tensor.is_contiguous()
        and len(found) == len(shape)
        and all(want == have or (want == -1 and have <= MOST) for want, have in zip(shape, found, strict=True))
    ):
        return
    _refuse(name, tensor, dtype, shape)


def _refuse(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> NoReturn:
    if tensor.dim() > 0 and tensor.size(0) > MOST:
        raise KernelError(f"{name}: found {tensor.size(0)} rows, expected at most {MOST}; split it")
    wanted = ", ".join("any" if s < 0 else str(s) for s in shape)
    layout = "contiguous" if tensor.is_contiguous() else f"with strides {list(tensor.stride())}"
    raise KernelError(
        f"{name}: expected a contiguous {dtype} tensor [{wanted}] on cpu, found {tensor.dtype} {list(tensor.shape)} "
        f"{layout} on {tensor.device}; convert it before the call"
    )


def check_bias(bias: Tensor | None, rows: int) -> Tensor | None:
    """The bias of a weight with `rows` rows, as float32 to hand over."""
    if bias is None:
        return None
    if tuple(bias.shape) != (rows,) or bias.device.type != "cpu":
        raise KernelError(f"bias: expected [{rows}] on cpu like its weight, found {list(bias.shape)} on {bias.device}")
    return aligned(bias.to(torch.float32))


def aligned(tensor: Tensor) -> Tensor:
    """Contiguous and at an address its elements may have; a file that is mapped into memory need not give one."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


@dataclass
class StepMemo:
    """The shared tensors of the last step that passed their checks, one memo per backend; kept alive meanwhile."""

    positions: Tensor | None = None
    slot_mapping: Tensor | None = None
    batch: ForwardBatch | None = None

    def check_slots(self, positions: Tensor, slot_mapping: Tensor, rows: int) -> None:
        """Both int64 [rows]; what they hold is checked natively on every call."""
        known = positions is self.positions and slot_mapping is self.slot_mapping
        if known and positions.size(0) == rows:
            return
        check_tensor("positions", positions, torch.int64, (rows,))
        check_tensor("slot_mapping", slot_mapping, torch.int64, (rows,))
        self.positions, self.slot_mapping = positions, slot_mapping

    def check_batch(self, batch: ForwardBatch) -> None:
        """Block tables, lengths and bounds of one batch; what they hold is checked natively on every call."""
        if batch is self.batch:
            return
        check_tensor("seq_lens", batch.seq_lens, torch.int32, (-1,))
        sequences = batch.seq_lens.size(0)
        check_tensor("block_tables", batch.block_tables, torch.int32, (sequences, -1))
        check_tensor("cu_seqlens_q", batch.cu_seqlens_q, torch.int32, (sequences + 1,))
        self.batch = batch
