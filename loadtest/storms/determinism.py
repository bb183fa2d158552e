"""The same prompt, the same tokens: alone, among others, after being preempted, with its beginning in the cache.

The default model, greedy, and the probability of every token with it: a difference that changes no token shows there.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

from loadtest.storms.connection import ask, post
from loadtest.storms.target import Target, target
from loadtest.storms.verdict import Verdict

COUNT, SHORT_COUNT = 500, 16
TOKENS = 24
MAX_NUM_SEQS = 16
BLOCK_SIZE = 16
# Too few blocks for what runs at once, of prompts and answers, so that some of it is preempted.
POOL_SHARE = 0.5
PROMPT_WORDS = (4, 50)
_WORDS = (
    "the",
    "of",
    "and",
    "a",
    "to",
    "in",
    "he",
    "was",
    "that",
    "it",
    "his",
    "her",
    "with",
    "as",
    "for",
    "had",
    "you",
)

Answer = tuple[str, tuple[str, ...], tuple[float, ...]]


def _prompts(count: int) -> list[str]:
    draw = random.Random(0)
    return [f"{i} " + " ".join(draw.choice(_WORDS) for _ in range(draw.randrange(*PROMPT_WORDS))) for i in range(count)]


async def _answer(server: Target, prompt: str, tokens: int, salt: str) -> Answer:
    """Its text, tokens and their log-probabilities. `salt` keeps it from finding what others with another salt left."""
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 0, "ignore_eos": True}
    reply = await ask(server.port, post("/v1/completions", body | {"cache_salt": salt}), 600)
    if reply.status != 200:
        raise RuntimeError(f"answered with {reply.status}: {reply.body[:300]!r}")
    choice = reply.json()["choices"][0]
    found = choice["logprobs"]
    return choice["text"], tuple(found["tokens"]), tuple(found["token_logprobs"])


async def _all(server: Target, prompts: list[str], tokens: int, salt: str, clients: int) -> list[Answer]:
    answers: list[Answer | None] = [None] * len(prompts)
    order = list(enumerate(prompts))
    random.Random(salt).shuffle(order)
    rest = iter(order)

    async def client() -> None:
        for i, prompt in rest:
            answers[i] = await _answer(server, prompt, tokens, salt)

    await asyncio.gather(*(client() for _ in range(clients)))
    return [answer for answer in answers if answer is not None]


async def storm(server: Target, count: int) -> Verdict:
    verdict = Verdict("determinism")
    prompts = _prompts(count)
    alone = await _all(server, prompts, TOKENS, "alone", clients=1)
    before = await server.metrics()
    crowd = await _all(server, prompts, TOKENS, "crowd", clients=2 * MAX_NUM_SEQS)
    middle = await server.metrics()
    few = prompts[: max(1, MAX_NUM_SEQS // 4)]  # what the pool can keep
    first = await _all(server, few, TOKENS, "again", clients=1)
    again = await _all(server, few, TOKENS, "again", clients=1)
    after = await server.metrics()
    verdict.equal("prompts whose answer differs among others", _differing(alone, crowd), 0)
    verdict.at_least("requests preempted meanwhile", middle.since(before, "vllm:num_preemptions_total"), 1)
    verdict.equal(
        "prompts whose answer differs when asked again", _differing(alone, first) + _differing(alone, again), 0
    )
    verdict.at_least("tokens found in the cache", after.since(middle, "vllm:prefix_cache_hits_total"), BLOCK_SIZE)
    verdict.equal("prompts that got an answer", len(crowd), count)
    verdict.figures = {"prompts": count, "tokens each": TOKENS, "distinct answers": len({text for text, _, _ in alone})}
    return verdict


def _differing(one: list[Answer], other: list[Answer]) -> int:
    """How many differ, of as many as `other` has."""
    return sum(a != b for a, b in zip(one, other, strict=False))


def run(count: int | None, seconds: float | None, short: bool) -> Verdict:
    """count: of prompts (500; short: 16)."""
    longest = 4 * PROMPT_WORDS[1] + TOKENS
    typical = 2 * sum(PROMPT_WORDS) // 2 + TOKENS  # tokens: short words are some one and a half each
    blocks = int(POOL_SHARE * MAX_NUM_SEQS * typical / BLOCK_SIZE)
    flags = (
        "--max-num-seqs", str(MAX_NUM_SEQS), "--max-num-batched-tokens", "64", "--num-kv-blocks", str(blocks),
        "--max-model-len", str(longest), "--log-level", "warning",
    )  # fmt: skip
    with target(flags) as server:
        return asyncio.run(storm(server, count or (SHORT_COUNT if short else COUNT)))
