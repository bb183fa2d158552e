"""How far a quantised layer is from the weights it was made of, and which misreading would bring it closer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nvfp4_runtime.checkpoint.doctor.decode import Matrix, matrix, plain_matrix
from nvfp4_runtime.checkpoint.doctor.statistics import Advance
from nvfp4_runtime.checkpoint.shards import Shards
from nvfp4_runtime.checkpoint.stored import StoredLayer
from nvfp4_runtime.nvfp4.layouts import TILE_COLS, TILE_ROWS

POOR_DB = 10.0  # NVFP4 by `max` gives some 20 dB on bell-shaped weights; below 10 a tenth of the energy is noise
_CONVINCING_DB = 8.0  # by how much another reading must be better to be called the right one
_SAMPLE_ROWS = 8 * TILE_ROWS
_FOLDED_ROWS, _FOLDED_ROUNDS = 256, 4


@dataclass(frozen=True)
class Comparison:
    """A layer against its parent: energies summed over all its weights, in float64.

    signal   sum of parent^2
    noise    sum of (stored - parent)^2
    misread  the reading under which the layer fits its parent, where as stored it does not: "nibbles", "swizzled",
             "inverted"; "folded" where it fits up to factors per row and column, as AWQ leaves it; None where it fits,
             or nothing helps
    best_db  of that reading, on the first rows
    """

    signal: float
    noise: float
    misread: str | None = None
    best_db: float | None = None

    @property
    def sqnr_db(self) -> float:
        """10 log10(signal / noise); infinite where both are the same."""
        return sqnr_db(self.signal, self.noise)

    @property
    def relative_error(self) -> float:
        return math.sqrt(self.noise / self.signal) if self.signal else math.inf if self.noise else 0.0


def sqnr_db(signal: float, noise: float) -> float:
    if not math.isfinite(noise):
        return -math.inf
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def compare(
    shards: Shards, stored: StoredLayer, parent: Shards, advance: Advance = lambda _: None
) -> Comparison | None:
    """Measure `stored` against the tensor of the same name in `parent`; None where that lacks it."""
    signal = noise = 0.0
    misread: tuple[str, float] | None = None
    for expert in range(max(1, stored.experts)):
        ours = matrix(shards, stored, expert)
        theirs = parent_matrix(parent, stored, expert)
        if ours is None or theirs is None:
            return None
        s, n = energies(ours, theirs, advance)
        signal, noise = signal + s, noise + n
        if misread is None and sqnr_db(s, n) < POOR_DB:
            misread = _diagnose(ours, theirs)
    return Comparison(signal, noise, *(misread or ()))


def parent_matrix(parent: Shards, stored: StoredLayer, expert: int = 0) -> Tensor | None:
    """The parent's plain [n, k] under the same name, or None."""
    shape = (stored.n, stored.k)
    found = plain_matrix(parent, f"{stored.prefix}.weight", shape, stored.experts, expert)
    if found is None and stored.experts:
        found = plain_matrix(parent, stored.prefix, shape, stored.experts, expert)
    return found


def energies(ours: Matrix, theirs: Tensor, advance: Advance = lambda _: None) -> tuple[float, float]:
    """(sum of theirs^2, sum of (ours - theirs)^2)."""
    signal = noise = 0.0
    step = ours.rows_per_chunk
    for start in range(0, ours.n, step):
        wanted = theirs[start : start + step]
        found = ours.rows(start, start + step)
        exact = wanted.to(torch.float32).reshape(-1)
        signal += float(torch.dot(exact, exact))
        error = found.reshape(-1).sub_(exact)
        noise += float(torch.dot(error, error))
        advance(wanted.nbytes)
    return signal, noise


def _diagnose(ours: Matrix, theirs: Tensor) -> tuple[str, float] | None:
    """Which other reading of the first rows is convincingly closer to the parent, and its distance in dB."""
    if ours.format != "nvfp4":
        return None
    rows = min(ours.n, _SAMPLE_ROWS)
    sample, wanted = ours.head(rows), theirs[:rows]
    readings = {"nibbles": sample.swapped(), "inverted": sample.inverted()}
    if rows % TILE_ROWS == 0 and sample.scale.shape[1] % TILE_COLS == 0:
        readings["swizzled"] = sample.unswizzled()
    as_stored = sqnr_db(*energies(sample, wanted))
    measured = {name: sqnr_db(*energies(reading, wanted)) for name, reading in readings.items()}
    best = max(measured, key=lambda name: measured[name])
    if measured[best] >= POOR_DB and measured[best] >= as_stored + _CONVINCING_DB:
        return best, measured[best]
    unfolded = _unfolded_db(ours, theirs)
    return ("folded", unfolded) if unfolded >= POOR_DB and unfolded >= as_stored + _CONVINCING_DB else None


def _unfolded_db(ours: Matrix, theirs: Tensor) -> float:
    """The distance of the first rows from the parent's, with the best factor per row and per column taken out.

    Least squares for columns and rows in turn; a few hundred values per factor leave little to fit by chance.
    """
    rows = min(ours.n, _FOLDED_ROWS)
    found, wanted = ours.rows(0, rows), theirs[:rows].to(torch.float32)
    if not bool(torch.isfinite(found).all()):
        return -math.inf
    row, column = torch.ones(rows, 1), torch.ones(1, ours.k)
    for _ in range(_FOLDED_ROUNDS):
        column = _factors(found, wanted * row, 0)
        row = _factors(found, wanted * column, 1)
    fitted = wanted * row * column
    return sqnr_db(float(fitted.square().sum()), float((found - fitted).square().sum()))


def _factors(found: Tensor, wanted: Tensor, dim: int) -> Tensor:
    """f that minimises |found - f * wanted| along `dim`; 0 where there is nothing to fit."""
    size = wanted.square().sum(dim, keepdim=True)
    return torch.where(size > 0, (found * wanted).sum(dim, keepdim=True) / size, torch.zeros_like(size))
