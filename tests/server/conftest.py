"""A server on a FakeEngine, spoken to in process."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from nvfp4_runtime.text.processor import TextProcessor
from server.app import create_app
from server.config import ServerConfig
from tests.fakes import FakeEngine
from tests.server.no_network import no_network

TEXT = TextProcessor.simulated()


@dataclass
class Served:
    """One server under test."""

    app: FastAPI
    engine: FakeEngine
    http: httpx.AsyncClient

    async def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return await self.http.post(path, json=body, **options)

    async def complete(self, **body: Any) -> httpx.Response:
        return await self.post("/v1/completions", {"prompt": "Say hello"} | body)

    async def chat(self, **body: Any) -> httpx.Response:
        return await self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]} | body)

    async def metric(self, name: str, **labels: str) -> float:
        """The one sample of /metrics with this name and these labels."""
        text = (await self.http.get("/metrics")).text
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = [line for line in text.splitlines() if line.startswith(name + "{") and all(w in line for w in wanted)]
        assert len(lines) == 1, f"{name} {labels}: {lines}"
        return float(lines[0].rsplit(" ", 1)[1])


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of an SSE answer; its framing and [DONE] are checked here."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.text.endswith("data: [DONE]\n\n")
    parts = response.text.removesuffix("\n\n").split("\n\n")
    assert all(part.startswith("data: ") and "\n" not in part for part in parts)
    assert parts[-1] == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-1]]


def assert_error(response: httpx.Response, status: int, param: str | None, *words: str) -> None:
    """An OpenAI error object with these facts, and a message that holds these words."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == status
    assert body["error"]["param"] == param, body
    for word in words:
        assert word in body["error"]["message"], body


@asynccontextmanager
async def running_server(engine: FakeEngine, config: ServerConfig, text: TextProcessor = TEXT) -> AsyncIterator[Served]:
    app = create_app(engine, text, config)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    with no_network():
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            yield Served(app, engine, http)


Serve = Callable[..., Any]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """serve(engine=..., config...) starts a server that ends with the test."""
    async with AsyncExitStack() as stack:

        async def start(engine: FakeEngine | None = None, text: TextProcessor = TEXT, **config: Any) -> Served:
            config = {"served_model_names": ("tiny", "tiny-alias")} | config
            return await stack.enter_async_context(running_server(engine or FakeEngine(), ServerConfig(**config), text))

        yield start
