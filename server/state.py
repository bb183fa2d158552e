"""What a running server is made of: one object, handed to every route."""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fastapi import Request

from nvfp4_runtime import __version__
from nvfp4_runtime.engine.client import AsyncEngine
from nvfp4_runtime.errors import ModelNotFoundError
from nvfp4_runtime.text.processor import TextProcessor
from server.config import ServerConfig
from server.form import Styles
from server.metrics import Metrics
from server.request_record import note
from server.response_store import ResponseStore
from server.terms import Terms

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass
class ServerState:
    """Engine, text, configuration, metrics and kept responses of one server.

    draining  it was told to stop: probes say so
    refusing  it takes no new requests any more
    """

    engine: AsyncEngine
    text: TextProcessor
    config: ServerConfig
    metrics: Metrics
    created: int
    responses: ResponseStore
    draining: bool = False
    refusing: bool = False

    @classmethod
    def of(cls, request: Request) -> ServerState:
        state: ServerState = request.app.state.server
        return state

    @property
    def model_name(self) -> str:
        return self.config.served_model_names[0]

    @cached_property
    def styles(self) -> Styles:
        """How the model writes tool calls and reasoning."""
        return Styles.of(self.text, self.config.tool_call_parser, self.config.reasoning_parser)

    @cached_property
    def fingerprint(self) -> str:
        """Answers with the same fingerprint were computed by the same arithmetic."""
        info = self.engine.info
        return f"nvfp4-{__version__}-{info.numerics}-{info.dtype}-kv-{info.kv_dtype}"

    def resolve_model(self, asked: str | None) -> str:
        """The name to answer with: the model's, or an adapter's. ModelNotFoundError for one that is not served here."""
        if not asked:
            return self.model_name
        if asked not in self.config.served_model_names and not self.engine.info.has_adapter(asked):
            raise ModelNotFoundError(asked)
        return asked


@dataclass(frozen=True)
class Answer:
    """What every part of one answer repeats.

    engine_id  unique even when a client sends the same request id twice
    terms      what the server and the client agreed on
    """

    id: str
    engine_id: str
    model: str
    created: int
    terms: Terms

    @classmethod
    def begin(cls, prefix: str, state: ServerState, request: Request, body: Any) -> Answer:
        model = state.resolve_model(body.model)
        base = sane_request_id(request.headers.get("x-request-id")) or body.request_id
        unique = secrets.token_hex(8)
        answer_id = f"{prefix}-{base or unique}"
        terms = Terms.of(request.scope, body.timeout, state.config)
        note((), model, answer_id)
        return cls(answer_id, f"{answer_id}-{unique}" if base else answer_id, model, int(time.time()), terms)


def sane_request_id(value: str | None) -> str | None:
    """A client's request id, if it is short and plain enough to be repeated in headers and logs."""
    return value if value is not None and _SANE_ID.fullmatch(value) else None
