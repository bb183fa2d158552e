"""Pace: how long a step may take before it is thought to hang, from what steps took before. Torch-free."""

from __future__ import annotations

MANY_TOKENS = 32
_FORGETS = 0.9


class Pace:
    """Seconds per token of steps with many tokens and of steps with few, the slow ones remembered longer.

    Until a step with many tokens was seen, its tokens are taken to cost what single ones do, which is too much: the
    weights are read once for all of them.
    """

    def __init__(self) -> None:
        self._many: float | None = None
        self._few = 0.0

    def observe(self, num_tokens: int, seconds: float) -> None:
        if num_tokens <= 0:
            return
        each = seconds / num_tokens
        if num_tokens >= MANY_TOKENS:
            self._many = max(each, _FORGETS * (self._many or 0.0))
        else:
            self._few = max(each, _FORGETS * self._few)

    def expected_seconds(self, num_tokens: int) -> float:
        each = self._few if self._many is None or num_tokens < MANY_TOKENS else self._many
        return num_tokens * each
