"""Native linear layers against FP64 of the exact operands; a row never depends on its neighbours."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.ops import LinearSpec
from nvfp4_runtime.nvfp4 import codec
from nvfp4_runtime.nvfp4.weight import DenseWeight, NVFP4Weight, fuse
from tests.kernels.conftest import cpu_backend, random_nvfp4, random_tensor, same_bits

SHAPES = [(16, 16), (1, 16), (17, 32), (40, 48), (64, 80), (33, 112), (96, 576), (50, 1536), (200, 80)]
NAMES: dict[torch.dtype, Any] = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
HALF_STEP = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-23}  # of the final rounding, with room for a tie


def spec_of(weight: NVFP4Weight | DenseWeight, dtype: torch.dtype, out: torch.dtype, numerics: Any) -> LinearSpec:
    return LinearSpec(weight.n, weight.k, weight.format, numerics, NAMES[dtype], NAMES[out])  # type: ignore[arg-type]  # format is one of the names


def assert_close_to_exact(
    y: Tensor, x: Tensor, w: Tensor, row_scale: Tensor, bias: Tensor | None, k: int, digits: bool = False
) -> None:
    """x, w are fp64 operands. The sum may be off by NativeLinearNVFP4's bound; then one rounding.

    digits: x enters as two int8 digits, off by half a step of 1/32512 of its block's largest value (and by the FP32
    roundings of that scale and its reciprocal: 2^-22 of x).
    """
    exact = (x @ w.t()) * row_scale
    room = (k / 16 + 18) * 2.0**-24 * (x.abs() @ w.abs().t()) * row_scale
    if digits:
        amax = x.abs().unflatten(1, (-1, 16)).amax(dim=2).repeat_interleave(16, dim=1)
        room = room + (amax * (0.5 / 32512) + x.abs() * 2.0**-22) @ w.abs().t() * row_scale
    if bias is not None:
        exact = exact + bias.double()
        room = room + 2.0**-24 * exact.abs()
    room = room + HALF_STEP[y.dtype] * exact.abs()
    worst = ((y.double() - exact).abs() - room).max()
    assert worst <= 0, f"off by {float(worst)} more than the bound"


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("m", [1, 5, 33])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("out", [torch.bfloat16, torch.float32])
def test_w4a16_agrees_with_fp64_of_the_exact_operands(
    isa: str, n: int, k: int, m: int, dtype: torch.dtype, out: torch.dtype
) -> None:
    groups = (n // 2, n - n // 2) if n > 1 else (1,)
    weight = random_nvfp4(n, k, seed=n + k, groups=groups, bias=m == 5)
    x = random_tensor(m, k, seed=m, dtype=dtype)
    backend = cpu_backend(isa)
    digits = dtype == torch.bfloat16 and backend.describe()["w4a16 operand"] == "two int8 digits"
    y = backend.linear(weight, spec_of(weight, dtype, out, "w4a16"))(x)
    assert y.dtype == out
    row_scale = weight.row_scale_2().double()
    assert_close_to_exact(y, x.double(), weight.operand().double(), row_scale, weight.bias, k, digits)


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("m", [1, 7, 30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_w4a8_agrees_with_fp64_of_the_codecs_integers(isa: str, n: int, k: int, m: int, dtype: torch.dtype) -> None:
    weight = random_nvfp4(n, k, seed=n + k, bias=m == 7)
    x = random_tensor(m, k, seed=m, dtype=dtype) * torch.logspace(-3, 3, m).unsqueeze(1).to(dtype)
    y = cpu_backend(isa).linear(weight, spec_of(weight, dtype, torch.float32, "w4a8"))(x)
    codes, scale = codec.quantize_int8(x)
    operand = codes.double() * scale.double().repeat_interleave(16, dim=1)
    assert_close_to_exact(y, operand, weight.operand().double(), weight.row_scale_2().double(), weight.bias, k)


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("m", [1, 7, 30])
def test_w4a4_agrees_with_fp64_of_the_exact_operands(isa: str, n: int, k: int, m: int) -> None:
    weight = random_nvfp4(n, k, seed=n + k, bias=m == 7, input_scale=0.0017)
    x = random_tensor(m, k, seed=m)
    y = cpu_backend(isa).linear(weight, spec_of(weight, torch.bfloat16, torch.float32, "w4a4"))(x)
    input_scale = torch.tensor(0.0017)
    operand = codec.activation_operand(x, input_scale).double()
    row_scale = (input_scale * weight.row_scale_2()).double()
    assert_close_to_exact(y, operand, weight.operand().double(), row_scale, weight.bias, k)


@pytest.mark.parametrize("wtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 33), (64, 64), (130, 576), (19, 100), (200, 100)])
@pytest.mark.parametrize("m", [1, 2, 7, 20])
def test_plain_weights_agree_with_fp64(
    isa: str, wtype: torch.dtype, dtype: torch.dtype, n: int, k: int, m: int
) -> None:
    weight = DenseWeight(random_tensor(n, k, seed=n, dtype=wtype), random_tensor(n, seed=3) if m == 2 else None)
    x = random_tensor(m, k, seed=m, dtype=dtype)
    for out in (torch.bfloat16, torch.float32):
        y = cpu_backend(isa).linear(weight, spec_of(weight, dtype, out, None))(x)
        one = torch.ones((), dtype=torch.float64)
        assert_close_to_exact(y, x.double(), weight.weight.double(), one, weight.bias, k)


@pytest.mark.parametrize("kind", ["w4a16", "w4a8", "w4a4", "bf16"])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(isa: str, kind: str) -> None:
    k, n = 592, 200  # 37 groups: the last block of 64 is not full; 200 rows: nor is the last panel; enough for streams
    weight: NVFP4Weight | DenseWeight = random_nvfp4(n, k, seed=1, input_scale=0.002)
    if kind == "bf16":
        weight = DenseWeight(random_tensor(n, k, seed=1))
    spec = spec_of(weight, torch.bfloat16, torch.float32, None if kind == "bf16" else kind)
    x = random_tensor(70, k, seed=2)
    alone = cpu_backend(isa, 1).linear(weight, spec)
    rows = torch.cat([alone(x[i : i + 1]) for i in range(70)])
    kernels = {t: cpu_backend(isa, t).linear(weight, spec) for t in (1, 2, 3)}
    for m in range(1, 71):
        assert same_bits(kernels[1 + m % 3](x[:m]), rows[:m]), f"m={m}"
        assert same_bits(kernels[1 + (m + 1) % 3](x[70 - m :]), rows[70 - m :]), f"last {m} rows"


def test_more_rows_than_one_pass_holds_give_the_same_bits(isa: str) -> None:
    weight = random_nvfp4(20, 64, seed=4)
    kernel = cpu_backend(isa, 2).linear(weight, spec_of(weight, torch.float32, torch.float32, "w4a16"))
    dense = DenseWeight(random_tensor(20, 60, seed=5))
    plain = cpu_backend(isa, 2).linear(dense, spec_of(dense, torch.float32, torch.float32, None))
    x = random_tensor(1100, 64, seed=6, dtype=torch.float32)
    assert same_bits(kernel(x), torch.cat([kernel(x[i : i + 7].contiguous()) for i in range(0, 1100, 7)]))
    z = x[:, :60].contiguous()
    assert same_bits(plain(z), torch.cat([plain(z[i : i + 7].contiguous()) for i in range(0, 1100, 7)]))


def hard_activations(dtype: torch.dtype) -> Tensor:
    """Ties, zeros, huge and tiny values, NaN and infinities, one kind per row."""
    g = torch.Generator().manual_seed(9)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    rows = [
        torch.cat([ties, -ties]).repeat(3),
        torch.zeros(48),
        -torch.zeros(48),
        torch.randn(48, generator=g) * 1e30,
        torch.randn(48, generator=g) * 1e-30,
        torch.randn(48, generator=g) * 1e-42,
        torch.randint(-8, 9, (48,), generator=g) / 4,
        torch.where(torch.arange(48) == 5, torch.tensor(torch.nan), torch.randn(48, generator=g)),
        torch.where(torch.arange(48) == 20, torch.tensor(torch.inf), torch.randn(48, generator=g)),
    ]
    return torch.cat([torch.stack(rows), torch.randn(200, 48, generator=g)]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("input_scale", [1.0 / 448, 1.0 / 2688, 0.0031, 1e-30, 7.0])
def test_activation_codes_are_those_of_the_codec_bit_for_bit(isa: str, dtype: torch.dtype, input_scale: float) -> None:
    x = hard_activations(dtype)
    m, k = x.shape
    codes, scales = torch.empty(m, k, dtype=torch.uint8), torch.empty(m, k // 16, dtype=torch.uint8)
    scale = torch.tensor(input_scale)
    context = cpu_backend(isa)._context
    context.quantize_activation(
        x.data_ptr(), 1 if dtype == torch.bfloat16 else 0, m, k, float(scale), codes.data_ptr(), scales.data_ptr()
    )
    want_codes, want_scales = codec.quantize_activation(x, scale)
    assert torch.equal(scales & 0x7F, want_scales.view(torch.uint8) & 0x7F)  # the sign of a NaN means nothing
    nan = want_scales.float().isnan().repeat_interleave(16, dim=1)
    assert torch.equal(codes[~nan], want_codes[~nan])


@pytest.mark.parametrize("numerics", ["w4a16", "w4a8", "w4a4"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_in_a_row_stays_in_that_row(isa: str, numerics: str, value: float) -> None:
    weight = random_nvfp4(32, 64, seed=1, input_scale=0.01)
    kernel = cpu_backend(isa).linear(weight, spec_of(weight, torch.bfloat16, torch.bfloat16, numerics))
    x = random_tensor(6, 64, seed=2)
    clean = kernel(x)
    x[3, 17] = value
    y = kernel(x)
    if numerics != "w4a4":  # there an infinity saturates
        assert not bool(y[3].isfinite().any())
    keep = torch.tensor([0, 1, 2, 4, 5])
    assert same_bits(y[keep], clean[keep])


def test_negative_block_scales_keep_their_sign(isa: str) -> None:
    weight = random_nvfp4(16, 32, seed=1)
    negative = NVFP4Weight(
        weight.packed, (-weight.block_scale.float()).to(torch.float8_e4m3fn), weight.weight_scale_2, (16,)
    )
    x, backend = random_tensor(3, 32, seed=2), cpu_backend(isa)
    spec = spec_of(weight, torch.bfloat16, torch.float32, "w4a16")
    assert torch.equal(backend.linear(negative, spec)(x), -backend.linear(weight, spec)(x))


def test_a_nan_block_scale_is_refused_with_its_place() -> None:
    weight = random_nvfp4(16, 32, seed=1)
    weight.block_scale.view(torch.uint8)[3, 1] = 0x7F
    with pytest.raises(KernelError, match=r"block scale \[3, 1\] is NaN"):
        cpu_backend().linear(weight, spec_of(weight, torch.bfloat16, torch.float32, "w4a16"))


def test_packed_kernel_does_not_keep_the_original_and_dense_shares_it() -> None:
    weight = random_nvfp4(64, 64, seed=1)
    spec = spec_of(weight, torch.bfloat16, torch.float32, "w4a16")
    kernel = cpu_backend().linear(weight, spec)
    gone = [weakref.ref(weight.packed), weakref.ref(weight.block_scale)]
    del weight
    assert [r() for r in gone] == [None, None]
    assert kernel.weight_bytes == 64 * 64 * 9 // 16 + 64 * 4

    dense = DenseWeight(random_tensor(8, 32, seed=1))
    plain = cpu_backend().linear(dense, spec_of(dense, torch.float32, torch.float32, None))
    x = random_tensor(2, 32, seed=2, dtype=torch.float32)
    before = plain(x)
    dense.weight.mul_(2)  # the very memory, not a copy
    assert torch.equal(plain(x), before * 2)


def test_misaligned_and_offset_views_are_read_correctly(isa: str) -> None:
    weight = random_nvfp4(16, 48, seed=1)
    kernel = cpu_backend(isa).linear(weight, spec_of(weight, torch.bfloat16, torch.float32, "w4a16"))
    storage = random_tensor(1 + 5 * 48, seed=2)
    view = storage[1:].view(5, 48)  # contiguous, but two bytes past any alignment
    assert same_bits(kernel(view), kernel(view.clone()))


def test_an_empty_batch_gives_an_empty_result(isa: str) -> None:
    weight = random_nvfp4(16, 48, seed=1)
    kernel = cpu_backend(isa).linear(weight, spec_of(weight, torch.bfloat16, torch.float32, "w4a16"))
    assert kernel(random_tensor(0, 48, seed=1)).shape == (0, 16)


def bad_inputs() -> dict[str, Tensor]:
    return {
        "another K": random_tensor(2, 32, seed=1),
        "another dtype": random_tensor(2, 48, seed=1, dtype=torch.float32),
        "a vector": random_tensor(48, seed=1),
        "columns of a wider tensor": random_tensor(2, 96, seed=1)[:, :48],
        "transposed": random_tensor(48, 2, seed=1).t(),
        "another device": torch.empty(2, 48, dtype=torch.bfloat16, device="meta"),
    }


@pytest.mark.parametrize("case", bad_inputs().keys())
def test_wrong_activations_are_refused_with_what_was_found(case: str) -> None:
    weight, dense = random_nvfp4(16, 48, seed=1), DenseWeight(random_tensor(16, 48, seed=1))
    for w, numerics in ((weight, "w4a16"), (dense, None)):
        kernel = cpu_backend().linear(w, spec_of(w, torch.bfloat16, torch.float32, numerics))
        with pytest.raises(KernelError, match=r"x: expected a contiguous torch.bfloat16 tensor \[any, 48\] on cpu"):
            kernel(bad_inputs()[case])


def test_parts_of_any_height_are_packed_like_their_joined_tensors(isa: str) -> None:
    parts = [random_nvfp4(n, 64, seed=n, bias=n == 23) for n in (5, 23, 16, 1)]  # panels of 16 rows begin inside them
    fused = fuse(parts)
    assert isinstance(fused, NVFP4Weight)
    assert len(fused.parts) == 4
    joined = NVFP4Weight(
        fused.packed, fused.block_scale, fused.weight_scale_2, fused.group_rows, fused.input_scale, fused.bias
    )
    x = random_tensor(3, 64, seed=1, dtype=torch.bfloat16)
    spec = spec_of(joined, torch.bfloat16, torch.float32, "w4a16")
    assert same_bits(cpu_backend(isa).linear(fused, spec)(x), cpu_backend(isa).linear(joined, spec)(x))
