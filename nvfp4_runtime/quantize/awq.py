"""AWQ: inputs that matter more get larger weights before rounding, and what comes before is divided by the same factor.

The factors are folded into the norm before q/k/v and gate/up, into v_proj's rows before o_proj, and into up_proj's rows
before down_proj, so the result is plain NVFP4. Source: AWQ (Lin et al., 2023), searched on the layer's output error.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nvfp4_runtime.quantize.gptq import output_error

EXPONENTS = tuple(i / 10 for i in range(11))


def search(
    w: Tensor, hessian: Tensor, round_trip: Callable[[Tensor, Tensor], Tensor], repeats: Tensor | None = None
) -> tuple[Tensor, float]:
    """The factors [K] for which rounding w * factors spoils the outputs least, and the exponent that gave them.

    w           fp32 [N, K]
    hessian     fp32 [K, K]
    round_trip  (weights [N, K], mean square of their inputs [K]) -> the same quantised and dequantised
    repeats     int64 [K], inputs that must share a factor (query heads of one value head); None: each has its own

    Factors are magnitude^exponent, exponent 0 (all ones) among those tried, about a geometric middle of 1.
    """
    square = hessian.diagonal()
    if repeats is not None:
        groups = int(repeats.max()) + 1
        counts = torch.zeros(groups).index_add_(0, repeats, torch.ones_like(square))
        square = (torch.zeros(groups).index_add_(0, repeats, square) / counts)[repeats]
    magnitude = square.sqrt()
    active = magnitude > 0
    best, best_error, best_exponent = torch.ones_like(magnitude), float("inf"), 0.0
    for exponent in EXPONENTS:
        factors = torch.where(active, magnitude, torch.ones_like(magnitude)) ** exponent
        if bool(active.any()):
            used = factors[active]
            factors = torch.where(active, factors / (used.max() * used.min()).sqrt(), torch.ones_like(factors))
        rounded = round_trip(w * factors, hessian.diagonal() / factors**2) / factors
        error = output_error(w, rounded, hessian)
        if error < best_error:
            best, best_error, best_exponent = factors, error, exponent
    return best, best_exponent


def fold_into_norm(norm: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """(the norm's weight divided by the factors, in its own type; the factors that division really made).

    The weights after the norm are multiplied by the latter, so rounding the norm's weight costs nothing.
    """
    divided = (norm.to(torch.float32) / factors).to(norm.dtype)
    as_float = divided.to(torch.float32)
    usable = (as_float != 0) & torch.isfinite(as_float) & (norm != 0)
    return torch.where(usable, divided, norm), torch.where(usable, norm.to(torch.float32) / as_float, torch.ones(()))
