"""The canonical forms of a weight, between checkpoint dialects and hardware layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nvfp4_runtime.errors import NVFP4ShapeError
from nvfp4_runtime.nvfp4 import codec, fp8
from nvfp4_runtime.nvfp4.fp8 import FP8Weight
from nvfp4_runtime.nvfp4.mx import MXFP4Weight

_PLAIN_FORMATS: dict[torch.dtype, Literal["bf16", "fp16", "fp32"]] = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
}


@dataclass(frozen=True)
class DenseWeight:
    """A plain weight [N, K] (bfloat16, float16 or float32) with its bias [N] or None."""

    weight: Tensor
    bias: Tensor | None = None

    @property
    def n(self) -> int:
        return self.weight.shape[0]

    @property
    def k(self) -> int:
        return self.weight.shape[1]

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    @property
    def format(self) -> Literal["bf16", "fp16", "fp32"]:
        return _PLAIN_FORMATS[self.weight.dtype]


@dataclass(frozen=True)
class NVFP4Weight:
    """A packed NVFP4 weight, possibly several fused by rows. Names and meanings are ModelOpt's.

    packed           uint8 [N, K/2]   even k in the low nibble
    block_scale      e4m3  [N, K/16]  row-major, not swizzled
    weight_scale_2   fp32  [G]        one multiplier per row group: fused parts may differ, and keep theirs
    group_rows       rows of each of the G groups, summing to N
    input_scale      amax / 2688 of the layer's input, or None where the checkpoint has none (W4A16 only)
    bias             [N] or None
    divisor          fp32 [G] where the checkpoint stores weight_scale_2's reciprocal: `dequantize` divides by it, as
                     the tool does, since block_scale / divisor and block_scale * weight_scale_2 may differ in the last
                     bit. 0 for a group that has none, None where no group has one. Kernels multiply their sums
    pre_quant_scale  fp32 [K]: the layer multiplies its input by it, before any quantisation (AWQ); W itself is as
                     stored. None: nothing to multiply
    """

    packed: Tensor
    block_scale: Tensor
    weight_scale_2: Tensor
    group_rows: tuple[int, ...]
    input_scale: float | None = None
    bias: Tensor | None = None
    divisor: Tensor | None = None
    pre_quant_scale: Tensor | None = None

    def __post_init__(self) -> None:
        codec.check_k(self.k)
        if self.packed.dtype != torch.uint8 or self.block_scale.dtype != torch.float8_e4m3fn:
            raise NVFP4ShapeError(
                f"expected uint8 codes and float8_e4m3fn scales, found {self.packed.dtype} and {self.block_scale.dtype}"
            )
        if tuple(self.block_scale.shape) != (self.n, self.k // codec.BLOCK):
            raise NVFP4ShapeError(
                f"codes [{self.n}, {self.k // 2}] need block scales [{self.n}, {self.k // codec.BLOCK}], "
                f"found {list(self.block_scale.shape)}"
            )
        if tuple(self.weight_scale_2.shape) != (len(self.group_rows),) or sum(self.group_rows) != self.n:
            raise NVFP4ShapeError(
                f"{len(self.group_rows)} row groups {self.group_rows} do not describe {self.n} rows with "
                f"weight_scale_2 {list(self.weight_scale_2.shape)}"
            )
        for name, extra, shape in (
            ("divisor", self.divisor, (self.groups,)),
            ("pre_quant_scale", self.pre_quant_scale, (self.k,)),
        ):
            if extra is not None and (extra.dtype != torch.float32 or tuple(extra.shape) != shape):
                raise NVFP4ShapeError(f"expected {name} float32 {list(shape)}, found {extra.dtype} {list(extra.shape)}")

    @property
    def groups(self) -> int:
        return len(self.group_rows)

    @property
    def n(self) -> int:
        return self.packed.shape[0]

    @property
    def k(self) -> int:
        return self.packed.shape[1] * 2

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.block_scale.nbytes + self.weight_scale_2.nbytes

    @property
    def format(self) -> Literal["nvfp4"]:
        return "nvfp4"

    @property
    def parts(self) -> Sequence[tuple[Tensor, Tensor]]:
        """(packed, block_scale) of runs of rows, in order: joined, they are the two fields of these names."""
        return [(self.packed, self.block_scale)]

    def row_scale_2(self) -> Tensor:
        """weight_scale_2 spread over rows, fp32 [N]."""
        return self._by_row(self.weight_scale_2)

    def dequantize(self) -> Tensor:
        """The weight in float32 [N, K], to the last bit as the checkpoint's tool computes it."""
        scale_2 = self.row_scale_2().unsqueeze(1)
        if self.divisor is None:
            return codec.dequantize(self.packed, self.block_scale, scale_2)
        divisor, scale = self._by_row(self.divisor).unsqueeze(1), self.block_scale.to(torch.float32)
        return codec.scale_blocks(self.packed, torch.where(divisor > 0, scale / divisor, scale * scale_2))

    def _by_row(self, values: Tensor) -> Tensor:
        return torch.cat([value.expand(n) for value, n in zip(values, self.group_rows, strict=True)])

    def operand(self) -> Tensor:
        """code * block scale in bfloat16 [N, K], exact; multiply results by `row_scale_2()`."""
        return codec.operand(self.packed, self.block_scale)


class JoinedNVFP4(NVFP4Weight):
    """Fused weights that stay where they are: `packed` and `block_scale` are joined when they are first asked for.

    A backend that repacks weights reads `parts` instead, and so copies them once, not twice.
    """

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor]], **fields: Any) -> None:
        """fields: those of NVFP4Weight but `packed` and `block_scale`."""
        self.__dict__.update(fields, _parts=parts)

    def __getattr__(self, name: str) -> Tensor:
        if name == "packed":
            found = torch.cat([packed for packed, _ in self.parts])
        elif name == "block_scale":
            # cat is not implemented for float8 everywhere; bytes are bytes
            found = torch.cat([scale.view(torch.uint8) for _, scale in self.parts]).view(torch.float8_e4m3fn)
        else:
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        self.__dict__[name] = found
        return found

    @property
    def parts(self) -> Sequence[tuple[Tensor, Tensor]]:
        parts: Sequence[tuple[Tensor, Tensor]] = self.__dict__["_parts"]
        return parts

    @property
    def n(self) -> int:
        return sum(self.group_rows)

    @property
    def k(self) -> int:
        return 2 * self.parts[0][0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(packed.nbytes + scale.nbytes for packed, scale in self.parts) + self.weight_scale_2.nbytes


Weight = NVFP4Weight | DenseWeight | FP8Weight | MXFP4Weight


def fuse(parts: Sequence[Weight]) -> Weight:
    """Join the rows of weights that share one input (q/k/v, gate/up).

    NVFP4 parts keep their own weight_scale_2, FP8 parts their scales; the largest input_scale serves them all, since
    one activation enters them all. Raises NVFP4ShapeError when formats, K or pre_quant_scales differ: such parts must
    stay apart (see `can_fuse`).
    """
    if not can_fuse(parts):
        found = ", ".join(f"{p.format}[{p.n}, {p.k}]" for p in parts)
        raise NVFP4ShapeError(f"cannot fuse rows of {found}; expected one format and one K")
    bias = _fuse_bias(parts)
    if isinstance(parts[0], DenseWeight):
        return DenseWeight(torch.cat([p.weight for p in parts if isinstance(p, DenseWeight)]), bias)
    if isinstance(parts[0], FP8Weight):
        return fp8.fuse([p for p in parts if isinstance(p, FP8Weight)], bias)
    if isinstance(parts[0], MXFP4Weight):
        mx = [p for p in parts if isinstance(p, MXFP4Weight)]
        return MXFP4Weight(torch.cat([p.packed for p in mx]), torch.cat([p.block_scale for p in mx]), bias)
    packed = [p for p in parts if isinstance(p, NVFP4Weight)]
    input_scales = [p.input_scale for p in packed if p.input_scale is not None]
    return JoinedNVFP4(
        [part for p in packed for part in p.parts],
        weight_scale_2=torch.cat([p.weight_scale_2 for p in packed]),
        group_rows=tuple(r for p in packed for r in p.group_rows),
        input_scale=max(input_scales) if input_scales else None,
        bias=bias,
        divisor=_fuse_divisors(packed),
        pre_quant_scale=packed[0].pre_quant_scale,
    )


def can_fuse(parts: Sequence[Weight]) -> bool:
    """Whether `fuse` accepts these parts."""
    if all(isinstance(p, FP8Weight) for p in parts):
        return fp8.can_fuse([p for p in parts if isinstance(p, FP8Weight)])
    has_scale = {isinstance(p, NVFP4Weight) and p.input_scale is not None for p in parts}
    one_form = len({p.format for p in parts}) == 1 and len({p.k for p in parts}) == 1 and len(has_scale) == 1
    return one_form and _one_input([p for p in parts if isinstance(p, NVFP4Weight)])


def _one_input(parts: Sequence[NVFP4Weight]) -> bool:
    """Whether the same activation may enter all parts: no pre_quant_scale, or one and the same."""
    scales = [p.pre_quant_scale for p in parts if p.pre_quant_scale is not None]
    return not scales or (len(scales) == len(parts) and all(torch.equal(s, scales[0]) for s in scales))


def _fuse_divisors(parts: Sequence[NVFP4Weight]) -> Tensor | None:
    if all(p.divisor is None for p in parts):
        return None
    return torch.cat([torch.zeros_like(p.weight_scale_2) if p.divisor is None else p.divisor for p in parts])


def _fuse_bias(parts: Sequence[Weight]) -> Tensor | None:
    if all(p.bias is None for p in parts):
        return None
    dtype = next(p.bias.dtype for p in parts if p.bias is not None)
    return torch.cat([torch.zeros(p.n, dtype=dtype) if p.bias is None else p.bias for p in parts])
