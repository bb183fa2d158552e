"""The official `openai` client against a live server on the simulated engine."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conftest import LiveServer

MODEL = "simulated"
MESSAGES: list[Any] = [{"role": "user", "content": "Tell me something."}]


@pytest.fixture(scope="module")
def client(simulated: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{simulated.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def async_client(simulated: LiveServer) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{simulated.url}/v1", api_key="none", max_retries=0)


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_completion_streamed_equals_plain(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 60, "temperature": 0}
    plain = client.completions.create(**options)
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == plain.choices[0].text
    finished = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    assert finished == [plain.choices[0].finish_reason] == ["length"]
    assert chunks[-1].usage == plain.usage
    assert plain.usage is not None
    assert (plain.usage.prompt_tokens, plain.usage.completion_tokens) == (16, 60)


def test_chat_streamed_equals_plain(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_completion_tokens": 60, "temperature": 0}
    plain = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == plain.choices[0].message.content
    assert chunks[0].choices[0].delta.role == plain.choices[0].message.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == plain.usage


def test_stop_strings_end_text_before_them(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "prompt": "Once", "temperature": 0, "max_tokens": 60}
    whole = client.completions.create(**options).choices[0].text
    stop = whole[20:23]
    for stream in (False, True):
        answer = client.completions.create(**options, stop=[stop], stream=stream)
        if stream:
            text = "".join(chunk.choices[0].text for chunk in answer)
        else:
            text = answer.choices[0].text
            assert answer.choices[0].finish_reason == "stop"
        assert text == whole[: whole.index(stop)]


def test_choices_differ_and_seeds_repeat(client: openai.OpenAI) -> None:
    def texts(seed: int | None) -> list[str]:
        answer = client.completions.create(model=MODEL, prompt="Hi", n=4, seed=seed, max_tokens=20)
        return [choice.text for choice in answer.choices]

    first = texts(7)
    assert len(set(first)) == 4
    assert texts(7) == first
    assert texts(8)[:3] == first[1:], "choice i of seed s is choice 0 of seed s + i"
    assert texts(None) != texts(None)


def test_streamed_choices_equal_plain_ones(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "n": 3, "seed": 1, "max_tokens": 30}
    plain = client.chat.completions.create(**options)
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(**options, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in plain.choices]


def test_logprobs_have_one_entry_per_token(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=7, logprobs=True, top_logprobs=1, temperature=0
    )
    logprobs = chat.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 7
    text = bytes(byte for entry in logprobs.content for byte in entry.bytes or []).decode("utf-8", "replace")
    assert text == chat.choices[0].message.content
    completion = client.completions.create(model=MODEL, prompt="Hi", max_tokens=5, logprobs=1, echo=True)
    assert completion.choices[0].logprobs is not None
    assert completion.choices[0].logprobs.token_logprobs is not None
    assert len(completion.choices[0].logprobs.token_logprobs) == 2 + 5
    assert completion.choices[0].logprobs.token_logprobs[0] is None


def test_refusals_arrive_as_the_clients_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist") as missing:
        client.completions.create(model="other", prompt="Hi")
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="maximum context length is 4096 tokens"):
        client.completions.create(model=MODEL, prompt=[1] * 5000)
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=MODEL, prompt="Hi", suffix="!")
    assert refused.value.param == "suffix"
    assert refused.value.request_id


async def test_32_concurrent_streams_each_equal_their_sequential_answer(async_client: openai.AsyncOpenAI) -> None:
    async def streamed(prompt: str) -> str:
        text = ""
        async for chunk in await async_client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=40, temperature=0, stream=True
        ):
            text += chunk.choices[0].text
        return text

    prompts = [f"Story number {i}: " + "x" * (i * 3) for i in range(32)]
    sequential = []
    for prompt in prompts:
        answer = await async_client.completions.create(model=MODEL, prompt=prompt, max_tokens=40, temperature=0)
        sequential.append(answer.choices[0].text)
    assert len(set(sequential)) == 32
    assert await asyncio.gather(*map(streamed, prompts)) == sequential


def ended(server: LiveServer, reason: str) -> float:
    (value,) = (
        value
        for key, value in server.metrics().items()
        if key.startswith("vllm:request_success_total{") and f'finished_reason="{reason}"' in key
    )
    return value


async def test_disconnect_storm_leaves_nothing_behind(simulated: LiveServer) -> None:
    """200 clients leave: queued, before and after the first token, streaming and not, with one and several choices."""
    draw = random.Random(0)
    simulated.assert_idle(60)
    aborted_before = ended(simulated, "abort")
    left_while_running = 0

    async def leave(http: httpx.AsyncClient, i: int) -> None:
        """Of four clients one does not stream; it and the next leave after some time, wherever they have got to.
        The others leave after the first chunk, or some more, of a stream of 3000: those were running for certain."""
        nonlocal left_while_running
        body: dict[str, Any] = {"prompt": [draw.randrange(256) for _ in range(200)], "max_tokens": 3000}
        body |= {"n": draw.choice([1, 1, 3]), "stream": i % 4 != 0}
        patience = draw.choice([0.05, 0.5, 1.5]) if i % 4 < 2 else None
        chunks = draw.choice([1, 20]) if i % 4 >= 2 else 10**9
        with contextlib.suppress(TimeoutError):
            async with (
                asyncio.timeout(patience),
                http.stream("POST", f"{simulated.url}/v1/completions", json=body) as response,
            ):
                async for line in response.aiter_lines():
                    chunks -= line.startswith("data: {")
                    if chunks == 0:
                        left_while_running += 1
                        break

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(limits=limits, timeout=None) as http:
        await asyncio.gather(*(leave(http, i) for i in range(200)))
    await asyncio.to_thread(simulated.assert_idle, 60)
    assert left_while_running == 100
    assert ended(simulated, "abort") - aborted_before >= left_while_running
    assert ended(simulated, "error") == 0
    answer = httpx.post(f"{simulated.url}/v1/completions", json={"prompt": "still there?", "max_tokens": 5})
    assert answer.status_code == 200


def test_response_streamed_equals_plain_and_is_gone_on_from(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "input": "Hi", "max_output_tokens": 30, "temperature": 0}
    plain = client.responses.create(**options)
    assert (plain.status, plain.usage and plain.usage.output_tokens) == ("incomplete", 30)
    events = list(client.responses.create(**options, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == plain.output_text == client.responses.retrieve(plain.id).output_text
    second = client.responses.create(**options, previous_response_id=plain.id)
    assert second.usage is not None
    assert plain.usage is not None
    assert second.usage.input_tokens > plain.usage.input_tokens + 30
    client.responses.delete(plain.id)
    with pytest.raises(openai.NotFoundError, match="not found"):
        client.responses.retrieve(plain.id)


def test_background_response_is_cancelled(client: openai.OpenAI) -> None:
    begun = client.responses.create(model=MODEL, input="Hi", background=True, max_output_tokens=3000)
    assert begun.status == "in_progress"
    assert client.responses.cancel(begun.id).status == "cancelled"


def test_embeddings_are_the_same_in_both_encodings(client: openai.OpenAI) -> None:
    coded = client.embeddings.create(model=MODEL, input=["Hello", "you"])  # the client asks for base64
    plain = client.embeddings.create(model=MODEL, input=["Hello", "you"], encoding_format="float")
    assert [entry.embedding for entry in coded.data] == [entry.embedding for entry in plain.data]
    assert plain.usage.prompt_tokens == 8


def test_beam_search_finds_what_greedy_finds_or_better(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "prompt": "Once", "max_tokens": 5, "logprobs": 1, "temperature": 0}

    def total(choice: Any) -> float:
        return sum(choice.logprobs.token_logprobs)

    greedy = client.completions.create(**options).choices[0]
    ours = {"use_beam_search": True, "return_token_ids": True}
    beams = client.completions.create(**options, n=3, extra_body=ours).choices
    assert len({tuple(choice.token_ids) for choice in beams}) == 3  # type: ignore[attr-defined]  # vLLM's field
    assert total(greedy) <= total(beams[0])
    assert [total(choice) for choice in beams] == sorted(map(total, beams), reverse=True)
