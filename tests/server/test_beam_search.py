"""use_beam_search: the n likeliest continuations, checked against every continuation there is."""

from __future__ import annotations

import asyncio
import itertools
import math
from typing import Any

import numpy as np
import pytest

from nvfp4_runtime.engine.messages import TokenLogprob, TokenOutput
from nvfp4_runtime.errors import QueueFullError
from tests.fakes import FakeEngine, Submitted, fake_info
from tests.server.conftest import Serve, assert_error, events

EOS = 258
VOCAB = [97, 98, 99, EOS]  # a, b, c


class Markov(FakeEngine):
    """A model whose next token depends on the last one alone, over four tokens."""

    def __init__(self, seed: int, **options: Any) -> None:
        super().__init__(info=fake_info(**options))
        rows = np.random.default_rng(seed).standard_normal((256, len(VOCAB))) * 1.5
        self.table = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
        self.refuse = 0

    def submit(self, *arguments: Any, **options: Any) -> Any:
        if self.refuse and len(self.submitted) % 3 == 2:
            self.refuse -= 1
            raise QueueFullError("full")
        return super().submit(*arguments, **options)

    def logprobs(self, last: int) -> list[tuple[int, float]]:
        pairs = [(token, float(p)) for token, p in zip(VOCAB, self.table[last % 256], strict=True)]
        return sorted(pairs, key=lambda pair: -pair[1])

    async def _play(self, entry: Submitted) -> None:
        await self.gate.wait()
        assert entry.params.max_tokens == 1
        top = self.logprobs(entry.prompt_token_ids[-1])
        logprob = TokenLogprob(top[0][0], top[0][1], 1, top[: entry.params.logprobs])
        self._deliver(TokenOutput(entry.request_id, [top[0][0]], logprobs=[logprob], finish_reason="length"))

    def best(self, prompt: list[int], length: int, penalty: float) -> list[tuple[float, str, str]]:
        """(score, text, finish_reason) of every continuation, best first."""
        found = []
        for n in range(1, length + 1):
            for tokens in itertools.product(VOCAB, repeat=n):
                ends = tokens[-1] == EOS
                if EOS in tokens[:-1] or not (ends or n == length):
                    continue
                total = sum(dict(self.logprobs(a))[b] for a, b in itertools.pairwise([prompt[-1], *tokens]))
                said = bytes(tokens[:-1] if ends else tokens).decode()
                score = total / (len(prompt) + n - ends) ** penalty
                found.append((score, said, "stop" if ends else "length"))
        return sorted(found, reverse=True)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5, -1.0])
@pytest.mark.parametrize("seed", range(4))
async def test_beams_wide_enough_find_the_best_of_all_continuations(serve: Serve, seed: int, penalty: float) -> None:
    engine = Markov(seed)
    server = await serve(engine)
    body = {"use_beam_search": True, "n": 10, "max_tokens": 3, "length_penalty": penalty, "temperature": 0}
    answer = (await server.complete(prompt="Hi", **body)).json()
    found = [(choice["text"], choice["finish_reason"]) for choice in answer["choices"]]
    # 3^2 unfinished continuations precede the last step: ten beams drop none of them
    expected = [(text, reason) for _, text, reason in engine.best(list(b"Hi"), 3, penalty)[:10]]
    assert found == expected
    assert engine.running == 0


async def test_a_narrow_beam_is_the_greedy_one_and_streams_the_same(serve: Serve) -> None:
    engine = Markov(1)
    server = await serve(engine)
    body = {"use_beam_search": True, "max_tokens": 6, "ignore_eos": True, "logprobs": 2}
    plain = (await server.complete(prompt="Hi", **body)).json()["choices"][0]
    tokens, last = [], ord("i")
    for _ in range(6):
        last = engine.logprobs(last)[0][0]
        tokens.append(last)
    assert plain["text"] == "".join(chr(token) for token in tokens if token != EOS)
    assert len(plain["logprobs"]["tokens"]) == 6
    assert all(len(top) == 2 for top in plain["logprobs"]["top_logprobs"])
    chunks = events(await server.complete(prompt="Hi", stream=True, **body))
    assert "".join(c["choices"][0]["text"] for c in chunks) == plain["text"]
    again = (await server.complete(prompt="Hi", **body)).json()["choices"][0]
    assert again == plain


async def test_several_prompts_and_chat(serve: Serve) -> None:
    engine = Markov(2)
    server = await serve(engine)
    both = (await server.complete(prompt=["Hi", "Ho"], use_beam_search=True, n=2, max_tokens=4)).json()
    alone = [(await server.complete(prompt=p, use_beam_search=True, n=2, max_tokens=4)).json() for p in ("Hi", "Ho")]
    assert [c["text"] for c in both["choices"]] == [c["text"] for a in alone for c in a["choices"]]
    assert both["usage"]["completion_tokens"] == sum(a["usage"]["completion_tokens"] for a in alone)
    chat = (await server.chat(use_beam_search=True, n=3, max_tokens=4, logprobs=True, top_logprobs=1)).json()
    assert len(chat["choices"]) == 3
    scores = [sum(e["logprob"] for e in c["logprobs"]["content"]) for c in chat["choices"]]
    assert all(math.isfinite(score) for score in scores)


async def test_the_search_waits_for_room_in_a_full_queue(serve: Serve) -> None:
    engine = Markov(3)
    server = await serve(engine)
    body = {"prompt": "Hi", "use_beam_search": True, "n": 3, "max_tokens": 4}
    free = (await server.complete(**body)).json()["choices"]
    engine.refuse = 5
    assert (await server.complete(**body)).json()["choices"] == free
    assert engine.refuse == 0


async def test_a_client_that_leaves_ends_the_search(serve: Serve) -> None:
    engine = Markov(4)
    server = await serve(engine)
    engine.gate.clear()
    task = asyncio.create_task(server.complete(use_beam_search=True, n=3, max_tokens=50, stream=True))
    while not engine.running:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert engine.running == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [("stop", ["x"]), ("stop_token_ids", [1]), ("min_tokens", 1), ("repetition_penalty", 1.1), ("bad_words", ["a"]),
     ("logit_bias", {"5": 1}), ("allowed_token_ids", [5]), ("prompt_logprobs", 1), ("n", 11), ("length_penalty", 11)],
)  # fmt: skip
async def test_what_does_not_go_with_beams_is_refused(serve: Serve, field: str, value: Any) -> None:
    server = await serve(Markov(0))
    assert_error(await server.complete(use_beam_search=True, **{field: value}), 400, field, field)


async def test_length_penalty_needs_beams(serve: Serve) -> None:
    server = await serve()
    assert_error(await server.complete(length_penalty=0.5), 400, "length_penalty", "use_beam_search")
    assert_error(await server.complete(use_beam_search=True, echo=True, logprobs=1), 400, "echo", "cannot be combined")
