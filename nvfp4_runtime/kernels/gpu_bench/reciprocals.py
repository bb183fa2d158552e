"""What `rcp.approx.ftz.f32` returns on this GPU, bit by bit, for every mantissa there is.

Activation quantisers of other servers use it; the codec rounds its reciprocals correctly. With this table the codec can
be told what the hardware computes. Rows: the bits of 1/6; how often each difference from the correctly rounded bits
occurs over all 2^23 mantissas; whether the exponent matters; and, with --dump, the difference per mantissa as bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nvfp4_runtime.kernels.gpu_bench.setting import Setting

MANTISSAS = 1 << 23


def measure(setting: Setting, dump: Path | None = None) -> None:
    reciprocal = _instruction() if setting.device == "cuda" else lambda x: 1.0 / x
    six = float(reciprocal(torch.full((1,), 6.0, device=setting.place))[0])
    setting.emit(
        {
            "part": "rcp",
            "name": "rcp.approx.ftz(6.0)",
            "bits": f"0x{_bits(torch.tensor([six]))[0].item():08x}",
            "correctly_rounded": f"0x{_bits(1.0 / torch.tensor([6.0]))[0].item():08x}",
        }
    )
    count = MANTISSAS if setting.device == "cuda" else 1 << 10
    mantissas = torch.arange(count, dtype=torch.int32, device=setting.place) * (MANTISSAS // count)
    x = (mantissas | 0x3F800000).view(torch.float32)  # [1, 2)
    off = _off(x, reciprocal)
    values, counts = off.unique(return_counts=True)  # type: ignore[no-untyped-call]  # PyTorch's
    setting.emit(
        {
            "part": "rcp",
            "name": "units off, over all mantissas",
            "mantissas": count,
            "counts": {str(v): c for v, c in zip(values.tolist(), counts.tolist(), strict=True)},
        }
    )
    g = torch.Generator().manual_seed(0)
    # tensor scales as checkpoints store them, amax / 2688 of BF16 maxima, inverted; and scale * (1 / G)
    amax = torch.exp(torch.randn(10_000, generator=g) * 3).to(torch.bfloat16).float().to(setting.place)
    global_scale = 1.0 / (amax / 2688.0)
    e4m3 = torch.arange(1, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(setting.place)
    products = (e4m3.unsqueeze(0) * (1.0 / global_scale[:80]).unsqueeze(1)).flatten()
    for name, values in (("G", global_scale), ("scale * rcp(G)", products)):
        setting.emit(
            {
                "part": "rcp",
                "name": f"units off, {name}",
                "inputs": values.numel(),
                "off": int((_off(values, reciprocal) != 0).sum()),
                "same_as_its_mantissa": bool(torch.equal(_off(values, reciprocal), _off(_normal(values), reciprocal))),
            }
        )
    if dump is not None:
        dump.write_bytes(off.to(torch.int8).cpu().numpy().tobytes())
        setting.emit({"part": "rcp", "name": "dump", "file": str(dump), "bytes": off.numel()})


def _off(x: Tensor, reciprocal: Callable[[Tensor], Tensor]) -> Tensor:
    """Units in the last place between the instruction's result and the correctly rounded one."""
    exact = (1.0 / x.double()).to(torch.float32)  # one rounding of a 53-bit quotient: right unless it lies on a tie
    return _bits(reciprocal(x)) - _bits(exact)


def _normal(x: Tensor) -> Tensor:
    """x with its exponent replaced by that of 1."""
    return ((_bits(x) & 0x7FFFFF) | 0x3F800000).view(torch.float32)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


def _instruction() -> Callable[[Tensor], Tensor]:
    """The instruction over a tensor. Triton is imported here: a rehearsal needs none."""
    from nvfp4_runtime.kernels.gpu_bench.rcp_kernel import reciprocal

    return reciprocal
