"""Which machines have FP4 tensor cores that we know how to drive: a set, not a ladder.

A larger number is not a superset: 12.0 lacks 10.0's tensor memory, and Hopper (9.0) passes PyTorch's own check for
scaled_mm and fails inside cuBLASLt. Nothing in this set has been run by us yet; `probe.py` therefore multiplies known
matrices on the machine before a layer is handed to it.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib import metadata

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Tile:
    """How the kernel for few tokens is cut on a machine.

    weight_rows  outputs per program, on the M side of the instruction
    block_k      inputs per step
    """

    weight_rows: int
    block_k: int
    num_warps: int
    num_stages: int
    least_triton: tuple[int, int]


# 10.x: `tl.dot_scaled` becomes tcgen05 mxf4nvf4 only with 128 rows on the M side; with fewer it does not compile
# (Triton 3.6) or falls back to BF16 without a word (3.9). 12.x: mma.sync mxf4nvf4 at any tile; four warps spill at
# 128x128x256, and shared memory is 99 KiB. few_tokens.compilations() asserts the instruction for each.
TILES = {
    100: Tile(128, 256, 4, 4, (3, 6)),
    103: Tile(128, 256, 4, 4, (3, 6)),
    120: Tile(128, 128, 8, 4, (3, 6)),
    121: Tile(128, 128, 8, 4, (3, 9)),
}
CAPABILITIES = frozenset(TILES)
READABLE = (100, 120)  # machine code of 10.3 and 12.1 is not decoded by Triton 3.6's tools; their PTX is looked at
INTERPRETED = Tile(128, 128, 4, 1, (3, 6))


def capability(device: torch.device) -> int:
    """10 * major + minor of a CUDA device, e.g. 100 for B200."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def refuses_machine(device: torch.device) -> str | None:
    """Why `device` cannot multiply NVFP4 natively, for a person to read, or None."""
    if not hasattr(F, "scaled_mm"):
        return f"needs torch >= 2.10 (torch.nn.functional.scaled_mm), found {torch.__version__}"
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"needs an NVIDIA GPU of compute capability {_listed()}, found device {device.type}"
    found = capability(device)
    if found not in CAPABILITIES:
        return f"needs compute capability {_listed()}, found {found // 10}.{found % 10}"
    if importlib.util.find_spec("triton") is None:
        return "needs triton, which quantises activations: pip install triton"
    return None


def tile_for(found: int) -> tuple[Tile | None, str]:
    """The tile of the kernel for few tokens, or None and why scaled_mm must serve them as well."""
    tile = TILES[found]
    version = metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < tile.least_triton:
        least = ".".join(map(str, tile.least_triton))
        return None, f"tl.dot_scaled for {found // 10}.{found % 10} needs triton >= {least}, found {version}"
    return tile, ""


def _listed() -> str:
    return ", ".join(f"{c // 10}.{c % 10}" for c in sorted(CAPABILITIES))
