"""thinking_token_budget, reasoning_effort and reasoning_tokens over HTTP."""

from __future__ import annotations

from typing import Any

import pytest

from nvfp4_runtime.structured.thinking import ThinkingBudget
from tests.fakes import FakeEngine
from tests.server.conftest import Serve, assert_error, events
from tests.server.test_reasoning import CLOSED, OPENED, THINKING, text_of
from tests.server.test_tools import prompt_of, says

HARMONY = "{{ messages[0].content }}<|start|>assistant{# <|channel|><|message|> #}"


def budget_of(engine: FakeEngine) -> ThinkingBudget | None:
    return engine.submitted[-1].params.thinking


@pytest.mark.parametrize(("template", "is_open"), [(OPENED, True), (THINKING, False)])
async def test_budget_reaches_the_engine_as_tokens(serve: Serve, template: str, is_open: bool) -> None:
    server = await serve(says("x"), text=text_of(template))
    await server.chat(thinking_token_budget=7)
    budget = budget_of(server.engine)
    assert budget is not None
    assert (bytes(budget.span.opens), bytes(budget.span.closes)) == (b"<think>", b"</think>")
    assert (budget.num_tokens, bytes(budget.ending), budget.span.is_open) == (7, b"</think>", is_open)
    await server.chat()
    assert budget_of(server.engine) is None


async def test_nothing_is_bounded_where_the_prompt_has_closed_the_reasoning(serve: Serve) -> None:
    server = await serve(says("x"), text=text_of(CLOSED))
    await server.chat(thinking_token_budget=7)
    assert budget_of(server.engine) is None


async def test_harmony_is_led_over_to_the_final_channel(serve: Serve) -> None:
    server = await serve(says("x"), text=text_of(HARMONY))
    await server.chat(thinking_token_budget=7)
    budget = budget_of(server.engine)
    assert budget is not None
    assert budget.span.blanks is None
    assert bytes(budget.span.opens) == b"<|channel|>analysis<|message|>"
    assert bytes(budget.ending) == b"<|end|><|start|>assistant<|channel|>final<|message|>"


@pytest.mark.parametrize(("prompt", "is_open"), [("Why?<think>\n", True), ([*b"Why?<think>"], True), ("Why?", False)])
async def test_completions_take_a_budget_too(serve: Serve, prompt: Any, is_open: bool) -> None:
    server = await serve(says("x"), text=text_of(THINKING))
    await server.complete(prompt=prompt, thinking_token_budget=3)
    budget = budget_of(server.engine)
    assert budget is not None
    assert (budget.num_tokens, budget.span.is_open) == (3, is_open)


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"thinking_token_budget": 5}, "thinking_token_budget", "--reasoning-parser"),
        ({"thinking_token_budget": -1}, "thinking_token_budget", ""),
        ({"thinking_token_budget": 5, "use_beam_search": True}, "thinking_token_budget", "use_beam_search"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "does not read"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort", ""),
    ],
)
async def test_what_cannot_be_had_is_a_400_naming_the_field(
    serve: Serve, fields: dict[str, Any], param: str, word: str
) -> None:
    server = await serve()
    assert_error(await server.chat(**fields), 400, param, word)
    if param == "thinking_token_budget":
        assert_error(await server.complete(**fields), 400, param, word)
    assert server.engine.running == 0


async def test_effort_is_for_templates_that_read_it(serve: Serve) -> None:
    server = await serve(says("x"), text=text_of("{{ messages[0].content }} effort={{ reasoning_effort }}"))
    await server.chat(reasoning_effort="xhigh")
    assert "effort=xhigh" in prompt_of(server.engine)
    await server.chat(reasoning_effort="low", chat_template_kwargs={"reasoning_effort": "max"})
    assert "effort=max" in prompt_of(server.engine)


@pytest.mark.parametrize("switch", ["enable_thinking", "thinking"])
async def test_no_effort_turns_reasoning_off(serve: Serve, switch: str) -> None:
    template = f"{{{{ messages[0].content }}}}{{{{ '<think>' if {switch} is not false else 'off' }}}}{{# </think> #}}"
    server = await serve(says("x"), text=text_of(template))
    await server.chat(reasoning_effort="none")
    assert prompt_of(server.engine).endswith("off")
    budget = budget_of(server.engine)
    assert budget is not None
    assert budget.num_tokens == 0
    await server.chat()
    assert prompt_of(server.engine).endswith("<think>")


async def test_no_effort_of_a_model_that_does_not_reason_asks_for_nothing(serve: Serve) -> None:
    server = await serve(says("x"))
    assert (await server.chat(reasoning_effort="none")).status_code == 200
    assert budget_of(server.engine) is None


@pytest.mark.parametrize(
    ("template", "said", "details"),
    [
        (OPENED, "hmm</think>Yes", {"reasoning_tokens": 3}),
        (THINKING, "<think>hm</think>Yes", {"reasoning_tokens": 2}),
        (THINKING, "Yes", {"reasoning_tokens": 0}),
        (OPENED, "hmm", {"reasoning_tokens": 4}),  # EOS came inside
        (HARMONY, "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Yes",
         {"reasoning_tokens": 2}),
        ("{{ messages[0].content }}", "Yes", None),
    ],
)  # fmt: skip
async def test_usage_tells_the_tokens_of_reasoning(
    serve: Serve, template: str, said: str, details: dict[str, int] | None
) -> None:
    server = await serve(says(said), text=text_of(template))
    fields: dict[str, Any] = {"max_tokens": 150, "n": 2, "temperature": 1.0}
    both = None if details is None else {"reasoning_tokens": 2 * details["reasoning_tokens"]}
    whole = (await server.chat(**fields)).json()
    assert whole["usage"]["completion_tokens_details"] == both
    chunks = events(await server.chat(**fields, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1]["usage"]["completion_tokens_details"] == both
    hidden = (await server.chat(**fields, include_reasoning=False)).json()
    assert hidden["usage"]["completion_tokens_details"] == both
