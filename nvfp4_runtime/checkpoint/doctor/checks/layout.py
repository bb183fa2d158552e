"""Bytes in another order than the format's: swizzled scales, swapped nibbles, scales packed once more."""

from __future__ import annotations

import math
from collections.abc import Iterable

from nvfp4_runtime.checkpoint.detect import W4A8
from nvfp4_runtime.checkpoint.doctor.case import Case, about
from nvfp4_runtime.checkpoint.doctor.measure import Measured
from nvfp4_runtime.checkpoint.doctor.report import Finding
from nvfp4_runtime.checkpoint.shards import Shards
from nvfp4_runtime.checkpoint.stored import StoredLayer
from nvfp4_runtime.errors import MissingTensorError
from nvfp4_runtime.nvfp4.layouts import swizzled_shape

# Real weights have rows and columns of different size. Of the 60 layers of SmolLM2-135M that are whole tiles, stored in
# order, they explained 3 to 50 % of the scales' variance, and at most a sixth of that read as tiles; of all its 210
# layers, cut to whole tiles, at most 0.9 of it (the narrowest, v_proj's).
_STRUCTURE, _FACTOR = 0.03, 1.5
_MAJORITY = 0.5


def scales_swizzled(case: Case) -> Iterable[Finding]:
    """Scales in the 128 x 4 tiles of Blackwell's tensor cores: certain by their shape or a parent, likely by order."""
    certain = [layer for layer in case.layers if is_surely_swizzled(case.shards, layer)]
    yield from about(
        "scales-swizzled",
        "error",
        certain,
        "have block scales stored in 128 x 4 tiles (a kernel's private layout); on disk they are row-major",
        "export again, or --repair, which puts them in order",
    )
    if case.has_parent:
        return
    structured = [m for m in case.nvfp4 if m.order and max(m.order.as_stored, m.order.as_tiles) > _STRUCTURE]
    tiled = [m for m in structured if m.order and m.order.as_tiles > _FACTOR * max(m.order.as_stored, 0)]
    if tiled and len(tiled) > _MAJORITY * len(structured):
        yield from about(
            "scales-swizzled",
            "warning",
            tiled,
            f"seem to have block scales in 128 x 4 tiles: read so, rows and columns explain more of their variance "
            f"({len(tiled)} of the {len(structured)} layers with any such structure)",
            "compare with the parent (--parent): it makes this certain, and --repair can then put them in order",
        )


def is_surely_swizzled(shards: Shards, layer: Measured) -> bool:
    if layer.comparison is not None:
        return layer.comparison.misread == "swizzled"
    return padded_scale(shards, layer.stored) is not None


def padded_scale(shards: Shards, stored: StoredLayer) -> tuple[int, int] | None:
    """(N, K/16) of a packed weight whose E4M3 scales have just the size of padded tiles and no shape of the format."""
    if stored.problem is None or isinstance(stored.problem, MissingTensorError) or "tensor_scale" not in stored.tensors:
        return None
    names = stored.tensors
    weight = shards.info(names.get("weight", ""))
    scale = shards.info(names.get("block_scale", names.get("scale", "")))
    if weight is None or scale is None or weight.dtype != "U8" or scale.dtype != "F8_E4M3" or len(weight.shape) != 2:
        return None
    n, cols = weight.shape[0], weight.shape[1] // 8
    if weight.shape[1] % 8 or not n or not cols or scale.shape == (n, cols):
        return None
    return (n, cols) if math.prod(scale.shape) == math.prod(swizzled_shape(n, cols)) else None


def nibbles_swapped(case: Case) -> Iterable[Finding]:
    swapped = [m for m in case.layers if m.comparison is not None and m.comparison.misread == "nibbles"]
    yield from about(
        "nibbles-swapped",
        "error",
        swapped,
        "have the two codes of every byte in the wrong order: they fit the parent only with the high nibble first",
        "export again, or --repair, which swaps them",
    )


def unseen(case: Case) -> Iterable[Finding]:
    """What no look at this folder alone can tell."""
    if case.has_parent or not case.nvfp4:
        return
    yield Finding(
        "unseen-without-parent",
        "info",
        "the order of nibbles, and whether the weights are those of the model they are named after, cannot be seen "
        "without the parent; swizzled scales only by their statistics or their shape",
        "give the BF16 model with --parent",
    )


def scales_halved(case: Case) -> Iterable[Finding]:
    """One scale per 32 weights where one per 16 is declared: half of them are gone, or packed two to a byte."""
    halved = [m for m in case.nvfp4 if m.stored.block == (1, 32) and case.algos(m.name)]
    yield from about(
        "block-scale-halved",
        "error",
        [m for m in halved if W4A8 not in case.algos(m.name)],
        f"have one block scale per 32 weights, which only {W4A8} has, and another algorithm is declared",
        "export again; a size-saving re-export (--low_memory_mode) does this",
    )


def double_scales(case: Case) -> Iterable[Finding]:
    """Scales that a size-saving re-export quantised once more."""
    names = [info.name for info in case.shards if info.name.endswith("_double_scale")]
    yield from about(
        "double-scale",
        "error",
        names,
        "belong to a compressed re-export (--low_memory_mode) whose block scales are themselves quantised",
        "export again without that mode; such scales cannot be read by any server known to us",
    )
