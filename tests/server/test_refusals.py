"""Every 400: known fields we do not honour, values out of range, degenerate requests. And what passes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.fakes import FakeEngine, fake_info
from tests.server.conftest import Serve, assert_error

BIG = 10**30
BOTH = ("/v1/completions", "/v1/chat/completions")
MESSAGES = [{"role": "user", "content": "Hi"}]


def body_for(path: str, **fields: Any) -> dict[str, Any]:
    base: dict[str, Any] = {"messages": MESSAGES} if "chat" in path else {"prompt": "Hi"}
    return {"max_tokens": 2} | base | fields


NOT_HONOURED = [
    ("early_stopping", True), ("length_penalty", 0.5), ("logprob_token_ids", [1]), ("session_id", "s"),
    ("return_token_offsets", True), ("routed_experts_prompt_start", 3), ("kv_transfer_params", {"a": 1}),
    ("ec_transfer_params", {"a": 1}), ("vllm_xargs", {"a": 1}), ("repetition_detection", {"a": 1}),
    ("thinking_token_budget", -1), ("best_of", 3), ("best_of", True), ("functions", []),
    ("function_call", "auto"), ("guided_json", {}), ("guided_regex", "a"), ("guided_choice", ["a"]),
    ("guided_grammar", "root ::= x"), ("guided_decoding_backend", "auto"),
]  # fmt: skip
NOT_HONOURED_COMPLETION = [("suffix", "end"), ("prompt_embeds", "AAAA")]
NOT_HONOURED_CHAT = [
    ("reasoning_effort", "low"), ("chat_template", "{{ x }}"), ("media_io_kwargs", {"a": 1}),
    ("mm_processor_kwargs", {"a": 1}), ("return_assistant_tokens_mask", True), ("modalities", ["text", "audio"]),
    ("audio", {"voice": "x"}), ("web_search_options", {}), ("verbosity", "low"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [(path, *pair) for path in BOTH for pair in NOT_HONOURED]
    + [(BOTH[0], *pair) for pair in NOT_HONOURED_COMPLETION]
    + [(BOTH[1], *pair) for pair in NOT_HONOURED_CHAT],
)
async def test_known_field_that_is_not_honoured_is_a_400_naming_it(
    serve: Serve, path: str, field: str, value: Any
) -> None:
    server = await serve()
    assert_error(await server.post(path, body_for(path, **{field: value})), 400, field, field)
    null = await server.post(path, body_for(path, **{field: None}))
    assert null.status_code == 200, "null asks for nothing"


@pytest.mark.parametrize("path", BOTH)
async def test_values_that_ask_for_nothing_pass(serve: Serve, path: str) -> None:
    server = await serve()
    noops = {
        "use_beam_search": False, "length_penalty": 1.0, "spaces_between_special_tokens": True, "bad_words": [],
        "response_format": {"type": "text"}, "truncation_side": "left", "priority": 0, "user": "someone",
        "best_of": 1, "early_stopping": False, "return_prompt_text": False,
    }  # fmt: skip
    chat = {"tool_choice": "none", "parallel_tool_calls": True, "include_reasoning": True} if "chat" in path else {}
    assert (await server.post(path, body_for(path, **noops, **chat))).status_code == 200


@pytest.mark.parametrize("path", BOTH)
async def test_unknown_fields_are_accepted(serve: Serve, path: str) -> None:
    server = await serve()
    response = await server.post(path, body_for(path, vendor_hint={"x": 1}))
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("field", "value", "instead"),
    [("functions", [], "tools"), ("function_call", "auto", "tool_choice"), ("guided_json", {}, "structured_outputs"),
     ("guided_decoding_backend", "x", "structured_outputs")],
)  # fmt: skip
async def test_field_of_the_past_is_refused_with_the_name_of_what_replaced_it(
    serve: Serve, field: str, value: Any, instead: str
) -> None:
    server = await serve()
    assert_error(await server.chat(**{field: value}), 400, field, field, instead)


async def test_unknown_nested_fields_are_accepted_and_logged(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    server = await serve()
    messages = [{"role": "user", "content": "Hi", "mood": 1, "audio": None, "function_call": None}]
    with caplog.at_level("DEBUG", "server.protocol"):
        response = await server.chat(
            messages=messages, stream=True, stream_options={"hint": 1}, max_tokens=1, vendor_hint=1
        )
    assert response.status_code == 200, response.text
    for name in ("messages.0.'mood'", "stream_options.'hint'", "'vendor_hint'"):
        assert f"ignoring the unknown request field {name}" in caplog.text


@pytest.mark.parametrize(
    ("field", "value"), [("function_call", {"name": "f", "arguments": "{}"}), ("audio", {"id": "a"})]
)
async def test_message_part_that_the_model_would_not_see_is_refused(serve: Serve, field: str, value: Any) -> None:
    server = await serve()
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, field: value}]
    assert_error(await server.chat(messages=messages), 400, "messages", f"messages.1.{field}")


OUT_OF_RANGE = [
    ("temperature", -0.1), ("temperature", 2.1), ("top_p", 0.0), ("top_p", 1.5), ("top_k", -2), ("min_p", 1.1),
    ("min_p", -0.1), ("repetition_penalty", 0), ("presence_penalty", 2.5), ("frequency_penalty", -3),
    ("n", 0), ("n", -1), ("n", 129), ("n", 10**9), ("n", BIG), ("max_tokens", 0), ("max_tokens", -5),
    ("max_tokens", BIG), ("min_tokens", -1), ("min_tokens", 3), ("seed", 2**63), ("seed", -(2**63) - 1),
    ("stream_interval", 0), ("stream_interval", -1), ("prompt_logprobs", -1), ("prompt_logprobs", 21),
    ("truncate_prompt_tokens", 0),
    ("truncate_prompt_tokens", -2), ("truncate_prompt_tokens", 10**6), ("truncation_side", "middle"),
    ("stop_token_ids", [-1]), ("stop_token_ids", [259]), ("stop_token_ids", [2**63]), ("stop_token_ids", [True]),
    ("stop_token_ids", ["x"]), ("logit_bias", {"259": 1}), ("logit_bias", {"-1": 1}), ("logit_bias", {"x": 1}),
    ("logit_bias", {"5": 101}), ("logit_bias", {"9" * 40: 1}), ("logit_bias", [1]), ("cache_salt", ""),
    ("cache_salt", "x" * 65), ("user", "x" * 513), ("request_id", "a b"), ("request_id", "x" * 129),
    ("stop", ""), ("stop", ["a", ""]), ("stop", ["x"] * 65), ("stop", "x" * 1025), ("stop", 5), ("stop", [5]),
]  # fmt: skip
WRONG_TYPE = [
    ("temperature", "hot"), ("temperature", True), ("temperature", [1]), ("max_tokens", 1.5), ("max_tokens", True),
    ("max_tokens", "many"), ("n", 1.5), ("n", False), ("top_k", 0.5), ("seed", "x"), ("stream", "perhaps"),
    ("model", 5), ("echo", 7), ("stream_options", 3), ("logit_bias", {"5": "x"}), ("min_tokens", {}),
]  # fmt: skip


@pytest.mark.parametrize("path", BOTH)
@pytest.mark.parametrize(("field", "value"), OUT_OF_RANGE + WRONG_TYPE)
async def test_degenerate_value_is_a_400_naming_the_field(serve: Serve, path: str, field: str, value: Any) -> None:
    server = await serve()
    assert_error(await server.post(path, body_for(path, **{field: value})), 400, field)
    assert server.engine.running == 0


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"])
async def test_numbers_that_json_does_not_have_are_refused(serve: Serve, field: str, value: str) -> None:
    server = await serve()
    content = f'{{"prompt": "Hi", "{field}": {value}}}'
    headers = {"content-type": "application/json"}
    assert_error(await server.http.post("/v1/completions", content=content, headers=headers), 400, field)


@pytest.mark.parametrize(
    "prompt",
    ["", [], [""], [[]], [[1], []], [-1], [259], [2**63], [BIG], [1.5], [True], [None], [1, "a"], [[1], "a"], {}, 5,
     [["a"]], [[[1]]], "\ud800", ["ok", "\udfff"]],
)  # fmt: skip
async def test_degenerate_prompt_is_a_400(serve: Serve, prompt: Any) -> None:
    server = await serve()
    content = json.dumps({"prompt": prompt})
    headers = {"content-type": "application/json"}
    assert_error(await server.http.post("/v1/completions", content=content, headers=headers), 400, "prompt")
    assert server.engine.running == 0


@pytest.mark.parametrize(
    "messages",
    [[], "Hi", [5], [{}], [{"content": "x"}], [{"role": "wizard", "content": "x"}], [{"role": "user", "content": 5}],
     [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": "\ud800"}], {"role": "user"}],
)  # fmt: skip
async def test_degenerate_messages_are_a_400(serve: Serve, messages: Any) -> None:
    server = await serve()
    content = json.dumps({"messages": messages})
    headers = {"content-type": "application/json"}
    assert_error(await server.http.post("/v1/chat/completions", content=content, headers=headers), 400, "messages")


@pytest.mark.parametrize("path", BOTH)
async def test_missing_prompt_or_messages_is_a_400(serve: Serve, path: str) -> None:
    server = await serve()
    assert_error(await server.post(path, {"max_tokens": 1}), 400, "messages" if "chat" in path else "prompt")


@pytest.mark.parametrize("content", ["", "{", "[]", "5", "null", '"x"', "{'a': 1}", "[" * 100_000])
@pytest.mark.parametrize("path", BOTH)
async def test_body_that_is_not_a_json_object_is_a_400(serve: Serve, path: str, content: str) -> None:
    server = await serve()
    response = await server.http.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["code"] == 400


async def test_body_of_another_content_type_is_a_400(serve: Serve) -> None:
    server = await serve()
    response = await server.http.post("/v1/completions", content="{}", headers={"content-type": "text/plain"})
    assert_error(response, 400, None, "application/json")


@pytest.mark.parametrize("path", BOTH)
async def test_rules_between_fields(serve: Serve, path: str) -> None:
    server = await serve()

    async def refused(param: str, **fields: Any) -> None:
        assert_error(await server.post(path, body_for(path, **fields)), 400, param)

    await refused("stream_options", stream_options={"include_usage": True})
    await refused("prompt_logprobs", prompt_logprobs=1, stream=True)
    await refused("n", n=2, temperature=0)
    await refused("best_of", n=2, best_of=3)
    await refused("allowed_token_ids", allowed_token_ids=[])
    await refused("allowed_token_ids", allowed_token_ids=[259])
    await refused("allowed_token_ids", allowed_token_ids=[258], min_tokens=1)
    await refused("allowed_token_ids", allowed_token_ids=[97, 98], bad_words=["a", "b"])
    await refused("bad_words", bad_words=[""])
    await refused("bad_words", bad_words=["  "])
    await refused("bad_words", bad_words=["x"] * 65)
    await refused("logprob_token_ids", logprob_token_ids=[1])
    if "chat" in path:
        await refused("tools", tools=[])
        await refused("tool_choice", tool_choice="auto")
        await refused("top_logprobs", top_logprobs=2)
        await refused("top_logprobs", logprobs=True, top_logprobs=21)
        await refused("top_logprobs", logprobs=True, top_logprobs=-1)
        await refused("max_completion_tokens", max_completion_tokens=0)
        await refused("max_tokens", max_tokens=0)
        await refused("continue_final_message", continue_final_message=True)
    else:
        await refused("logprobs", logprobs=21)
        await refused("logprobs", logprobs=-1)
        await refused("logprobs", logprobs=21, echo=True)
        await refused("prompt_logprobs", prompt_logprobs=-1, logprobs=2, echo=True)


async def test_huge_n_is_refused_before_any_work_that_grows_with_it(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await serve()

    def unexpected(*arguments: Any) -> Any:
        raise AssertionError("n was not checked first")

    for work in ("encode_prompts", "make_jobs"):
        monkeypatch.setattr(f"server.routes.completions.{work}", unexpected)
    assert_error(await server.complete(n=10**9), 400, "n")
    assert (await server.complete(n=1)).status_code == 500, "the work that n is checked before"


@pytest.mark.parametrize("field", ["model", "user", "stop", "cache_salt", "logit_bias"])
async def test_lone_surrogates_in_any_string_do_no_harm(serve: Serve, field: str) -> None:
    server = await serve()
    value = '{"\\ud800": "x"}' if field == "logit_bias" else '"\\ud800"'
    content = f'{{"prompt": "Hi", "{field}": {value}}}'
    response = await server.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404), response.text


async def test_prompts_times_n_are_bounded(serve: Serve) -> None:
    server = await serve()
    assert_error(await server.complete(prompt=["a"] * 129, n=8), 400, "prompt", "1032 choices")
    assert server.engine.submitted == []


async def test_full_queue_is_a_429_with_retry_after_and_leaves_nothing_behind(serve: Serve) -> None:
    server = await serve(FakeEngine(info=fake_info(max_num_seqs=2, max_queued_requests=1)))
    response = await server.complete(prompt=["a", "b", "c", "d"])
    assert_error(response, 429, None)
    assert int(response.headers["retry-after"]) >= 1
    assert server.engine.running == 0, "what was submitted before the refusal must be aborted"
    assert (await server.complete(max_tokens=1)).status_code == 200


async def test_unknown_model_is_a_404_in_vllms_words(serve: Serve) -> None:
    server = await serve()
    for path in BOTH:
        response = await server.post(path, body_for(path, model="other"))
        assert_error(response, 404, "model", "The model `other` does not exist.")
        assert response.json()["error"]["type"] == "NotFoundError"
        assert (await server.post(path, body_for(path, model="tiny-alias"))).json()["model"] == "tiny-alias"


@pytest.mark.parametrize("path", [*BOTH, "/v1/responses", "/tokenize"])
async def test_json_that_is_nested_too_deep_to_read_is_a_400(serve: Serve, path: str) -> None:
    server = await serve()
    content = '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}"
    response = await server.http.post(path, content=content, headers={"content-type": "application/json"})
    assert_error(response, 400, None, "nested too deep")
    assert response.json()["error"]["type"] == "BadRequestError"
