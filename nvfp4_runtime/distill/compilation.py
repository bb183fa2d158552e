"""Chains of element-wise arithmetic as one pass over memory, where the machine can compile them."""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Callable
from typing import TypeVar

import torch

logger = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., object])


@functools.cache
def compiled(function: F, dynamic: bool = True) -> F:
    """`function` by torch.compile; without a C++ compiler the function itself, several times slower, and a warning.

    dynamic  compile once for all shapes, not once for each
    Intermediate values are rounded as written, so results are the same bits.
    """
    if not _has_compiler():
        return function
    return torch.compile(function, dynamic=dynamic, options={"emulate_precision_casts": True})  # type: ignore[return-value]


@functools.cache
def _has_compiler() -> bool:
    found = any(shutil.which(name) for name in ("g++", "clang++"))
    if not found:
        logger.warning("no C++ compiler (g++ or clang++) is installed: training will take about twice as long")
    return found
