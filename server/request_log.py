"""The access log: one record per HTTP request, when it is over. Lengths and times; never a prompt unless asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from server.request_record import RequestRecord

logger = logging.getLogger("server.access")

# Probes and scrapes come every second and say nothing about the load.
_QUIET = ("/health", "/ping", "/metrics", "/load")
MAX_PROMPT_TOKENS = 1000  # of a logged prompt


def is_probe(path: str) -> bool:
    return path in _QUIET or path.startswith("/health/")


class RequestLog:
    """`decode`: token ids to text, where prompts are to be logged."""

    def __init__(self, decode: Callable[[list[int]], str] | None = None) -> None:
        self._decode = decode

    def ended(self, record: RequestRecord) -> None:
        """A request is over. Probes are told at level DEBUG."""
        level = logging.DEBUG if is_probe(record.path) else logging.INFO
        if not logger.isEnabledFor(level):
            return
        facts = _facts(record)
        if self._decode is not None and record.choices:
            facts["prompt"] = self._decode(record.choices[0].job.prompt_token_ids[:MAX_PROMPT_TOKENS])
        told = "".join(f" {key}={_text(facts[key])}" for key in facts if key not in _IN_MESSAGE)
        outcome = f" {record.outcome}" if record.outcome else ""
        logger.log(
            level,
            "%s %.200r %d %.3fs %s%s",
            record.method,
            record.path,
            record.status,
            record.seconds,
            record.request_id,
            outcome,
            extra={"fields": facts, "tail": told},
        )


_IN_MESSAGE = frozenset({"request_id", "method", "path", "status", "duration_seconds", "outcome"})


def _facts(record: RequestRecord) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "request_id": record.request_id,
        "method": record.method,
        "path": record.path[:200],
        "status": record.status,
        "duration_seconds": round(record.seconds, 6),
    }
    if record.first_byte:
        facts["first_byte_seconds"] = round(record.first_byte - record.started, 6)
    if record.outcome:
        facts["outcome"] = record.outcome
    if not record.choices:
        return facts
    facts |= {
        "id": record.answer_id,
        "model": record.model,
        "prompt_tokens": record.num_prompt_tokens,
        "cached_tokens": record.num_cached_tokens,
        "output_tokens": record.num_output_tokens,
        "finish_reasons": record.finish_reasons,
    }
    if (times := record.times) is not None:
        facts["queue_seconds"] = round(times.scheduled - times.arrival, 6)
        facts["ttft_seconds"] = round(times.first_token - times.arrival, 6)
    return facts


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return repr(value) if isinstance(value, str) and not value.isprintable() else str(value)
