"""What the doctor says, as data. These classes are the JSON of `nvfp4 inspect --json`; names only ever get added.

Report.schema counts breaking changes. Sizes are bytes, scales are multipliers whatever the dialect stores, shares lie
between 0 and 1, and what was not measured is null.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SCHEMA = 1
NO_DECIBELS = 999.0  # sqnr_db of equal weights; negative where the distance is not finite: JSON has no infinity

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong or worth knowing.

    id        stable, for programs: "block-scale-nan"
    severity  error: it serves wrong answers or none. warning: it may elsewhere, or costs quality. info: good to know
    message   what was found, with the numbers
    remedy    what to do about it
    layers    every module, tensor or file it concerns
    """

    id: str
    severity: Severity
    message: str
    remedy: str
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scales:
    """The range of a layer's scales.

    block_min, block_max  smallest positive and largest block scale (or FP8 scale), without the tensor scale
    tensor                weight_scale_2 as a multiplier; the largest, where a layer holds several
    input                 input_scale as a multiplier
    zero_blocks           share of blocks whose codes are all zero
    saturated_blocks      share of blocks at E4M3's maximum that hold several codes of magnitude 6: clipped values
    """

    block_min: float | None = None
    block_max: float | None = None
    tensor: float | None = None
    input: float | None = None
    zero_blocks: float | None = None
    saturated_blocks: float | None = None


@dataclass(frozen=True)
class Layer:
    """One module with weights.

    stored           "nvfp4", "fp8", "mxfp4", "bf16", ...; "incomplete nvfp4" and the like when scales are missing
    shape            logical, [out, in] for a linear layer; experts kept as one tensor have a leading axis
    bytes            codes, scales and bias together
    excluded         whether the declared exclusions cover it; None where nothing is declared quantised
    why              the reason for its format: the pattern that excludes it, the declaration, or what contradicts them
    sqnr_db          signal to quantisation noise against the parent, over the whole weight
    relative_error   |w - parent| / |parent|, Frobenius; None where it is not finite
    """

    name: str
    stored: str
    shape: tuple[int, ...]
    parameters: int
    bytes: int
    bits_per_weight: float
    excluded: bool | None
    why: str
    scales: Scales | None = None
    sqnr_db: float | None = None
    relative_error: float | None = None


@dataclass(frozen=True)
class Group:
    """Layers that differ only in their numbers and are stored alike; `name` has * for the numbers."""

    name: str
    count: int
    stored: str
    shape: tuple[int, ...]
    parameters: int
    bytes: int
    bits_per_weight: float
    excluded: bool | None
    why: str
    input_scale: bool
    scales: Scales | None = None
    worst_sqnr_db: float | None = None


@dataclass(frozen=True)
class Fit:
    """What a memory of `memory_bytes` holds: weights, and tokens of KV cache in what remains (None: size unknown)."""

    memory_bytes: int
    weights_fit: bool
    kv_tokens: int | None


@dataclass(frozen=True)
class Change:
    """One thing `--repair` did differently from the original; `exact`: every weight dequantises to the same bits."""

    finding: str
    layer: str
    what: str
    exact: bool


@dataclass(frozen=True)
class Repair:
    """What `--repair` wrote: `remaining` are findings of the original it did not fix and findings of the copy."""

    out: str
    changes: tuple[Change, ...]
    remaining: tuple[Finding, ...]


@dataclass(frozen=True)
class Parent:
    """How far the checkpoint is from its parent.

    compared    quantised layers measured, worst first
    missing     quantised layers that the parent lacks, or has in another shape
    sqnr_db     over all of them together
    """

    path: str
    compared: tuple[str, ...]
    missing: tuple[str, ...]
    sqnr_db: float | None


@dataclass(frozen=True)
class Report:
    """Everything `nvfp4 inspect` knows of one folder. `seconds` is the time it took."""

    schema: int
    path: str
    architecture: str
    files: int
    method: str
    algo: str | None
    kv_algo: str | None
    producer: str
    exclude: tuple[str, ...]
    layers: tuple[Layer, ...]
    groups: tuple[Group, ...]
    parameters: int
    bytes: int
    bytes_by_format: dict[str, int]
    ratio_to_bf16: float
    kv_dtype: str
    kv_bytes_per_token: int | None
    fits: tuple[Fit, ...]
    findings: tuple[Finding, ...]
    parent: Parent | None
    repair: Repair | None
    seconds: float

    @property
    def sound(self) -> bool:
        """No errors and no warnings; of the repaired copy, where there is one."""
        judged = self.findings if self.repair is None else self.repair.remaining
        return all(finding.severity == "info" for finding in judged)
