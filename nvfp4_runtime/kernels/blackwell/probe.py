"""Does this machine multiply NVFP4 as it says? Known matrices, multiplied once, before a layer is trusted to a path.

Compute capability, PyTorch's cuBLASLt and Triton's code generator each have versions in which FP4 fails, some only when
called. A path that fails here is not used, and the reason is in the log and in the report; nothing fails in a request.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nvfp4_runtime.kernels.ops import LinearKernel
from nvfp4_runtime.nvfp4 import codec
from nvfp4_runtime.nvfp4.weight import NVFP4Weight

N, K = 256, 512
INPUT_SCALE = 2.0**-10


def known_weight() -> NVFP4Weight:
    """Every code and many block scales, two weight_scale_2 that differ."""
    g = torch.Generator().manual_seed(4)
    return NVFP4Weight(
        packed=torch.randint(0, 256, (N, K // 2), generator=g, dtype=torch.uint8),
        block_scale=torch.randint(0x28, 0x58, (N, K // 16), generator=g, dtype=torch.uint8).view(torch.float8_e4m3fn),
        weight_scale_2=torch.tensor([2.0**-8, 2.0**-6]),
        group_rows=(128, 128),
        input_scale=INPUT_SCALE,
    )


def known_input(m: int) -> Tensor:
    """bfloat16 [m, K], whole E2M1 multiples of each block's step: an ulp in a reciprocal moves no code."""
    g = torch.Generator().manual_seed(m)
    codes = torch.randint(0, 16, (m, K), generator=g, dtype=torch.uint8)
    codes[:, ::16] = 7  # 6, the largest: the block's scale is the power of two it is made with
    exponents = torch.randint(-2, 5, (m, K // 16, 1), generator=g)
    values = codec.decode_e2m1(codes).view(m, K // 16, 16) * torch.pow(2.0, exponents.float())
    return (values.view(m, K) * INPUT_SCALE).to(torch.bfloat16)


def expected(weight: NVFP4Weight, x: Tensor) -> tuple[Tensor, Tensor]:
    """The exact product in FP64 [m, N], and the sum of its terms' magnitudes."""
    x_operand = codec.activation_operand(x, torch.tensor(INPUT_SCALE)).double() * INPUT_SCALE
    w_operand = weight.operand().double() * weight.row_scale_2().double().unsqueeze(1)
    return x_operand @ w_operand.t(), x_operand.abs() @ w_operand.abs().t()


def check(make: Callable[[NVFP4Weight], LinearKernel], m: int, device: torch.device) -> str | None:
    """What is wrong with the kernel `make` gives at `m` rows, for a person to read, or None."""
    weight, x = known_weight(), known_input(m)
    try:
        y = make(weight)(x.to(device)).cpu().double()
    except Exception as error:  # noqa: BLE001  # cuBLASLt, NVRTC, ptxas and Triton's passes each raise their own
        return f"a known product failed at M={m}: {type(error).__name__}: {str(error).strip()[:300]}"
    exact, magnitude = expected(weight, x)
    # one rounding to bfloat16, and FP32 sums of K terms whatever their order, with room for narrower adders
    room = 2.0**-8 * exact.abs() + 2.0**-14 * magnitude
    excess = ((y - exact).abs() - room).max()
    if not bool(excess <= 0):
        return f"a known product came out wrong at M={m}: off by {float((y - exact).abs().max()):.3g}"
    return None
