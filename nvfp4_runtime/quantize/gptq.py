"""GPTQ: columns are rounded one after the other, and what each rounding spoils the later columns make up for.

With H = X^T X of the layer's inputs, the squared error of its outputs is tr(D H D^T), D the error of the weights.
Source: GPTQ (Frantar et al., 2022), columns in their order, in lazy blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from nvfp4_runtime.nvfp4 import codec

logger = logging.getLogger(__name__)

DAMPING = 0.01  # of the mean of H's diagonal, added to it
COLUMNS = 128  # updated at once beyond the columns being rounded

ChooseScales = Callable[[Tensor, int], Tensor]


def inverse_factor(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """The upper Cholesky factor U of the damped Hessian's inverse, H^-1 = U^T U, fp32 [K, K].

    An input that was never active counts as one of mean magnitude, so its weights are rounded to the nearest. Where
    rounding makes H indefinite the damping grows tenfold until it is not.
    """
    h = hessian.clone()
    diagonal = h.diagonal()
    mean = float(diagonal.mean())
    if mean == 0:
        return torch.eye(h.shape[0])
    diagonal[diagonal == 0] = mean
    while True:
        diagonal += damping * mean
        # With J reversing order, J H J = L L^T gives H^-1 = U^T U for U = J L^-1 J: one factorisation, no inverse of H.
        lower, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
        if not bool(failed):
            inverse: Tensor = torch.linalg.solve_triangular(lower, torch.eye(h.shape[0]), upper=False)
            return inverse.flip(0, 1).contiguous()
        damping *= 10
        logger.warning("the Hessian is not positive definite; damping raised to %g of its mean", damping)
        assert damping < 1e6, "a Hessian that holds NaN"


def gptq(w: Tensor, upper: Tensor, scale_2: Tensor, choose_scales: ChooseScales) -> tuple[Tensor, Tensor]:
    """Round `w` under `scale_2` with compensation.

    w              fp32 [N, K]
    upper          fp32 [K, K]   from `inverse_factor`
    choose_scales  (weights fp32 [N, 16], first column) -> block scales e4m3 [N, 1], asked when the block is reached, of
                   its weights as compensated so far
    returns        packed codes uint8 [N, K/2], block scales e4m3 [N, K/16]
    """
    n, k = w.shape
    columns = w.t().contiguous()  # [K, N]: a column of w is contiguous
    codes = torch.empty((k, n), dtype=torch.uint8)
    scales = torch.empty((k // codec.BLOCK, n), dtype=torch.uint8)
    table = codec.e2m1_table()
    for start in range(0, k, COLUMNS):
        end = min(start + COLUMNS, k)
        chunk, errors = columns[start:end], torch.empty((end - start, n))
        for j in range(end - start):
            if j % codec.BLOCK == 0:
                block = choose_scales(chunk[j : j + codec.BLOCK].t().contiguous(), start + j).reshape(-1)
                scales[(start + j) // codec.BLOCK] = block.view(torch.uint8)
                step = block.to(torch.float32) * scale_2
            codes[start + j] = codec.encode_e2m1(torch.where(step == 0, chunk[j] * 0, chunk[j] / step))
            rounded = table[codes[start + j].to(torch.int64)] * step
            row = upper[start + j, start + j : end]
            errors[j] = (chunk[j] - rounded) / row[0]
            chunk[j + 1 :].addr_(row[1:], errors[j], alpha=-1.0)
        columns[end:].addmm_(upper[start:end, end:].t(), errors, alpha=-1.0)
    return codec.pack_codes(codes.t().contiguous()), scales.t().contiguous().view(torch.float8_e4m3fn)


def output_error(w: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """tr(D H D^T): the squared error of the layer's outputs over the text that H saw."""
    difference = rounded - w
    return float(((difference @ hessian) * difference).sum())
