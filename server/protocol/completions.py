"""The body of POST /v1/completions."""

from __future__ import annotations

from typing import Any

from server.protocol.fields import Int, Prompt
from server.protocol.generation import GenerationRequest
from server.protocol.not_honoured import NOT_HONOURED, NOT_HONOURED_COMPLETION


class CompletionRequest(GenerationRequest):
    prompt: Prompt
    logprobs: Int | None = None
    add_special_tokens: bool = True

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    def _not_honoured(self) -> dict[str, tuple[Any, ...]]:
        return NOT_HONOURED | NOT_HONOURED_COMPLETION
