"""Temperature, min_p, top_k, top_p and the draw, for one row of logits. Rows are numpy, so that every row's arithmetic
is the same whatever stands beside it in the batch.

Each filter keeps a *prefix* of the tokens sorted by (logit descending, id ascending): min_p all with at least min_p
times the largest probability, top_k the first k, top_p the shortest prefix whose share of what the filters before it
kept reaches top_p. A uniform number then picks a point in the prefix's mass.

Sorting 49,152 tokens costs more than everything else, and is not needed: tokens are binned by their distance from the
largest logit, mass and count are summed per bin, and only the one or two bins in which a prefix or the drawn point ends
are sorted. The result is exact, not a top-n approximation.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from nvfp4_runtime.sampling.logits import FloatRow, TokenIds, contenders
from nvfp4_runtime.sampling.params import SamplingParams

_FARTHEST = 104  # exp(-104) is 0 in float32
_BINS_PER_UNIT = 32  # a power of two: the product is exact, so no two tokens are swapped
_NUM_BINS = _FARTHEST * _BINS_PER_UNIT + 1
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_MASK64 = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits that depends on `seed` and `position` alone.

    Source: SplitMix64 (Steele, Lea, Flood 2014), its state jumped to `position`; the seed is mixed first, so that
    neighbouring seeds do not share a stream.
    """
    state = _mix64((seed & _MASK64) ^ 0x6A09E667F3BCC909)
    return (_mix64((state + (position + 1) * 0x9E3779B97F4A7C15) & _MASK64) >> 11) * 2.0**-53


def _mix64(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def draw(row: FloatRow, largest: np.float32, params: SamplingParams, u: float) -> int:
    """The token at point `u` of the filtered distribution.

    row      float32 [V]   edited logits, no NaN, no +Inf
    largest  max(row), finite
    u        in [0, 1)
    """
    num_kept = params.top_k if 0 < params.top_k < len(row) else None
    token_ids = None if num_kept is None else contenders(row, num_kept)  # everything below works on these alone
    if token_ids is not None:
        row = row[token_ids]
    distances = distances_to(row, largest, params.temperature)
    probs = np.exp(-distances)
    if params.min_p > 0:
        probs[probs < np.float32(params.min_p)] = 0
    ranked = _Ranked(row, distances, probs)
    mass = ranked.total
    if num_kept is not None:
        mass = ranked.cut_at_count(num_kept)
    if params.top_p < 1:
        mass = ranked.cut_at_mass(params.top_p * mass)
    index = ranked.token_at(u * mass)
    return index if token_ids is None else int(token_ids[index])


def distances_to(row: FloatRow, largest: np.float32, temperature: float) -> FloatRow:
    """(largest - row) / temperature, at most 104: [V]. exp of its negative is the probability over the largest one.

    Cannot overflow, and never swaps two tokens; a tiny temperature leaves 0 for the largest and 104 elsewhere.
    """
    assert temperature > 0
    distances = largest - row
    distances *= np.float32(min(1.0 / temperature, _FLOAT32_MAX))
    np.minimum(distances, np.float32(_FARTHEST), out=distances)
    return distances


class _Ranked:
    """Tokens in order of their logits, sorted no further than asked. Bin 0 holds the most likely.

    row        float32 [n]  logits
    distances  float32 [n]  from the largest, in [0, 104]; rises where `row` falls
    probs      float32 [n]  probabilities over the largest, or 0
    """

    def __init__(self, row: FloatRow, distances: FloatRow, probs: FloatRow) -> None:
        self._row = row
        self._probs = probs
        self._bins = (distances * np.float32(_BINS_PER_UNIT)).astype(np.int32)
        # up to and including each bin
        self._mass: npt.NDArray[np.float64] = np.bincount(self._bins, weights=probs, minlength=_NUM_BINS).cumsum()
        self._last_bin = _NUM_BINS - 1  # the last that is kept
        self._sorted: dict[int, tuple[TokenIds, npt.NDArray[np.float64]]] = {}
        self.total = float(self._mass[-1])

    def cut_at_count(self, k: int) -> float:
        """Keep the first `k` tokens; returns their mass."""
        counts = np.bincount(self._bins, minlength=_NUM_BINS).cumsum()
        b = int(counts.searchsorted(k))
        return self._cut_at(b, k - int(counts[b - 1]) if b else k)

    def cut_at_mass(self, target: float) -> float:
        """Keep the shortest prefix with mass >= `target`, at least one token; returns its mass."""
        b = self._bin_of(target, side="left")
        _, mass = self._sorted_bin(b)
        # min: the bin's tokens are summed here in another order than in the histogram and may end 1 ulp lower.
        return self._cut_at(b, min(int(mass.searchsorted(target)) + 1, len(mass)))

    def token_at(self, target: float) -> int:
        """The first kept token at which the cumulated mass exceeds `target`, which is below the kept mass."""
        b = self._bin_of(target, side="right")
        tokens, mass = self._sorted_bin(b)
        possible = np.flatnonzero(self._probs[tokens])
        return int(tokens[min(int(mass.searchsorted(target, side="right")), possible[-1])])

    def _cut_at(self, b: int, num_kept: int) -> float:
        tokens, mass = self._sorted_bin(b)
        self._last_bin, self._sorted[b] = b, (tokens[:num_kept], mass[:num_kept])
        return float(mass[num_kept - 1])

    def _bin_of(self, target: float, side: Literal["left", "right"]) -> int:
        return min(int(self._mass.searchsorted(target, side=side)), self._last_bin)

    def _sorted_bin(self, b: int) -> tuple[TokenIds, npt.NDArray[np.float64]]:
        """Bin `b`'s kept tokens in order, and the mass up to and including each."""
        if b not in self._sorted:
            tokens = np.flatnonzero(self._bins == b)  # ascending ids, which the stable sort keeps among equals
            tokens = tokens[np.argsort(-self._row[tokens], kind="stable")]
            before = self._mass[b - 1] if b else 0.0
            self._sorted[b] = tokens, before + self._probs[tokens].cumsum(dtype=np.float64)
        return self._sorted[b]
