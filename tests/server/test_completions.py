"""POST /v1/completions: shapes field by field, and streamed equal to plain."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

from tests.fakes import FakeEngine
from tests.server.conftest import Serve, assert_error, events

ANSWER = "Hello world, this is a scripted answer."
TOP_FIELDS = {
    "id", "object", "created", "model", "choices", "service_tier", "system_fingerprint", "usage",
    "kv_transfer_params", "ec_transfer_params", "metrics",
}  # fmt: skip
CHOICE_FIELDS = {
    "index", "text", "logprobs", "finish_reason", "stop_reason", "token_ids", "prompt_logprobs",
    "prompt_token_ids", "routed_experts",
}  # fmt: skip


def joined(chunks: list[dict[str, Any]]) -> dict[int, str]:
    texts: dict[int, str] = defaultdict(str)
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    return dict(texts)


async def test_plain_answer_has_every_field_nulls_included(serve: Serve) -> None:
    server = await serve()
    response = await server.complete(max_tokens=5)
    body = response.json()
    assert set(body) == TOP_FIELDS
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["model"] == "tiny"
    assert isinstance(body["created"], int)
    assert "w4a16" in body["system_fingerprint"]
    (choice,) = body["choices"]
    assert set(choice) == CHOICE_FIELDS
    assert choice == dict.fromkeys(CHOICE_FIELDS) | {"index": 0, "text": "Hello", "finish_reason": "length"}
    assert body["usage"] == {
        "prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14, "prompt_tokens_details": None,
        "completion_tokens_details": None,
    }  # fmt: skip


async def test_max_tokens_is_16_when_left_out_or_null(serve: Serve) -> None:
    server = await serve()
    for body in ({}, {"max_tokens": None}):
        assert (await server.complete(**body)).json()["choices"][0]["text"] == ANSWER[:16]


async def test_default_max_tokens_shrinks_to_what_fits(serve: Serve) -> None:
    server = await serve()
    response = await server.complete(prompt=[1] * 250)
    assert response.json()["usage"]["completion_tokens"] == 6


async def test_streamed_chunks_carry_set_fields_only_and_join_to_the_plain_text(serve: Serve) -> None:
    server = await serve()
    plain = (await server.complete(max_tokens=20)).json()
    chunks = events(await server.complete(max_tokens=20, stream=True))
    assert joined(chunks) == {0: plain["choices"][0]["text"]}
    for chunk in chunks[:-1]:
        assert set(chunk) == {"id", "object", "created", "model", "choices"}
        assert set(chunk["choices"][0]) == {"index", "text", "logprobs", "finish_reason", "stop_reason"}
        assert chunk["choices"][0]["finish_reason"] is None
    last = chunks[-1]
    assert last["choices"][0]["finish_reason"] == "length"
    assert last["system_fingerprint"] == plain["system_fingerprint"]
    assert len({chunk["id"] for chunk in chunks}) == 1


async def test_usage_comes_in_a_chunk_without_choices_when_asked_for(serve: Serve) -> None:
    server = await serve()
    chunks = events(await server.complete(max_tokens=4, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 4
    assert all("usage" not in chunk for chunk in chunks[:-1])
    without = events(await server.complete(max_tokens=4, stream=True))
    assert all("usage" not in chunk and chunk["choices"] for chunk in without)


async def test_continuous_usage_needs_include_usage(serve: Serve) -> None:
    server = await serve()
    both = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(await server.complete(max_tokens=4, stream=True, stream_options=both))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 4]
    alone = events(await server.complete(max_tokens=4, stream=True, stream_options={"continuous_usage_stats": True}))
    assert all("usage" not in chunk for chunk in alone)


async def test_list_of_prompts_with_n_answers_prompt_major(serve: Serve) -> None:
    server = await serve(FakeEngine(lambda prompt, params: [prompt[0], 48 + (params.seed or 0)]))
    response = await server.complete(prompt=["a", "b"], n=2, max_tokens=2, seed=5)
    body = response.json()
    assert [(c["index"], c["text"]) for c in body["choices"]] == [(0, "a5"), (1, "a6"), (2, "b5"), (3, "b6")]
    assert body["usage"]["prompt_tokens"] == 2
    assert body["usage"]["completion_tokens"] == 8
    chunks = events(await server.complete(prompt=["a", "b"], n=2, max_tokens=2, seed=5, stream=True))
    assert joined(chunks) == {0: "a5", 1: "a6", 2: "b5", 3: "b6"}
    finished = [c["choices"][0]["index"] for c in chunks if c["choices"][0]["finish_reason"]]
    assert sorted(finished) == [0, 1, 2, 3]


@pytest.mark.parametrize("prompt", [[72, 105], [[72, 105]], "Hi", ["Hi"]])
async def test_prompts_can_be_text_or_token_ids(serve: Serve, prompt: Any) -> None:
    server = await serve()
    await server.complete(prompt=prompt)
    assert server.engine.submitted[0].prompt_token_ids == [72, 105]


async def test_special_tokens_in_a_completion_prompt_are_read_as_such(serve: Serve) -> None:
    server = await serve()
    await server.complete(prompt="<|im_start|>a")
    assert server.engine.submitted[0].prompt_token_ids == [257, 97]


async def test_stop_string_over_token_boundaries_never_leaks_a_prefix(serve: Serve) -> None:
    server = await serve()
    response = await server.complete(max_tokens=39, stop=["world, t", "zzz"])
    choice = response.json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("Hello ", "stop", "world, t")
    assert response.json()["usage"]["completion_tokens"] == len("Hello world, t")
    chunks = events(await server.complete(max_tokens=39, stop=["world, t", "zzz"], stream=True))
    assert joined(chunks) == {0: "Hello "}
    assert chunks[-1]["choices"][0]["stop_reason"] == "world, t"
    assert len(server.engine.aborted) == 2, "a stop string must end the request in the engine"
    assert server.engine.running == 0


async def test_stop_string_is_kept_with_include_stop_str_in_output(serve: Serve) -> None:
    server = await serve()
    response = await server.complete(max_tokens=39, stop="world", include_stop_str_in_output=True)
    assert response.json()["choices"][0]["text"] == "Hello world"


@pytest.mark.parametrize("group", [1, 3, 50])
async def test_stop_strings_do_not_depend_on_how_tokens_are_grouped(serve: Serve, group: int) -> None:
    server = await serve(FakeEngine(group=group))
    response = await server.complete(max_tokens=39, stop=["scripted", "is a"], return_token_ids=True)
    choice = response.json()["choices"][0]
    assert choice["text"] == "Hello world, this "
    assert choice["stop_reason"] == "is a"
    assert bytes(choice["token_ids"]).decode() == "Hello world, this is a"


async def test_min_tokens_disarms_stop_strings(serve: Serve) -> None:
    server = await serve()
    response = await server.complete(max_tokens=39, stop="l", min_tokens=5)
    assert response.json()["choices"][0]["text"] == "Hello wor"


async def test_stop_token_ends_without_its_text_and_is_named(serve: Serve) -> None:
    server = await serve()
    choice = (await server.complete(max_tokens=39, stop_token_ids=[ord("w")])).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("Hello ", "stop", ord("w"))


async def test_eos_has_no_stop_reason_and_no_text(serve: Serve) -> None:
    server = await serve(FakeEngine([*b"Bye", 258]))
    body = (await server.complete(skip_special_tokens=False)).json()
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("Bye", "stop", None)
    assert body["usage"]["completion_tokens"] == 4
    going_on = (await server.complete(skip_special_tokens=False, ignore_eos=True, max_tokens=5)).json()
    assert going_on["choices"][0]["text"] == "Bye<|im_end|>B"
    skipped = (await server.complete(ignore_eos=True, max_tokens=5)).json()
    assert skipped["choices"][0]["text"] == "ByeB"


async def test_text_held_back_for_a_stop_string_comes_out_at_the_end(serve: Serve) -> None:
    server = await serve()
    body = {"max_tokens": 8, "stop": "world"}
    assert (await server.complete(**body)).json()["choices"][0]["text"] == "Hello wo"
    assert joined(events(await server.complete(**body, stream=True))) == {0: "Hello wo"}


async def test_characters_split_over_tokens_are_never_broken(serve: Serve) -> None:
    text = "héllo 日本 🎉!"
    server = await serve(FakeEngine(text))
    body = {"max_tokens": len(text.encode())}
    chunks = events(await server.complete(**body, stream=True))
    assert joined(chunks) == {0: text}
    assert all("\ufffd" not in chunk["choices"][0]["text"] for chunk in chunks)
    cut = events(await server.complete(max_tokens=2, stream=True))
    assert joined(cut) == {0: "h\ufffd"}, "half a character at the very end is shown as one replacement character"


async def test_logprobs_have_one_entry_per_token_and_up_to_one_more_alternative(serve: Serve) -> None:
    server = await serve()
    logprobs = (await server.complete(max_tokens=3, logprobs=2)).json()["choices"][0]["logprobs"]
    assert logprobs == {
        "text_offset": [0, 1, 2],
        "token_logprobs": [-0.5] * 3,
        "tokens": ["H", "e", "l"],
        "top_logprobs": [{"H": -0.5, "I": -1.5}, {"e": -0.5, "f": -1.5}, {"l": -0.5, "m": -1.5}],
    }
    zero = (await server.complete(max_tokens=1, logprobs=0)).json()["choices"][0]["logprobs"]
    assert zero["top_logprobs"] == [{"H": -0.5}]


async def test_streamed_logprobs_join_to_the_plain_ones(serve: Serve) -> None:
    server = await serve()
    plain = (await server.complete(max_tokens=9, logprobs=1, stop="wx")).json()["choices"][0]["logprobs"]
    merged: dict[str, list[Any]] = defaultdict(list)
    for chunk in events(await server.complete(max_tokens=9, logprobs=1, stop="wx", stream=True)):
        for key, values in chunk["choices"][0]["logprobs"].items():
            merged[key] += values
    assert merged == plain


async def test_minus_infinity_is_written_as_minus_9999(serve: Serve) -> None:
    from server.formatting import clamp

    assert clamp(float("-inf")) == -9999.0
    assert clamp(-3.0) == -3.0


async def test_return_tokens_as_token_ids(serve: Serve) -> None:
    server = await serve()
    response = await server.complete(max_tokens=1, logprobs=1, return_tokens_as_token_ids=True)
    logprobs = response.json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["token_id:72"]
    assert logprobs["top_logprobs"] == [{"token_id:72": -0.5}]


async def test_return_token_ids_gives_prompt_and_output(serve: Serve) -> None:
    server = await serve()
    body = {"prompt": "Hi", "max_tokens": 3, "return_token_ids": True}
    choice = (await server.complete(**body)).json()["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([72, 105], [72, 101, 108])
    chunks = [chunk["choices"][0] for chunk in events(await server.complete(**body, stream=True))]
    assert [c.get("prompt_token_ids") for c in chunks] == [[72, 105], None, None]
    assert [c["token_ids"] for c in chunks] == [[72], [101], [108]]


async def test_echo_puts_the_prompt_before_the_text(serve: Serve) -> None:
    server = await serve()
    for prompt in ("Hi ", [72, 105, 32]):
        body = {"prompt": prompt, "echo": True, "max_tokens": 2}
        assert (await server.complete(**body)).json()["choices"][0]["text"] == "Hi He"
        assert joined(events(await server.complete(**body, stream=True))) == {0: "Hi He"}


async def test_echo_with_logprobs_scores_the_prompt_its_first_token_with_null(serve: Serve) -> None:
    server = await serve()
    body = {"prompt": "Hi", "echo": True, "logprobs": 1, "max_tokens": 1}
    expected = {
        "text_offset": [0, 1, 2],
        "token_logprobs": [None, -0.5, -0.5],
        "tokens": ["H", "i", "H"],
        "top_logprobs": [None, {"i": -0.5}, {"H": -0.5}],
    }
    assert (await server.complete(**body)).json()["choices"][0]["logprobs"] == expected
    (chunk,) = events(await server.complete(**body, stream=True))
    assert chunk["choices"][0]["logprobs"] == expected


async def test_echo_with_max_tokens_0_returns_only_the_prompt(serve: Serve) -> None:
    server = await serve()
    body = {"prompt": "Hi", "echo": True, "logprobs": 0, "max_tokens": 0}
    answer = (await server.complete(**body)).json()
    assert answer["choices"][0]["text"] == "Hi"
    assert answer["choices"][0]["logprobs"]["tokens"] == ["H", "i"]
    assert answer["usage"]["completion_tokens"] == 0
    assert joined(events(await server.complete(**body, stream=True))) == {0: "Hi"}


async def test_prompt_logprobs_map_ids_and_start_with_null(serve: Serve) -> None:
    server = await serve()
    choice = (await server.complete(prompt="Hi", prompt_logprobs=1, max_tokens=1)).json()["choices"][0]
    assert choice["prompt_logprobs"] == [None, {"105": {"logprob": -0.5, "rank": 1, "decoded_token": "i"}}]
    assert choice["logprobs"] is None


async def test_truncate_prompt_tokens_keeps_the_end_or_the_beginning(serve: Serve) -> None:
    server = await serve()
    await server.complete(prompt="abcdef", truncate_prompt_tokens=2)
    await server.complete(prompt="abcdef", truncate_prompt_tokens=2, truncation_side="right")
    await server.complete(prompt=[65] * 1000, truncate_prompt_tokens=-1, max_tokens=6)
    ids = [entry.prompt_token_ids for entry in server.engine.submitted]
    assert ids[0] == list(b"ef")
    assert ids[1] == list(b"ab")
    assert len(ids[2]) == 250
    echoed = await server.complete(prompt="abcdef", truncate_prompt_tokens=2, echo=True, max_tokens=0)
    assert echoed.json()["choices"][0]["text"] == "ef"


async def test_sampling_parameters_reach_the_engine(serve: Serve) -> None:
    server = await serve()
    sampling = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1,
        "presence_penalty": 0.2, "frequency_penalty": -0.3, "seed": 11, "min_tokens": 1, "ignore_eos": True,
    }  # fmt: skip
    await server.complete(**sampling, logit_bias={"65": 3.5}, stop_token_ids=[66], cache_salt="s")
    entry = server.engine.submitted[0]
    for name, value in sampling.items():
        assert getattr(entry.params, name) == value
    assert entry.params.logit_bias == {65: 3.5}
    assert entry.params.stop_token_ids == (66,)
    assert entry.cache_salt == "s"


async def test_checkpoint_defaults_fill_what_the_request_leaves_out(serve: Serve) -> None:
    server = await serve(default_sampling={"temperature": 0.6, "top_k": 20})
    await server.complete()
    await server.complete(temperature=0, top_k=1)
    first, second = (entry.params for entry in server.engine.submitted)
    assert (first.temperature, first.top_k) == (0.6, 20)
    assert (second.temperature, second.top_k) == (0, 1)


async def test_request_id_of_header_or_body_is_in_the_answers_id(serve: Serve) -> None:
    server = await serve()
    assert (await server.complete(request_id="mine")).json()["id"] == "cmpl-mine"
    response = await server.post("/v1/completions", {"prompt": "a"}, headers={"x-request-id": "from-header"})
    assert response.json()["id"] == "cmpl-from-header"
    again = await server.complete(request_id="mine")
    assert again.status_code == 200, "the same id twice must not collide in the engine"


async def test_too_long_prompt_is_refused_in_openais_words(serve: Serve) -> None:
    server = await serve()
    words = "This model's maximum context length is 256 tokens"
    assert_error(await server.complete(prompt=[1] * 256), 400, "prompt", words)
    assert_error(await server.complete(prompt=[1] * 250, max_tokens=7), 400, "max_tokens", words, "7 > 256 - 250")


async def test_stream_interval_sends_several_tokens_in_one_event_but_the_first_at_once(serve: Serve) -> None:
    server = await serve()
    body = {"max_tokens": 9, "return_token_ids": True, "stream": True, "stream_interval": 3}
    sizes = [len(chunk["choices"][0]["token_ids"]) for chunk in events(await server.complete(**body))]
    assert sizes == [1, 3, 3, 2]
    plain = (await server.complete(max_tokens=2, stream_interval=3)).json()
    assert plain["choices"][0]["text"] == ANSWER[:2]
