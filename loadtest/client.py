"""A streaming completions client that notes when every token arrived."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class Stream:
    """One request as its client saw it: `arrivals` holds (seconds since the batch was sent, tokens in that chunk)."""

    arrivals: list[tuple[float, int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count in self.arrivals)

    @property
    def first_seconds(self) -> float:
        return self.arrivals[0][0]

    @property
    def last_seconds(self) -> float:
        return self.arrivals[-1][0]

    def tokens_after(self, seconds: float) -> int:
        return sum(count for at, count in self.arrivals if at > seconds)


async def complete_together(
    client: httpx.AsyncClient, model: str, prompts: Sequence[Sequence[int]], max_tokens: int
) -> list[Stream]:
    """Send all prompts (token ids) at once and read every stream to its end: greedy, exactly `max_tokens` each.

    Raises RuntimeError when the server answers with an error or with another number of tokens.
    """
    start = time.perf_counter()
    return list(await asyncio.gather(*(_complete(client, model, prompt, max_tokens, start) for prompt in prompts)))


async def _complete(
    client: httpx.AsyncClient, model: str, prompt: Sequence[int], max_tokens: int, start: float
) -> Stream:
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,  # a chunk's token count is then exact, and no token waits for its text
    }
    stream = Stream()
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"HTTP {response.status_code}: {(await response.aread()).decode()[:500]}")
        async for line in response.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                count = _count_tokens(json.loads(line[6:]))
                if count:
                    stream.arrivals.append((time.perf_counter() - start, count))
    if stream.num_tokens != max_tokens:
        raise RuntimeError(f"asked for {max_tokens} tokens, the stream brought {stream.num_tokens}")
    return stream


def _count_tokens(chunk: dict[str, Any]) -> int:
    if "error" in chunk:
        raise RuntimeError(f"the stream ended with an error: {chunk['error']}")
    return sum(len(choice.get("token_ids") or ()) for choice in chunk["choices"])
