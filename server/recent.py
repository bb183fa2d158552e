"""The last requests that ended, with their times: what GET /requests lists. Counts and moments only, never text."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from nvfp4_runtime.engine.messages import RequestTimes

MAX_RECENT = 100


class RecentRequests:
    """A bounded list for each API key, newest first when read."""

    def __init__(self) -> None:
        self._ended: dict[str, deque[dict[str, Any]]] = {}

    def add(
        self,
        tenant: str,
        request_id: str,
        finish_reason: str,
        prompt_tokens: int,
        cached_tokens: int,
        completion_tokens: int,
        times: RequestTimes | None = None,
    ) -> None:
        """A choice of a request has ended. Without `times`, or where it did not get so far, its durations are null."""
        self._ended.setdefault(tenant, deque(maxlen=MAX_RECENT)).append(
            {
                "id": request_id,
                "ended": time.time(),
                "finish_reason": finish_reason,
                "prompt_tokens": prompt_tokens,
                "cached_tokens": cached_tokens,
                "completion_tokens": completion_tokens,
                **_durations(times),
            }
        )

    def newest_first(self, tenant: str) -> list[dict[str, Any]]:
        """Those of `tenant`: what others ask, and when, is not its business."""
        return list(reversed(self._ended.get(tenant, ())))


def _durations(times: RequestTimes | None) -> dict[str, float | None]:
    """Seconds: waiting for the first step, arrival to first token, first to last token, arrival to end."""
    arrival, scheduled, first, finished = (
        (times.arrival, times.scheduled, times.first_token, times.finished) if times else (0.0, 0.0, 0.0, 0.0)
    )
    return {
        "queue_seconds": scheduled - arrival if scheduled else None,
        "ttft_seconds": first - arrival if first else None,
        "decode_seconds": finished - first if first else None,
        "total_seconds": finished - arrival if finished else None,
    }
