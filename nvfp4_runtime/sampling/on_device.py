"""Choosing tokens where the logits are: rows that need no edits and no logprobs, without a look from the host.

The same rules as the host's sampler (see draw.py), in PyTorch, for any device. Sums run in another order than there, so
the two may disagree where the drawn point lies within rounding of the border between two tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nvfp4_runtime.sampling.state import SamplingState

_FARTHEST = 104.0  # exp(-104) is 0 in float32


@dataclass(frozen=True)
class Controls:
    """How to draw from each row: tensors [S] on the logits' device.

    uniform      float64  in [0, 1): `draw.uniform` of seed and position
    temperature  float64  0: the likeliest token
    top_p        float32  in (0, 1]
    min_p        float32  in [0, 1]
    top_k        int32    0: off
    """

    uniform: Tensor
    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    top_k: Tensor


class DeviceSampler(Protocol):
    name: str

    def __call__(self, logits: Tensor, controls: Controls | None) -> Tensor:
        """One token per row.

        logits    float32 [S, V]  not changed
        controls  None: every row wants its likeliest token
        returns   int64 [S]       -1 where none can be chosen: NaN or +Inf in the row, or nothing above -Inf
        """
        ...


def can_sample(state: SamplingState, position: int) -> bool:
    """Whether a DeviceSampler can choose the output token number `position` of this request."""
    params = state.params
    chosen_freely = state.grammar is None and not state.edits_logits and position >= params.min_tokens
    return chosen_freely and params.logprobs is None and state.free_at(position)


class TorchSampler:
    """See `DeviceSampler`. Sorts whole rows where tokens are drawn."""

    name = "torch"

    def __call__(self, logits: Tensor, controls: Controls | None) -> Tensor:
        largest, best = logits.max(dim=-1)  # the first of equals; NaN where the row holds one
        chosen = best if controls is None else torch.where(controls.temperature > 0, _draw(logits, controls), best)
        return torch.where(torch.isfinite(largest), chosen, -1)


def _draw(logits: Tensor, controls: Controls) -> Tensor:
    """int64 [S]; anything for rows that are not finite or not drawn."""
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)  # among equals, lower ids first
    warmth = (1.0 / controls.temperature).clamp(max=torch.finfo(torch.float32).max).float().unsqueeze(1)
    distances = ((ordered[:, :1] - ordered) * warmth).clamp(max=_FARTHEST)
    probs = torch.exp(-distances)
    probs = probs.masked_fill(probs < controls.min_p.unsqueeze(1), 0.0)
    ranks = torch.arange(logits.shape[1], device=logits.device)
    limit = torch.where(controls.top_k > 0, controls.top_k, logits.shape[1]).unsqueeze(1)
    probs = probs.masked_fill(ranks >= limit, 0.0).double()
    mass = probs.cumsum(dim=-1)
    before = torch.nn.functional.pad(mass[:, :-1], (1, 0))  # of the tokens ahead of each
    top_p = controls.top_p.double().unsqueeze(1)
    probs = probs.masked_fill((before >= top_p * mass[:, -1:]) & (top_p < 1), 0.0)
    mass = probs.cumsum(dim=-1)
    index = (mass <= controls.uniform.unsqueeze(1) * mass[:, -1:]).sum(dim=-1)
    last = (probs > 0).sum(dim=-1) - 1  # what is kept comes first, except that exp may give 0 behind it
    return ids.gather(1, torch.minimum(index, last).clamp(min=0).unsqueeze(1)).squeeze(1)
