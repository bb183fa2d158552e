"""Where a part of the benchmark runs and how large it is, and the one way it says what it found."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Setting:
    """device  "cuda", or "cpu" for a rehearsal: Triton's interpreter, tiny shapes, the same code paths.

    seconds  of timing per case
    emit     takes one finding, at once: what comes later may take the process with it
    """

    device: Literal["cpu", "cuda"]
    seconds: float = 0.1
    emit: Emit = field(default=lambda row: print(json.dumps(row), flush=True))

    @property
    def tiny(self) -> bool:
        return self.device == "cpu"

    @property
    def place(self) -> torch.device:
        return torch.device(self.device)

    def num_cold_bytes(self) -> int:
        """Bytes to walk so that each is read from memory: three times the last-level cache of the GPU."""
        if self.tiny:
            return 1
        return 3 * int(torch.cuda.get_device_properties(self.place).L2_cache_size)

    def copies(self, num_bytes: int) -> int:
        """How many copies of `num_bytes` that makes."""
        return max(1, -(-self.num_cold_bytes() // num_bytes))

    @contextmanager
    def attempt(self, row: dict[str, Any]) -> Iterator[None]:
        """A case that fails becomes a finding, `row` with "failed"; the cases after it still run."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  # compilers, CUDA and our own code each raise their own kinds
            self.emit(row | {"failed": f"{type(error).__name__}: {str(error).strip()[:400]}"})
