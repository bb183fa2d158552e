"""Weights moved to a device. Checkpoints are read where the memory map is; a backend takes what it keeps from there."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from torch import Tensor

from nvfp4_runtime.kernels.transfer import to_device
from nvfp4_runtime.nvfp4.weight import JoinedNVFP4, NVFP4Weight, Weight

W = TypeVar("W", bound=Weight)


def upload(weight: W, device: torch.device) -> W:
    """`weight` with every tensor on `device`; the weight itself where they are there already."""
    if isinstance(weight, JoinedNVFP4):  # its parts are joined on the device, not in host memory first
        if all(packed.device == device for packed, _ in weight.parts):
            return weight
        kept = {f.name: getattr(weight, f.name) for f in dataclasses.fields(NVFP4Weight) if f.name not in _JOINED}
        parts = [(to_device(packed, device), to_device(scale, device)) for packed, scale in weight.parts]
        return JoinedNVFP4(parts, **{name: _moved(value, device) for name, value in kept.items()})  # type: ignore[return-value]  # W is it
    fields = {f.name: getattr(weight, f.name) for f in dataclasses.fields(weight)}
    moved: dict[str, Any] = {name: _moved(value, device) for name, value in fields.items()}
    if all(moved[name] is fields[name] for name in fields):
        return weight
    return dataclasses.replace(weight, **moved)


_JOINED = ("packed", "block_scale")  # what JoinedNVFP4 joins on demand


def _moved(value: Any, device: torch.device) -> Any:
    return to_device(value, device) if isinstance(value, Tensor) else value
