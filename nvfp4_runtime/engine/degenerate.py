"""Answers that go round in circles: one token, or a short cycle of them, over and over. Torch-free.

Broken arithmetic rarely gives NaN; far more often a model says the same thing until its length limit. Some prompts
make a sound model do that too, so this counts and ends nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

WINDOW_TOKENS = 64
LONGEST_CYCLE = 8
_EVERY = 32


def is_due(num_tokens: int) -> bool:
    """Whether an answer of this length is to be looked at: every 32 tokens, so the cost per token is a constant."""
    return num_tokens >= WINDOW_TOKENS and num_tokens % _EVERY == 0


def repeats_itself(token_ids: Sequence[int]) -> bool:
    """Whether the last 64 tokens are a cycle of at most 8."""
    tail = token_ids[-WINDOW_TOKENS:]
    return len(tail) == WINDOW_TOKENS and any(tail[length:] == tail[:-length] for length in range(1, LONGEST_CYCLE + 1))
