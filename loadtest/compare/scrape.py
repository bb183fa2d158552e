"""What a server says of itself: /metrics, /v1/models, /version. A foreign one may say little.

llama.cpp says in /v1/models how its weights are stored and how large they are. How much memory a server on this machine
holds is seen from outside where its metrics do not tell.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec

from loadtest.compare.report import Memory
from loadtest.storms.target import Metrics, parse_metrics

_LISTEN = "0A"  # a socket's state, in /proc/net/tcp
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
    stored = first.get("meta")  # llama.cpp's
    stored = stored if isinstance(stored, dict) else {}
    told = memory(found)
    if told.weight_bytes is None and isinstance(stored.get("size"), int):
        told = msgspec.structs.replace(told, weight_bytes=stored["size"])
    if told.rss_bytes is None:
        told = msgspec.structs.replace(told, rss_bytes=listener_rss_bytes(url))
    return Facts(
        model or first["id"],
        str(_json(version).get("version", "")),
        str(first.get("numerics") or stored.get("ftype") or ""),
        kernels,
        told,
    )


def listener_rss_bytes(url: str) -> int | None:
    """Of this machine's processes that listen at `url`; None where it is elsewhere or they may not be looked at."""
    return sum(_rss_bytes(Path(f"/proc/{pid}")) for pid in listeners(url)) or None


def listeners(url: str) -> list[int]:
    """Processes of this machine that listen at `url`; none where it is elsewhere or they may not be looked at."""
    host, port = httpx.URL(url).host, httpx.URL(url).port
    if host not in ("127.0.0.1", "localhost", "::1") or port is None:
        return []
    sockets = {
        f"socket:[{inode}]" for table in ("tcp", "tcp6") for inode in _listening(Path("/proc/net") / table, port)
    }
    return [int(folder.name) for folder in Path("/proc").glob("[0-9]*") if sockets & _open_files(folder)]


def _listening(table: Path, port: int) -> list[str]:
    """Inodes of the sockets that listen on `port`."""
    lines = table.read_text().splitlines()[1:] if table.exists() else []
    fields = [line.split() for line in lines]
    return [each[9] for each in fields if each[3] == _LISTEN and int(each[1].rpartition(":")[2], 16) == port]


def _open_files(process: Path) -> set[str]:
    found = set()
    with suppress(OSError):  # ended, or somebody else's
        for file in (process / "fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                found.add(os.readlink(file))
    return found


def _rss_bytes(process: Path) -> int:
    try:
        lines = (process / "status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0)


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
