"""A treatment: new tensors for a layer, computed when they are written, and what is said about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from nvfp4_runtime.checkpoint.doctor.report import Change, Finding
from nvfp4_runtime.checkpoint.writer import TensorSpec

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Treatment:
    """New tensors for one layer or one group of layers.

    specs    what `make` will return
    make     computes them: one layer's tensors in memory
    changes  what it does, for people
    exact    layers whose weights must dequantise to the same bits afterwards
    """

    specs: tuple[TensorSpec, ...]
    make: Callable[[], Tensors]
    changes: tuple[Change, ...]
    exact: tuple[str, ...] = ()


@dataclass
class Plan:
    """Every treatment, the tensors that are left out, and cures that were not applied, with the reason."""

    treatments: list[Treatment] = field(default_factory=list)
    dropped: set[str] = field(default_factory=set)
    changes: list[Change] = field(default_factory=list)
    refused: list[Finding] = field(default_factory=list)
