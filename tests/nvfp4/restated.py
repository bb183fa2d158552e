"""NVFP4 stated a second time, in numpy float32 and plain loops over values: what the codec is compared with.

Written from the format's description only; shares no code with nvfp4_runtime.nvfp4.
"""

from __future__ import annotations

import numpy as np

GRID = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
F32 = np.float32


def e4m3_value(byte: int) -> float:
    """An E4M3 byte by its fields: sign, 4 exponent bits (bias 7), 3 mantissa bits; 0x7F and 0xFF are NaN."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = (byte >> 3) & 0xF, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def to_e4m3(x: np.ndarray) -> np.ndarray:
    """Nearest E4M3 byte, ties to even, for values in [0, 448]."""
    values = np.array([e4m3_value(b) for b in range(0x7F)], dtype=np.float64)
    x = x.astype(np.float64)
    upper = np.searchsorted(values, x, side="left").clip(0, len(values) - 1)
    lower = (upper - 1).clip(0)
    below, above = x - values[lower], values[upper] - x
    take_lower = (below < above) | ((below == above) & (lower % 2 == 0))
    return np.where(values[upper] == x, upper, np.where(take_lower, lower, upper)).astype(np.uint8)


def to_e2m1(y: np.ndarray) -> np.ndarray:
    """Nearest E2M1 code, ties to even, saturating; sign from the sign bit."""
    codes = np.empty(y.shape, dtype=np.uint8)
    for at, value in np.ndenumerate(y):
        magnitude = min(abs(float(value)), 6.0)
        distances = [abs(magnitude - g) for g in GRID]
        nearest = min(distances)
        tied = [i for i, d in enumerate(distances) if d == nearest]
        code = tied[0] if len(tied) == 1 else next(i for i in tied if i % 2 == 0)
        codes[at] = code | (8 if np.signbit(value) else 0)
    return codes


def quantize(w: np.ndarray, scale_2: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """ModelOpt's weight recipe: codes [N, K] and scale bytes [N, K/16]."""
    blocks = w.astype(F32).reshape(w.shape[0], -1, 16)
    ratio = np.abs(blocks).max(-1) / (F32(6.0) * F32(scale_2))
    ratio[ratio == 0] = F32(1.0)
    scale = to_e4m3(np.clip(ratio, F32(2.0**-9), F32(448.0)))
    step = np.array([e4m3_value(b) for b in range(256)], dtype=F32)[scale] * F32(scale_2)
    return to_e2m1((blocks / step[..., None]).reshape(w.shape)), scale


def quantize_activation(x: np.ndarray, input_scale: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """The hardware path's recipe with correctly rounded reciprocals: codes [M, K] and scale bytes [M, K/16]."""
    blocks = x.astype(F32).reshape(x.shape[0], -1, 16)
    g = F32(1.0) / F32(input_scale)
    sf = g * (np.abs(blocks).max(-1) * (F32(1.0) / F32(6.0)))
    scale = to_e4m3(np.minimum(sf, F32(448.0)))
    values = np.array([e4m3_value(b) for b in range(256)], dtype=F32)[scale]
    inverse = np.zeros_like(values)
    nonzero = values != 0
    inverse[nonzero] = F32(1.0) / (values[nonzero] * (F32(1.0) / g))
    return to_e2m1((blocks * inverse[..., None]).reshape(x.shape)), scale


def pack(codes: np.ndarray) -> np.ndarray:
    return (codes[:, 0::2] | (codes[:, 1::2] << 4)).astype(np.uint8)
