"""Clients as people use them, other than openai's own, against a live server on the simulated engine."""

from __future__ import annotations

import math
import os
from typing import Any

import anthropic
import pytest
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

from tests.e2e.conftest import LiveServer

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # read at import: it would fetch prices otherwise
import litellm

MODEL = "simulated"
MESSAGES: list[Any] = [{"role": "user", "content": "Name three colours."}]

# -- anthropic ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def claude(simulated: LiveServer) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=simulated.url, api_key="none", max_retries=0)


def test_anthropic_message_streamed_equals_plain(claude: anthropic.Anthropic) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 40, "extra_body": {"temperature": 0}}
    plain = claude.messages.create(**options, system="Be brief.")
    with claude.messages.stream(**options, system="Be brief.") as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == plain.content[0].text == final.content[0].text
    assert (plain.stop_reason, plain.usage.output_tokens) == ("max_tokens", 40)
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 40)
    assert final.usage.input_tokens == plain.usage.input_tokens


def test_anthropic_counts_tokens_and_stops(claude: anthropic.Anthropic) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 40, "extra_body": {"temperature": 0}}
    count = claude.messages.count_tokens(model=MODEL, messages=MESSAGES)
    whole = claude.messages.create(**options)
    assert count.input_tokens == whole.usage.input_tokens
    stop = whole.content[0].text[10:13]
    cut = claude.messages.create(**options, stop_sequences=[stop])
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", stop)
    assert cut.content[0].text == whole.content[0].text[: whole.content[0].text.index(stop)]


def test_anthropic_raises_its_own_exceptions(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        claude.messages.create(model="other", messages=MESSAGES, max_tokens=5)
    with pytest.raises(anthropic.BadRequestError, match="maximum context length"):
        claude.messages.create(model=MODEL, messages=[{"role": "user", "content": "x" * 5000}], max_tokens=5)


# -- litellm ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Items? '.*:UserWarning")  # of litellm's own types
def test_litellm_completes_streams_and_embeds(simulated: LiveServer) -> None:
    for provider in ("openai", "hosted_vllm"):
        options: dict[str, Any] = {
            "model": f"{provider}/{MODEL}",
            "api_base": f"{simulated.url}/v1",
            "api_key": "none",
            "messages": MESSAGES,
            "max_tokens": 30,
            "temperature": 0,
        }
        plain = litellm.completion(**options)
        chunks = list(litellm.completion(**options, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == plain.choices[0].message.content
        assert plain.choices[0].finish_reason == "length"
        assert plain.usage.completion_tokens == 30
    found = litellm.embedding(
        model=f"openai/{MODEL}",
        api_base=f"{simulated.url}/v1",
        api_key="none",
        input=["a", "b"],
        encoding_format="float",
    )
    assert [len(entry["embedding"]) for entry in found.data] == [8, 8]


# -- langchain ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("responses", [False, True])
def test_langchain_invokes_streams_and_batches(simulated: LiveServer, responses: bool) -> None:
    chat = ChatOpenAI(
        model=MODEL,
        base_url=f"{simulated.url}/v1",
        api_key="none",
        temperature=0,
        max_tokens=30,
        max_retries=0,
        use_responses_api=responses,
    )
    plain = chat.invoke("Name three colours.")
    assert plain.usage_metadata is not None
    assert plain.usage_metadata["output_tokens"] == 30
    streamed = [chunk.text for chunk in chat.stream("Name three colours.")]
    assert "".join(streamed) == plain.text
    assert len(streamed) > 5
    assert [answer.text for answer in chat.batch(["Name three colours."] * 3)] == [plain.text] * 3


def test_langchain_embeds(simulated: LiveServer) -> None:
    embeddings = OpenAIEmbeddings(
        model=MODEL, base_url=f"{simulated.url}/v1", api_key="none", check_embedding_ctx_length=False
    )
    vectors = embeddings.embed_documents(["a", "abc"])
    assert len(vectors) == 2
    assert all(math.isclose(sum(x * x for x in vector), 1, rel_tol=1e-5) for vector in vectors)
    assert embeddings.embed_query("a") == vectors[0]
