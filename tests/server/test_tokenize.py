"""/tokenize, /detokenize, /tokenizer_info, /invocations, /load, /ping."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.fakes import FakeEngine
from tests.server.conftest import Serve, assert_error, events

CHAT = [{"role": "user", "content": "Hi <|im_end|>"}]


async def test_prompt_is_tokenized_as_completions_do_it(serve: Serve) -> None:
    server = await serve()
    body = (await server.post("/tokenize", {"prompt": "Hi é<|im_end|>", "return_token_strs": True})).json()
    assert body["tokens"] == [*"Hi é".encode(), 258], "special tokens written in a prompt are read as such"
    assert (body["count"], body["max_model_len"]) == (6, 256)
    assert body["token_strs"] == ["H", "i", "Ġ", "Ã", "©", "<|im_end|>"]
    await server.complete(prompt="Hi é<|im_end|>")
    assert server.engine.submitted[0].prompt_token_ids == body["tokens"]
    back = (await server.post("/detokenize", {"tokens": body["tokens"]})).json()
    assert back == {"prompt": "Hi é<|im_end|>"}


async def test_chat_is_tokenized_as_chat_completions_do_it(serve: Serve) -> None:
    server = await serve()
    body = (await server.post("/tokenize", {"messages": CHAT})).json()
    await server.chat(messages=CHAT)
    assert server.engine.submitted[0].prompt_token_ids == body["tokens"]
    assert body["token_strs"] is None
    bare = (await server.post("/tokenize", {"messages": CHAT, "add_generation_prompt": False})).json()
    assert body["count"] == bare["count"] + len("assistant\n") + 1


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [("/tokenize", {}, "prompt"), ("/tokenize", {"prompt": "a", "messages": CHAT}, "prompt"),
     ("/tokenize", {"prompt": 5}, "prompt"), ("/tokenize", {"messages": []}, "messages"),
     ("/tokenize", {"messages": CHAT, "chat_template": "x"}, "chat_template"),
     ("/tokenize", {"messages": CHAT, "tools": [{"type": "function"}]}, "tools"),
     ("/tokenize", {"messages": CHAT, "chat_template_kwargs": {"x": 1}}, "chat_template_kwargs"),
     ("/detokenize", {"tokens": [259]}, "tokens"), ("/detokenize", {"tokens": [-1]}, "tokens"),
     ("/detokenize", {}, "tokens"), ("/detokenize", {"tokens": "a"}, "tokens")],
)  # fmt: skip
async def test_refusals(serve: Serve, path: str, fields: dict[str, Any], param: str) -> None:
    server = await serve()
    assert_error(await server.post(path, fields), 400, param)


async def test_other_model_is_a_404(serve: Serve) -> None:
    server = await serve()
    assert_error(await server.post("/tokenize", {"model": "x", "prompt": "a"}), 404, "model")
    assert_error(await server.post("/detokenize", {"model": "x", "tokens": [1]}), 404, "model")


async def test_tokenizer_info_needs_its_flag(serve: Serve) -> None:
    assert_error(await (await serve()).http.get("/tokenizer_info"), 404, None)
    info = (await (await serve(enable_tokenizer_info=True)).http.get("/tokenizer_info")).json()
    assert (info["bos_token"], info["eos_token"], info["pad_token"]) == ("<|endoftext|>", "<|im_end|>", None)
    assert info["chat_template"].startswith("{% for message in messages %}")
    assert info["vocab_size"] == 259


async def test_invocations_go_where_their_fields_belong(serve: Serve) -> None:
    server = await serve()

    async def kind(**body: Any) -> str:
        return str((await server.post("/invocations", {"max_tokens": 2} | body)).json()["object"])

    assert await kind(messages=CHAT) == "chat.completion"
    assert await kind(prompt="Hi") == "text_completion"
    assert await kind(input="Hi") == "list"
    assert len(events(await server.post("/invocations", {"prompt": "Hi", "max_tokens": 2, "stream": True}))) == 2
    assert_error(await server.post("/invocations", {"model": "tiny"}), 400, "messages")
    assert_error(await server.post("/invocations", {"prompt": "Hi", "n": "x"}), 400, "n")
    assert_error(await server.post("/invocations", []), 400, None)


async def test_load_counts_requests_in_the_engine(serve: Serve) -> None:
    engine = FakeEngine()
    engine.gate.clear()
    server = await serve(engine)
    assert (await server.http.get("/load")).json() == {"server_load": 0}
    task = asyncio.create_task(server.complete(n=2))
    while engine.running < 2:
        await asyncio.sleep(0)
    assert (await server.http.get("/load")).json() == {"server_load": 2}
    engine.gate.set()
    await task


async def test_ping_may_be_posted(serve: Serve) -> None:
    server = await serve()
    assert (await server.http.post("/ping")).status_code == 200


# -- fields that templates, scheduler and sampler see ---------------------------------------------------------------


async def test_template_of_the_request_needs_the_operators_trust(serve: Serve) -> None:
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}{{ mood }}"
    body = {"messages": CHAT, "chat_template": template, "chat_template_kwargs": {"mood": "!"}}
    assert_error(await (await serve()).chat(**body), 400, "chat_template", "--trust-request-chat-template")
    server = await serve(trust_request_chat_template=True)
    answer = (await server.chat(**body, return_prompt_text=True)).json()
    assert answer["prompt_text"] == "[Hi <|im_end|>]!"
    assert server.engine.submitted[0].prompt_token_ids == list(b"[Hi <|im_end|>]!"), "content stays plain text"
    assert_error(await server.chat(chat_template="{% for %}"), 400, "chat_template", "does not compile")
    assert_error(await server.chat(chat_template="{{ ''.__class__.__mro__ }}"), 400, "messages")
    chunks = events(await server.chat(**body, return_prompt_text=True, stream=True, max_tokens=2))
    assert chunks[0]["prompt_text"] == "[Hi <|im_end|>]!"


async def test_engine_is_told_priority_lists_and_words(serve: Serve) -> None:
    server = await serve()
    fields = {"priority": -3, "allowed_token_ids": [97, 98], "bad_words": ["ab", " c"], "logprob_token_ids": [99]}
    assert (await server.complete(**fields, logprobs=1, max_tokens=2)).status_code == 200
    entry = server.engine.submitted[0]
    assert entry.priority == -3
    assert entry.params.allowed_token_ids == (97, 98)
    assert entry.params.bad_words_token_ids == ((97, 98), (99,)), "' ab' has more tokens than 'ab': no word of its own"
    assert entry.params.logprob_token_ids == (99,)


async def test_listed_logprobs_follow_the_token_itself(serve: Serve) -> None:
    server = await serve(FakeEngine("abc"))
    fields = {"logprob_token_ids": [122, 97], "max_tokens": 2}
    (choice,) = (await server.complete(**fields, logprobs=0)).json()["choices"]
    assert choice["logprobs"]["top_logprobs"] == [{"a": -0.5, "z": -2.0}, {"b": -0.5, "z": -2.0, "a": -2.0}]
    (choice,) = (await server.chat(**fields, logprobs=True)).json()["choices"]
    listed = [[(top["token"], top["logprob"]) for top in e["top_logprobs"]] for e in choice["logprobs"]["content"]]
    assert listed == [[("a", -0.5), ("z", -2.0)], [("b", -0.5), ("z", -2.0), ("a", -2.0)]]
