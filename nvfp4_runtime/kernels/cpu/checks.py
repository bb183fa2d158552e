"""What must hold before an address is handed to native code."""

from __future__ import annotations

import torch
from torch import Tensor

from nvfp4_runtime.errors import KernelError

TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3}  # csrc/types.h: Type


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise KernelError unless `tensor` is a contiguous CPU tensor of this dtype and shape (-1: any length)."""
    found = tensor.shape
    if (
        tensor.dtype == dtype
        and tensor.is_contiguous()
        and len(found) == len(shape)
        and all(want in (-1, have) for want, have in zip(shape, found, strict=True))
        and tensor.device.type == "cpu"
    ):
        return
    wanted = ", ".join("any" if s < 0 else str(s) for s in shape)
    layout = "contiguous" if tensor.is_contiguous() else f"with strides {list(tensor.stride())}"
    raise KernelError(
        f"{name}: expected a contiguous {dtype} tensor [{wanted}] on cpu, found {tensor.dtype} {list(found)} "
        f"{layout} on {tensor.device}; convert it before the call"
    )
