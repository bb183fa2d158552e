"""Any JSON under any known field name is answered, never with a 5xx, and leaves nothing running."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from server.config import ServerConfig
from server.protocol.chat import ChatCompletionRequest
from server.protocol.completions import CompletionRequest
from server.protocol.embeddings import EmbeddingRequest
from server.protocol.messages import CountTokensRequest, MessagesRequest
from server.protocol.responses import ResponsesRequest
from server.protocol.tokenize import DetokenizeRequest, TokenizeRequest
from tests.fakes import FakeEngine
from tests.server.conftest import running_server

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-2, 5)
    | st.floats()
    | st.floats(-2, 2)
    | st.text(max_size=5)
    | st.sampled_from(["auto", "none", "text", "user", "tiny", "\ud800", "1", "true"])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
PARTS = st.fixed_dictionaries({}, optional={"type": st.just("text") | VALUES, "text": VALUES})
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"])},
        optional={"content": st.text(max_size=9) | st.lists(PARTS, max_size=2) | VALUES, "tool_calls": VALUES},
    ),
    max_size=3,
)
EXTRAS = [
    "tools",
    "tool_choice",
    "response_format",
    "suffix",
    "bad_words",
    "vllm_xargs",
    "chat_template",
    "length_penalty",
]


def bodies(kind: type[BaseModel], /, **given_fields: Any) -> Any:
    names = [*kind.model_fields, *EXTRAS]
    some = st.dictionaries(st.sampled_from(names), VALUES, max_size=4)
    return st.tuples(st.fixed_dictionaries(given_fields), some).map(lambda pair: pair[0] | pair[1])


PROMPTS = st.text(max_size=9) | st.lists(st.integers(0, 258), max_size=5) | VALUES
NAMES = st.sampled_from(["f", "g"]) | VALUES
BLOCKS = st.lists(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "thinking", "tool_use", "tool_result", "image"])},
        optional={
            "text": VALUES, "thinking": VALUES, "id": NAMES, "name": NAMES, "tool_use_id": NAMES, "is_error": VALUES,
            "input": st.just({}) | VALUES, "content": VALUES | st.lists(PARTS, max_size=2),
        },
    ),
    max_size=3,
)  # fmt: skip
TURNS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text(max_size=9) | BLOCKS}),
    max_size=3,
)
CALLS = st.fixed_dictionaries(
    {"type": st.sampled_from(["function_call", "function_call_output", "reasoning"])},
    optional={
        "call_id": NAMES, "name": NAMES, "arguments": st.sampled_from(["{}", "{", "[1]"]) | VALUES,
        "output": st.text(max_size=5) | st.lists(PARTS, max_size=2) | VALUES, "content": VALUES, "summary": VALUES,
    },
)  # fmt: skip
ITEMS = st.lists(
    MESSAGES.map(lambda m: m[0] if m else {}) | CALLS | st.dictionaries(st.text(max_size=5), VALUES), max_size=4
)
SCHEMAS = st.just({"type": "object"}) | VALUES
TOOLS: dict[str, Any] = {
    "tools": st.none()
    | st.lists(
        st.fixed_dictionaries({"name": NAMES, "input_schema": SCHEMAS}, optional={"type": st.just("function") | VALUES})
        | st.fixed_dictionaries({"type": st.just("function"), "name": NAMES}, optional={"parameters": SCHEMAS}),
        max_size=2,
    ),
    "tool_choice": st.none()
    | st.sampled_from(["auto", "required", {"type": "any"}, {"type": "tool", "name": "f"}])
    | st.fixed_dictionaries({"type": st.just("function"), "name": NAMES}),
}
FEW = {"max_tokens": st.integers(-1, 20) | VALUES}
REQUESTS = st.one_of(
    st.tuples(st.just("/v1/completions"), bodies(CompletionRequest, prompt=PROMPTS)),
    st.tuples(st.just("/v1/chat/completions"), bodies(ChatCompletionRequest, messages=MESSAGES | VALUES)),
    st.tuples(st.just("/v1/responses"), bodies(ResponsesRequest, input=st.text(max_size=9) | ITEMS | VALUES, **TOOLS)),
    st.tuples(
        st.just("/v1/messages"), bodies(MessagesRequest, model=st.just("tiny"), messages=TURNS | VALUES, **FEW, **TOOLS)
    ),
    st.tuples(
        st.just("/v1/messages/count_tokens"), bodies(CountTokensRequest, model=st.just("tiny"), messages=TURNS, **TOOLS)
    ),
    st.tuples(st.just("/v1/embeddings"), bodies(EmbeddingRequest, input=PROMPTS)),
    st.tuples(st.just("/tokenize"), bodies(TokenizeRequest, messages=MESSAGES | st.none())),
    st.tuples(st.just("/detokenize"), bodies(DetokenizeRequest, tokens=st.lists(st.integers(-1, 300)) | VALUES)),
    st.tuples(st.just("/invocations"), bodies(ChatCompletionRequest, messages=MESSAGES) | bodies(CompletionRequest)),
)


async def answer(path: str, body: Any) -> None:
    engine = FakeEngine()
    async with running_server(engine, ServerConfig(served_model_names=("tiny",))) as server:
        response = await server.http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
        await server.app.state.server.responses.close()  # what runs in the background
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == ({"type", "message"} if "/messages" in path else {"message", "type", "param", "code"})
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.endswith("\n\n")
        assert response.text.endswith("data: [DONE]\n\n") or path in ("/v1/responses", "/v1/messages")
        assert '"type":"error"' not in response.text
    assert engine.running == 0


@settings(max_examples=300, deadline=None)
@given(REQUESTS)
def test_no_json_body_gets_a_5xx(request: tuple[str, Any]) -> None:
    asyncio.run(answer(*request))
