"""One logprob entry per token id, in every event and in the whole, wherever the answer is cut."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from server.config import ServerConfig
from tests.fakes import FakeEngine
from tests.server.conftest import events, running_server

SCRIPTS = st.lists(st.sampled_from([*"aéb日🎉".encode(), 0xFF, 0x80, 256, 258]), min_size=1, max_size=12)
OPTIONS = st.fixed_dictionaries(
    {"n": st.integers(1, 2), "max_tokens": st.integers(1, 15)},
    optional={
        "stop": st.lists(st.text("aéb日\ufffd", min_size=1, max_size=2), min_size=1, max_size=2),
        "include_stop_str_in_output": st.booleans(),
        "ignore_eos": st.booleans(),
        "skip_special_tokens": st.booleans(),
        "echo": st.booleans(),
        "logprob_token_ids": st.just([97, 98]),
        "return_tokens_as_token_ids": st.booleans(),
        "stream_interval": st.integers(1, 6),
    },
)


@settings(deadline=None, max_examples=80)
@given(SCRIPTS, OPTIONS, st.integers(1, 4))
def test_completions_and_chat_streamed_and_whole(script: list[int], options: dict[str, Any], group: int) -> None:
    asyncio.run(check(script, options, group))


async def check(script: list[int], options: dict[str, Any], group: int) -> None:
    engine = FakeEngine(script, group=group)
    async with running_server(engine, ServerConfig(served_model_names=("tiny",))) as server:
        body = options | {"prompt": "ab", "logprobs": 2, "return_token_ids": True}
        whole = (await server.post("/v1/completions", body)).json()["choices"]
        chunks = events(await server.post("/v1/completions", body | {"stream": True}))
        for choice in whole:
            parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
            echoed = 2 if options.get("echo") else 0
            assert len(choice["logprobs"]["tokens"]) == len(choice["token_ids"]) + echoed
            assert "".join(part["text"] for part in parts) == choice["text"]
            assert [i for part in parts for i in part["token_ids"]] == choice["token_ids"]
            for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                assert [x for part in parts for x in part["logprobs"][field]] == choice["logprobs"][field]
            assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]
        body = options | {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "return_token_ids": True}
        whole = (await server.post("/v1/chat/completions", body)).json()["choices"]
        chunks = events(await server.post("/v1/chat/completions", body | {"stream": True}))
        for choice in whole:
            parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
            entries = choice["logprobs"]["content"]
            assert len(entries) == len(choice["token_ids"])
            assert [e for p in parts if p["logprobs"] for e in p["logprobs"]["content"]] == entries
            assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
            for part in parts:
                assert len((part["logprobs"] or {"content": []})["content"]) == len(part.get("token_ids", []))
        assert engine.running == 0
