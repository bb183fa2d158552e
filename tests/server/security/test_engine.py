"""What requests do to the engine and to each other there. Tests bear the names of the advisories they answer."""

from __future__ import annotations

import asyncio
import itertools
import random
from typing import Any

import pytest

from nvfp4_runtime.cache.block_pool import chain_hash, salt_hash
from nvfp4_runtime.engine.messages import Submit
from nvfp4_runtime.sampling.params import SamplingParams
from server.terms import Terms
from tests.engine.helpers import make_engine, run_to_end
from tests.fakes import FakeEngine
from tests.server.conftest import Serve
from tests.server.test_disconnect import BODIES, Client, until

PROMPT = list(range(1, 41))


def request(name: str, salt: str) -> Submit:
    return Submit(name, PROMPT, SamplingParams(temperature=0.0, max_tokens=2), 0.0, salt)


def test_cve_2025_46570_a_prompt_of_one_key_is_not_found_by_another() -> None:
    one, two = Terms("key-0", True, 1, 1), Terms("key-1", True, 1, 1)
    engine = make_engine()
    cached = {}
    for i, salt in enumerate([one.salted(None), one.salted(None), two.salted(None), two.salted("x"), one.salted("x")]):
        engine.add(request(str(i), salt))
        cached |= {name: outputs[-1].num_cached_tokens for name, outputs in run_to_end(engine).items()}
    assert cached == {"0": 0, "1": 36, "2": 0, "3": 0, "4": 0}


@pytest.mark.parametrize(
    ("one", "two"),
    [((-1,), (-2,)), ((0, 1), (1, 0)), ((2**61 - 1,), (0,)), ((1, 2), (1, 2, 0)), ((258,), (2, 1))],
)
def test_cve_2025_25183_and_46722_blocks_are_known_by_a_keyed_hash_of_all_their_tokens(
    one: tuple[int, ...], two: tuple[int, ...]
) -> None:
    """Pairs that Python's own hash, or a concatenation of bytes, takes for the same."""
    key, parent = b"k" * 32, salt_hash(b"k" * 32, "")
    assert chain_hash(key, parent, one) != chain_hash(key, parent, two)
    assert chain_hash(key, parent, one) != chain_hash(b"l" * 32, parent, one), "nobody can compute it beforehand"
    assert chain_hash(key, parent, one) != chain_hash(key, salt_hash(key, "other"), one)
    keys = {make_engine().scheduler.hash_key for _ in range(3)}
    assert len(keys) == 3
    assert all(len(each) == 32 for each in keys)


OPTIONS: dict[str, list[Any]] = {
    "temperature": [0.0, 1.5],
    "top_p": [1.0, 0.1],
    "top_k": [0, 1],
    "min_p": [0.0, 1.0],
    "repetition_penalty": [1.0, 2.0],
    "presence_penalty": [0.0, 2.0],
    "frequency_penalty": [0.0, -2.0],
    "logit_bias": [{}, {5: 100.0}],
    "seed": [None, -(2**63)],
    "min_tokens": [0, 3],
    "stop_token_ids": [(), (5,)],
    "logprobs": [None, 20],
    "prompt_logprobs": [None, 20],
    "allowed_token_ids": [None, (5, 6)],
    "bad_words_token_ids": [(), ((5,), (6, 7))],
}


def test_cve_2026_44223_no_pair_of_sampling_options_ends_the_engine() -> None:
    engine = make_engine(max_num_seqs=4, num_blocks=40)
    pairs = list(itertools.combinations(OPTIONS, 2))
    for first, second in pairs:
        given = {first: OPTIONS[first][1], second: OPTIONS[second][1]}
        engine.add(Submit(f"{first} {second}", PROMPT[:9], SamplingParams(**{"max_tokens": 4} | given), 0.0))
    ended = run_to_end(engine)
    assert len(ended) == len(pairs)
    assert {outputs[-1].finish_reason for outputs in ended.values()} <= {"stop", "length"}


async def test_cve_2026_9540_clients_that_leave_at_any_moment_leave_nothing_behind(serve: Serve) -> None:
    server = await serve(FakeEngine(step_seconds=0.001))
    chance = random.Random(0)
    for _ in range(10):
        clients = []
        for _ in range(20):
            path = chance.choice(list(BODIES))
            body = BODIES[path] | {"stream": chance.random() < 0.5, "n": chance.choice([1, 1, 3])}
            clients.append(Client(server, path, body))
        for client in chance.sample(clients, len(clients)):
            await asyncio.sleep(chance.choice([0, 0, 0.001, 0.004]))
            client.left.set()
        await until(lambda: server.engine.running == 0)
        await asyncio.gather(*(client.task for client in clients), return_exceptions=True)
    assert server.engine.admission.num_requests == 0
    assert server.engine.admission.num_queued_tokens == 0
    assert (await server.complete(max_tokens=3)).status_code == 200
