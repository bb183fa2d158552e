"""What a server says of itself: /metrics, /v1/models, /version. A foreign one may say little."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import httpx

from loadtest.compare.report import Memory
from loadtest.storms.target import Metrics, parse_metrics

_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Facts:
    """`model`: the name that requests give."""

    model: str
    version: str = ""
    numerics: str = ""
    kernels: list[str] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)


def facts(url: str, model: str = "", headers: dict[str, str] | None = None) -> Facts:
    """RuntimeError where the server cannot be reached, or names no model and none was given."""
    try:
        with httpx.Client(base_url=url, timeout=30, headers=headers) as client:
            listed, version, scraped = (client.get(path) for path in ("/v1/models", "/version", "/metrics"))
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise RuntimeError(f"{url} cannot be reached: {error}") from error
    models = _json(listed).get("data") or []
    if not model and not models:
        raise RuntimeError(
            f"{url}/v1/models answered {listed.status_code} and names no model; give its name with --server-model"
        )
    first = models[0] if models else {}
    found = parse_metrics(scraped.text if scraped.status_code == 200 else "")
    kernels = [
        f"{each['layers']}: {each['stored']} {each['bits_per_weight']:.2f} bit, {each['kernel']} {each['numerics']}"
        for each in first.get("quantization", ())
    ]
    return Facts(
        model or first["id"],
        str(_json(version).get("version", "")),
        str(first.get("numerics", "")),
        kernels,
        memory(found),
    )


def _json(response: httpx.Response) -> dict[str, Any]:
    """What it holds; nothing where it is no answer of 200 with an object of JSON: others answer as they like."""
    try:
        found = response.json() if response.status_code == 200 else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def memory(found: Metrics) -> Memory:
    def total(name: str) -> int | None:
        return round(found.total(name)) if name in found.samples else None

    info = next((dict(_LABEL.findall(labels)) for labels, _ in found.samples.get("vllm:cache_config_info", ())), {})
    tokens = info.get("kv_cache_size_tokens", "")
    if not tokens and info.get("num_gpu_blocks", "").isdigit() and info.get("block_size", "").isdigit():
        tokens = str(int(info["num_gpu_blocks"]) * int(info["block_size"]))
    resident = [total(name) for name in ("process_resident_memory_bytes", "nvfp4_engine_process_resident_memory_bytes")]
    return Memory(
        total("nvfp4_weight_bytes"),
        total("nvfp4_kv_cache_bytes"),
        int(tokens) if tokens.isdigit() else None,
        sum(each for each in resident if each is not None) if any(resident) else None,
    )
