"""Several devices: every process computes its rows' gradients, and all take the same step. Started by torchrun."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def start() -> torch.device | None:
    """Join the group that torchrun started, if it did; the device of this process, None for the caller's choice."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        return None
    local = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    if not on_gpu:
        return torch.device("cpu")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def add_up(gradients: Sequence[Tensor]) -> None:
    """Every process's gradients become the sum of all."""
    if dist.is_initialized():
        for gradient in gradients:
            dist.all_reduce(gradient)


def wait() -> None:
    """Until every process is here."""
    if dist.is_initialized():
        dist.barrier()
