"""A thinking budget in real processes, on a simulated model that would think for ever."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.e2e.conftest import Launch, LiveServer

pytest.importorskip("llguidance", reason="package llguidance is not installed")

MESSAGES: list[Any] = [{"role": "user", "content": "Why?"}]
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["x"],
    "additionalProperties": False,
}
FORM: Any = {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT}}
TOOL: Any = {"type": "function", "function": {"name": "point", "parameters": POINT}}


@pytest.fixture(scope="module")
def thinker(launch: Launch) -> LiveServer:
    """Few blocks for many requests, so that some are preempted."""
    return launch(
        "--simulate", "--reasoning-parser", "deepseek_r1", "--max-num-seqs", "6", "--max-model-len", "768",
        "--num-kv-blocks", "50", "--simulate-step-seconds", "0.001",
    )  # fmt: skip


@pytest.fixture(scope="module")
def client(thinker: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{thinker.url}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, budget: int, **options: Any) -> Any:
    body: dict[str, Any] = {
        "max_tokens": 100,
        "seed": 1,
        "extra_body": {"thinking_token_budget": budget, "return_token_ids": True},
    }
    body |= options
    return client.chat.completions.create(model="simulated", messages=MESSAGES, **body)


@pytest.mark.parametrize("budget", [0, 1, 12])
def test_reasoning_ends_with_its_budget_and_the_answer_follows(client: openai.OpenAI, budget: int) -> None:
    answer, free = ask(client, budget), ask(client, 10_000)
    assert answer.usage.completion_tokens_details.reasoning_tokens == budget
    assert free.usage.completion_tokens_details.reasoning_tokens == answer.usage.completion_tokens == 100
    assert (free.choices[0].message.content, bool(answer.choices[0].message.content)) == (None, True)
    tokens = answer.choices[0].token_ids
    assert tokens[:budget] == free.choices[0].token_ids[:budget]
    assert bytes(tokens[budget : budget + 8]) == b"</think>"


def test_grammars_and_forced_calls_begin_behind_the_budget(client: openai.OpenAI) -> None:
    for choice in ask(client, 5, response_format=FORM, n=3, temperature=1.0).choices:
        assert len(choice.message.reasoning) > 0
        assert choice.finish_reason == "stop"
        assert 1 <= json.loads(choice.message.content)["x"] <= 9
    for forced in ("required", {"type": "function", "function": {"name": "point"}}):
        (choice,) = ask(client, 3, tools=[TOOL], tool_choice=forced, parallel_tool_calls=False).choices
        (call,) = choice.message.tool_calls
        assert 1 <= json.loads(call.function.arguments)["x"] <= 9


def test_what_runs_beside_it_changes_nothing(client: openai.OpenAI, thinker: LiveServer) -> None:
    def one(i: int) -> Any:
        forms: list[Any] = [{}, {"response_format": FORM}, {"n": 2, "temperature": 1.0}]
        answer = ask(client, 7 * i, **forms[i % 3], seed=i, max_tokens=200)
        return [(choice.message.reasoning, choice.message.content) for choice in answer.choices], answer.usage

    alone = [one(i) for i in range(9)]
    preempted = thinker.metric("vllm:num_preemptions_total")
    with ThreadPoolExecutor(9) as pool:
        assert list(pool.map(one, range(9))) == alone
    assert thinker.metric("vllm:num_preemptions_total") > preempted
    thinker.assert_idle()


def test_the_other_apis_bound_it_too(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": "simulated", "input": "Why?", "max_output_tokens": 60}
    response = client.responses.create(**body, extra_body={"thinking_token_budget": 9})
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.usage.output_tokens_details.reasoning_tokens == 9
    silent = client.responses.create(**body, reasoning={"effort": "none"})
    assert [item.type for item in silent.output] == ["message"]
