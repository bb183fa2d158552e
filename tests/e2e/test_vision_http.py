"""A vision-language checkpoint over HTTP: text is answered; images are refused with what is served instead."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests import tiny
from tests.e2e.conftest import Launch, LiveServer
from tests.models.test_vision import LAYOUTS, prefixed

PIXEL = "data:image/png;base64,iVBORw0KGgo="
ANTHROPIC = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
REFUSAL = "of a model that also sees images, its text part alone is served"


@pytest.fixture(scope="module")
def server(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> LiveServer:
    """A tiny Qwen3-VL: its decoder where the hub's files have it, and a tensor of its tower."""
    architecture, text, nested, root, head, tower = LAYOUTS["Qwen3-VL"]
    config = {**nested({**text, "architectures": None}), "architectures": [architecture], "model_type": "qwen3_vl"}
    tensors = prefixed(tiny.random_tensors(text, seed=4), root, head) | {
        tower: tiny.random_tensors(text)["lm_head.weight"]
    }
    folder = tiny.write_plain(tmp_path_factory.mktemp("vl") / "model", config, tensors)
    return launch(str(folder), "--num-kv-blocks", "64", "--served-model-name", "vl")


def user(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts]}]


TEXT = {"type": "text", "text": "What is it?"}
IMAGES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": user(TEXT, {"type": "image_url", "image_url": {"url": PIXEL}})}),
    ("/v1/chat/completions", {"messages": user({"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/"}})}),
    (
        "/v1/responses",
        {"input": user({"type": "input_text", "text": "x"}, {"type": "input_image", "image_url": PIXEL})},
    ),
    ("/v1/messages", {"messages": user({"type": "image", "source": ANTHROPIC}, TEXT)}),
]


@pytest.mark.parametrize(("path", "body"), IMAGES)
@pytest.mark.parametrize("stream", [False, True])
def test_an_image_is_a_400_that_says_what_is_served(
    server: LiveServer, path: str, body: dict[str, Any], stream: bool
) -> None:
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    response = httpx.post(server.url + path, json={"model": "vl", limit: 4, "stream": stream, **body}, timeout=60)
    assert response.status_code == 400, response.text
    message = response.json()["error"]["message"]
    assert REFUSAL in message
    assert "image" in message.split("found a ")[1], "the part's type is named"
    server.assert_idle()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "What is it?", "max_tokens": 4}),
        ("/v1/chat/completions", {"messages": user(TEXT), "max_tokens": 4}),
        ("/v1/responses", {"input": user({"type": "input_text", "text": "What is it?"}), "max_output_tokens": 4}),
        ("/v1/messages", {"messages": user(TEXT), "max_tokens": 4}),
    ],
)
def test_text_is_answered(server: LiveServer, path: str, body: dict[str, Any]) -> None:
    response = httpx.post(server.url + path, json={"model": "vl", **body}, timeout=60)
    assert response.status_code == 200, response.text
    usage = response.json()["usage"]
    assert 1 <= usage.get("completion_tokens", usage.get("output_tokens")) <= 4
