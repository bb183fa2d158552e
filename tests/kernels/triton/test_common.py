"""Numbers by their bits, over all of them where that is possible; and the decoding assembly, read as text."""

from __future__ import annotations

import re

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp4_runtime.kernels.triton import gemm_pieces
from nvfp4_runtime.kernels.triton.backend import TritonBackend
from nvfp4_runtime.kernels.triton.common import (
    e2m1_to_float,
    e4m3_to_float,
    emulated,
    float_to_bfloat16,
    float_to_e2m1,
    float_to_e4m3,
)
from nvfp4_runtime.kernels.triton.layout import NVFP4_BASE
from nvfp4_runtime.nvfp4 import codec
from tests.kernels.conftest import same_bits


@triton.jit
def apply(x, y, n, WHAT: tl.constexpr, SIZE: tl.constexpr, EMULATED: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = tl.load(x + i, mask=i < n, other=0)
    if WHAT == 0:
        found = e4m3_to_float(value)
    elif WHAT == 1:
        found = e2m1_to_float(value.to(tl.int32))
    elif WHAT == 2:
        found = float_to_bfloat16(value, EMULATED)
    elif WHAT == 3:
        found = float_to_e4m3(value)
    else:
        found = float_to_e2m1(value).to(tl.uint8)
    tl.store(y + i, found, mask=i < n)


def applied(backend: TritonBackend, what: int, x: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.empty(x.shape, dtype=dtype, device=backend.device)
    apply[(triton.cdiv(x.numel(), 4096),)](x.to(backend.device), y, x.numel(), what, 4096, emulated())
    return y.cpu()


def floats_to_round() -> Tensor:
    """Midpoints of E4M3, E2M1 and bfloat16 with their neighbours, specials, and random bits; both signs."""
    table = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    small = codec.e2m1_table()[:8]
    middles = torch.cat([(t[1:] + t[:-1]) / 2 for t in (table, small)])
    g = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31 - 1, (20000,), generator=g).to(torch.int32)
    ties = (bits[:5000] & ~0xFFFF) | 0x8000
    up, down = middles.nextafter(torch.tensor(1e9)), middles.nextafter(torch.tensor(-1e9))
    special = torch.tensor([0.0, 448.0, 463.9, 464.0, 465.0, 1e30, float("inf"), float("nan"), 2.0**-10, 2.0**-149])
    log = torch.exp(torch.randn(20000, generator=g) * 6)
    x = torch.cat([table, small, middles, up, down, special, log, bits.view(torch.float32), ties.view(torch.float32)])
    return torch.cat([x, -x])


def test_every_e4m3_byte_is_decoded_exactly(triton_backend: TritonBackend) -> None:
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    expected = every.view(torch.float8_e4m3fn).float()
    found = applied(triton_backend, 0, every, torch.float32)
    assert torch.equal(found.isnan(), expected.isnan())
    assert same_bits(found[~expected.isnan()], expected[~expected.isnan()])


def test_every_e2m1_code_is_decoded_exactly(triton_backend: TritonBackend) -> None:
    every = torch.arange(16, dtype=torch.uint8)
    assert same_bits(applied(triton_backend, 1, every, torch.float32), codec.decode_e2m1(every))


def test_bfloat16_is_rounded_to_nearest_even(triton_backend: TritonBackend) -> None:
    x = floats_to_round()
    found, expected = applied(triton_backend, 2, x, torch.bfloat16), x.to(torch.bfloat16)
    assert torch.equal(found.isnan(), x.isnan())
    assert same_bits(found[~x.isnan()], expected[~x.isnan()])


def test_e4m3_is_rounded_to_nearest_even_and_saturates(triton_backend: TritonBackend) -> None:
    x = floats_to_round()
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert same_bits(applied(triton_backend, 3, x, torch.uint8), expected)


def test_e2m1_is_rounded_to_nearest_even_and_saturates(triton_backend: TritonBackend) -> None:
    x = floats_to_round()
    assert same_bits(applied(triton_backend, 4, x, torch.uint8), codec.encode_e2m1(x))


def run_assembly(text: str, registers: dict[str, Tensor]) -> None:
    """The few PTX instructions of our decoders on int64 tensors that hold 32 bits: what the interpreter cannot run."""

    def bf16x2_product(a: Tensor, b: Tensor) -> Tensor:
        halves = []
        for shift in (0, 16):
            x, y = (((v >> shift) & 0xFFFF).to(torch.int32) << 16 for v in (a, b))
            product = x.view(torch.float32) * y.view(torch.float32)
            exact = product.to(torch.bfloat16)
            assert torch.equal(exact.float(), product), "a product that bfloat16 does not hold"
            halves.append((product.view(torch.int32) >> 16).to(torch.int64) & 0xFFFF)
        return halves[0] | (halves[1] << 16)

    def value(name: str) -> Tensor:
        return torch.tensor(int(name, 0)) if name[0].isdigit() else registers[name]

    operations = {
        "mov.b32": lambda a: a,
        "and.b32": lambda a, b: a & b,
        "or.b32": lambda a, b: a | b,
        "shl.b32": lambda a, b: (a << b) & 0xFFFFFFFF,
        "shr.b32": lambda a, b: a >> b,
        "fma.rn.bf16x2": lambda a, b, minus_zero: bf16x2_product(a, b),
    }
    for line in text.strip("{}\n").splitlines():
        if not line.startswith(".reg"):
            operation, target, *sources = re.split(r"[ ,]+", line.rstrip(";"))
            registers[target] = operations[operation](*[value(source) for source in sources])


def words_of(low: Tensor, high: Tensor) -> Tensor:
    return low.to(torch.int64) | (high.to(torch.int64) << 16)


def halves(register: Tensor) -> list[Tensor]:
    return [((register >> s) & 0xFFFF).to(torch.int32).to(torch.int16).view(torch.bfloat16).float() for s in (0, 16)]


@pytest.mark.parametrize("byte", [8, 100, 151])
def test_the_four_bit_assembly_decodes_every_word(byte: int) -> None:
    every = torch.arange(1 << 16)
    scale = torch.tensor((byte << 4) + NVFP4_BASE)
    registers = {"$4": words_of(every, every.flip(0))} | {f"${i}": words_of(scale, scale) for i in (5, 6, 7, 8)}
    run_assembly(gemm_pieces._DECODE_FOUR_BIT, registers)
    last = ((every << 1) & 0x8000) | ((every >> 5) & 0x0100) | ((every >> 4) & 0x00C0)
    planes = [every & 0x81C0, (every << 3) & 0x81C0, (every << 6) & 0x81C0, last]
    factor = (scale.to(torch.int32) << 16).view(torch.float32)
    for i, bits in enumerate(planes):
        expected = (bits.to(torch.int32) << 16).view(torch.float32) * factor
        low, high = halves(registers[f"${i}"])
        assert torch.equal(low, expected)
        assert torch.equal(high, expected.flip(0))


def test_the_fp8_assembly_decodes_every_word() -> None:
    every = torch.arange(1 << 16)
    every = every[((every & 0x7F) != 0x7F) & (((every >> 8) & 0x7F) != 0x7F)]
    registers = {"$2": words_of(every, every.flip(0))}
    run_assembly(gemm_pieces._DECODE_FP8, registers)
    for i in (0, 1):
        expected = ((every >> (8 * i)) & 0xFF).to(torch.uint8).view(torch.float8_e4m3fn).float()
        low, high = halves(registers[f"${i}"])
        assert torch.equal(low, expected)
        assert torch.equal(high, expected.flip(0))
