"""The body of POST /v1/completions."""

from __future__ import annotations

from typing import Any

from nvfp4_runtime.errors import InvalidParameterError
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

    def _check_beam_search(self) -> None:
        super()._check_beam_search()
        if self.echo and self.logprobs is not None:
            raise InvalidParameterError("echo with logprobs cannot be combined with use_beam_search", "echo")

    def _not_honoured(self) -> dict[str, tuple[Any, ...]]:
        return NOT_HONOURED | NOT_HONOURED_COMPLETION
