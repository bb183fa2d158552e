"""Random NVFP4 weights whose dequantised values are exact in BF16, so that a model and its BF16 twin are one function.

weight_scale_2 is a power of two: code x block scale has at most six significant bits, and a power of two adds none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Halves = npt.NDArray[np.uint16]  # BF16 as its bits

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)
LOWEST_SCALE, HIGHEST_SCALE = 0x60, 0x7E  # E4M3 bytes of 32 and 448, the upper end that ModelOpt's recipe uses


def e4m3_table() -> npt.NDArray[np.float32]:
    """The value of each non-negative E4M3 byte; 0x7F is NaN."""
    values = [(b & 7) * 2.0**-9 if b < 8 else (8 + (b & 7)) * 2.0 ** ((b >> 3) - 10) for b in range(0x7F)]
    return np.array([*values, math.nan], dtype=np.float32)


E4M3 = e4m3_table()


@dataclass(frozen=True)
class Packed:
    """A linear as ModelOpt stores it.

    codes    uint8 [N, K/2]    even k in the low nibble
    scales   uint8 [N, K/16]   E4M3 bytes
    scale_2  a power of two that multiplies
    """

    codes: Bytes
    scales: Bytes
    scale_2: float


def random_packed(rng: np.random.Generator, n: int, k: int) -> Packed:
    """[n, k] with a standard deviation near 1/sqrt(k): outputs stay about as large as inputs. k a multiple of 16."""
    codes = np.frombuffer(rng.bytes(n * k // 2), dtype=np.uint8).reshape(n, k // 2)
    scales = rng.integers(LOWEST_SCALE, HIGHEST_SCALE + 1, (n, k // 16), dtype=np.uint8)
    rms = math.sqrt(float(np.mean(E2M1**2)) * float(np.mean(E4M3[LOWEST_SCALE : HIGHEST_SCALE + 1] ** 2)))
    return Packed(codes, scales, 2.0 ** round(math.log2(k**-0.5 / rms)))


def dequantise(weight: Packed) -> Halves:
    """The same weight as BF16 [N, K], exactly."""
    n, half = weight.codes.shape
    pairs = np.stack([E2M1[np.arange(256) & 15], E2M1[np.arange(256) >> 4]], axis=-1)  # [256, 2]
    values = pairs[weight.codes].reshape(n, half // 8, 16)
    values *= (E4M3[weight.scales] * np.float32(weight.scale_2))[:, :, None]
    return to_bf16(values.reshape(n, 2 * half))


def to_bf16(values: npt.NDArray[np.float32]) -> Halves:
    """BF16 bits of float32 `values`, rounded to nearest, ties to even. Finite values only."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded: Halves = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return rounded


def random_bf16(rng: np.random.Generator, n: int, k: int, std: float) -> Halves:
    return to_bf16(rng.standard_normal((n, k), dtype=np.float32) * np.float32(std))
