"""The default model served over HTTP to the official client: what `make serve` gives a user."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from tests.conftest import DefaultModel
from tests.e2e.conftest import Launch, LiveServer

pytestmark = [pytest.mark.model]

SUBJECTS = ["rivers", "bread", "the moon", "old maps", "cats", "a sailor", "winter", "numbers"]


@pytest.fixture(scope="module")
def server(launch: Launch, default_model: DefaultModel) -> LiveServer:
    return launch()  # no model named: the embedded default, which the fixture has built


@pytest.fixture
def client(server: LiveServer) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


async def stream_text(client: openai.AsyncOpenAI, i: int, **options: Any) -> str:
    stream = await client.chat.completions.create(
        model="SmolLM2-135M-Instruct-NVFP4",
        messages=[{"role": "user", "content": f"Write {i + 1} words about {SUBJECTS[i % len(SUBJECTS)]}."}],
        max_tokens=24,
        stream=True,
        **options,
    )
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


async def test_the_default_model_answers_a_question(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="SmolLM2-135M-Instruct-NVFP4",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=16,
    )
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 37  # the chat template adds its system message


async def test_32_concurrent_streams_each_equal_their_sequential_answer(
    server: LiveServer, client: openai.AsyncOpenAI
) -> None:
    if 'kernel="reference"' in "".join(server.metrics()):
        pytest.skip("the plain kernels are not batch invariant: build the extension (backend cpu)")
    together = await asyncio.gather(*(stream_text(client, i, temperature=0) for i in range(32)))
    assert [await stream_text(client, i, temperature=0) for i in range(32)] == together
    server.assert_idle()


async def test_seeded_samples_over_http_do_not_depend_on_the_company(client: openai.AsyncOpenAI) -> None:
    together = await asyncio.gather(*(stream_text(client, i, temperature=0.8, top_p=0.9, seed=i) for i in range(8)))
    assert [await stream_text(client, i, temperature=0.8, top_p=0.9, seed=i) for i in range(8)] == together


async def test_the_precision_in_use_is_published(server: LiveServer, client: openai.AsyncOpenAI) -> None:
    card: Any = (await client.models.list()).data[0]
    assert card.numerics == "w4a16"
    assert {group["stored"] for group in card.quantization} == {"nvfp4", "bf16"}
    metrics = server.metrics()
    assert any(name.startswith("nvfp4_numerics_info") and "w4a16" in name for name in metrics)
    stored = {name: value for name, value in metrics.items() if name.startswith("nvfp4_weight_bytes")}
    assert sum(stored.values()) == pytest.approx(116.4e6, rel=0.01)
