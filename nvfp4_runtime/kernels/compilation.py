"""What a kernel file declares about its compilation, so that machines without a GPU can check it.

A file of Triton kernels offers `compilations() -> list[Compilation]`; tests/kernels/triton/ahead.py compiles them all,
for every target they name, and looks at what came out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TARGETS = (80, 89, 90, 100, 103, 120, 121)


@dataclass(frozen=True)
class Compilation:
    """One kernel at one set of compile-time values, and what its machine code must show.

    name         in reports: unique within its module
    kernel       the @triton.jit function
    signature    argument -> "*bf16", "*u8", "i32", "fp32", ...; arguments in `constexprs` are left out
    constexprs   argument -> value
    num_warps, num_stages
    expect       instructions that PTX or SASS must contain, on every target
    expect_on    target -> more of them
    forbid       instructions neither may contain
    targets      compute capabilities, as 90 for 9.0 (compiled as sm_90a)
    max_stack    bytes of stack a thread may have: spilled registers
    unaligned    pointers and integers that are not multiples of 16; all others are promised to be
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    expect: tuple[str, ...] = ()
    expect_on: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    forbid: tuple[str, ...] = ()
    targets: tuple[int, ...] = TARGETS
    max_stack: int = 0
    unaligned: tuple[str, ...] = ()
