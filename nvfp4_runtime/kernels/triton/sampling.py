"""Sampling where the logits are: the token that sampling/draw.py would choose, without a look from the host.

The same filters in the same order (min_p, top_k, top_p, then the point `uniform` of what is left), the same ties, exact
selection over the whole vocabulary. What differs: probabilities are whole multiples of 2^-44 of the likeliest token's,
and exp may differ in its last bit, so the two choose differently only where `uniform`, or the border top_p draws, lies
within some 1e-7 of the border between two tokens. Greedy choices are the same, always.

Penalties are not additions, so rows with them belong to the host's sampler. What can be written as one addition per
token (logit_bias, forbidden stop tokens as -Inf) or as a set of allowed tokens (a grammar) goes into `RowEdits`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import triton
from torch import Tensor

from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.triton.sampling_kernels import (
    MOST_TOKENS,
    TILE,
    UNIT_BITS,
    choose_kernel,
    row_tiles_kernel,
    token_rank_kernel,
)


class Controls(Protocol):
    """How to draw from each row: tensors [R] on the logits' device, any float type unless said.

    uniform      float64, in [0, 1): draw.uniform of the request's seed and position
    temperature  0: the likeliest token. As float64 it is the host's, bit for bit
    top_p        in (0, 1]
    min_p        in [0, 1]
    top_k        an integer type; 0: off
    """

    @property
    def uniform(self) -> Tensor: ...
    @property
    def temperature(self) -> Tensor: ...
    @property
    def top_p(self) -> Tensor: ...
    @property
    def min_p(self) -> Tensor: ...
    @property
    def top_k(self) -> Tensor: ...


@dataclass(frozen=True)
class RowEdits:
    """Edits of some rows before everything else, on the logits' device; first the additions, then the sets.

    bias         float32 [E, V]          added to the logits; -Inf forbids a token
    bias_row     int32 [R]               which of them row r takes; -1: none
    allowed      int32 [G, ceil(V/32)]   bit t % 32 of word t // 32: token t may be chosen
    allowed_row  int32 [R]               likewise
    """

    bias: Tensor | None = None
    bias_row: Tensor | None = None
    allowed: Tensor | None = None
    allowed_row: Tensor | None = None


class TritonSampler:
    """One token per row; no host sync, no host value: can be captured in a CUDA graph.

    A row's token depends on that row and its controls alone.
    """

    name = "triton"

    def __call__(self, logits: Tensor, controls: Controls | None, edits: RowEdits | None = None) -> Tensor:
        """The tokens of `sample` alone."""
        return self.sample(logits, controls, edits)[0]

    def sample(self, logits: Tensor, controls: Controls | None, edits: RowEdits | None = None) -> tuple[Tensor, Tensor]:
        """Choose.

        logits    float32 [R, V]  not changed
        controls  None: every row wants its likeliest token
        returns   int64 [R]       -1 where none can be chosen
                  bool [R]        False there: NaN or +Inf in the row, or nothing above -Inf before or after the edits
        """
        num_rows, vocab = _check(logits)
        edits = edits or RowEdits()
        _check_edits(edits, num_rows, vocab)
        tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
        if num_rows == 0:
            return tokens, tokens >= 0
        tile, tiles = _tiling(vocab)
        changed = edits.bias is not None or edits.allowed is not None
        edited = torch.empty_like(logits, dtype=torch.float32) if changed else logits
        facts = _tile_facts(logits, edited, edits)
        drawn = tokens  # stands in for controls that are not read
        choose_kernel[(num_rows,)](
            edited,
            *facts,
            *((drawn,) * 5 if controls is None else _in_order(controls)),
            tokens,
            VOCAB=vocab,
            TILES=tiles,
            TILES_WIDTH=triton.next_power_of_2(tiles),
            TILE=tile,
            GREEDY=controls is None,
            num_warps=8,
        )
        return tokens, tokens >= 0

    def token_logprobs(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The given tokens' log-probabilities in the raw logits, and their ranks; see `sampling.state.Logprob`.

        tokens   int64 [R]
        returns  float64 [R]  natural logarithm; NaN for a token of -1
                 int64 [R]    1 = most likely; equal logits rank by lower id first
        """
        num_rows, vocab = _check(logits)
        totals, ranks = torch.empty((2, num_rows), dtype=torch.int64, device=logits.device).unbind()
        if num_rows == 0:
            return totals.double(), ranks
        tile, tiles = _tiling(vocab)
        largest, _, _ = _tile_facts(logits, logits, RowEdits())
        token_rank_kernel[(num_rows,)](
            logits,
            tokens,
            largest,
            totals,
            ranks,
            VOCAB=vocab,
            TILES=tiles,
            TILES_WIDTH=triton.next_power_of_2(tiles),
            TILE=tile,
            num_warps=8,
        )
        value = logits.gather(1, tokens.clamp(min=0).unsqueeze(1)).squeeze(1).double()
        # in this order: huge logits would swallow the logarithm
        logprob = value - largest.amax(dim=1).double() - (totals.double() * 2.0**-UNIT_BITS).log()
        return torch.where(tokens >= 0, logprob, torch.nan), ranks + 1


def _tiling(vocab: int) -> tuple[int, int]:
    """Tokens of a tile, and tiles of a row."""
    tile = min(TILE, triton.next_power_of_2(vocab))
    return tile, triton.cdiv(vocab, tile)


def _tile_facts(logits: Tensor, edited: Tensor, edits: RowEdits) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, vocab = logits.shape
    tile, tiles = _tiling(vocab)
    largest = torch.empty((num_rows, tiles), dtype=torch.float32, device=logits.device)
    best, state = torch.empty((2, num_rows, tiles), dtype=torch.int32, device=logits.device).unbind()
    row_tiles_kernel[(num_rows, tiles)](
        logits,
        edited,
        *(logits if t is None else t for t in (edits.bias, edits.bias_row, edits.allowed, edits.allowed_row)),
        largest,
        best,
        state,
        VOCAB=vocab,
        TILES=tiles,
        TILE=tile,
        BIAS=edits.bias is not None,
        ALLOWED=edits.allowed is not None,
        num_warps=4,
    )
    return largest, best, state


def _in_order(controls: Controls) -> tuple[Tensor, ...]:
    return controls.uniform, controls.temperature, controls.top_p, controls.min_p, controls.top_k


def _check(logits: Tensor) -> tuple[int, int]:
    if logits.dim() != 2 or not logits.is_contiguous() or not 0 < logits.shape[1] <= MOST_TOKENS:
        raise KernelError(
            f"logits are {list(logits.shape)}, expected contiguous [R, V] with V at most {MOST_TOKENS}: larger "
            "vocabularies need the host's sampler"
        )
    return logits.shape[0], logits.shape[1]


def _check_edits(edits: RowEdits, num_rows: int, vocab: int) -> None:
    for name, table, rows, width in (
        ("bias", edits.bias, edits.bias_row, vocab),
        ("allowed", edits.allowed, edits.allowed_row, -(-vocab // 32)),
    ):
        if (table is None) != (rows is None):
            raise KernelError(f"{name} and {name}_row come together; found only one of them")
        if table is not None and rows is not None and (table.shape[1:] != (width,) or rows.shape != (num_rows,)):
            raise KernelError(
                f"{name} is {list(table.shape)} and {name}_row {list(rows.shape)}, expected [.., {width}] and "
                f"[{num_rows}]"
            )
