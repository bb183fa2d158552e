"""What the operator sees: progress while loading, one screen when ready."""

from __future__ import annotations

import json
import logging
import sys

from nvfp4_runtime import __version__
from nvfp4_runtime.engine.messages import AdapterInfo, EngineInfo, LayerGroup
from server.config import ServerConfig

logger = logging.getLogger(__name__)


class ProgressLine:
    """Loading progress on stderr: one line that moves on a terminal, one line per phase elsewhere."""

    def __init__(self) -> None:
        self._phase = ""
        self._moving = sys.stderr.isatty()

    def __call__(self, phase: str, fraction: float) -> None:
        if self._moving:
            filled = round(30 * min(max(fraction, 0.0), 1.0))
            bar = "#" * filled + "." * (30 - filled)
            print(f"\r\x1b[Kloading [{bar}] {fraction:4.0%} {phase}", end="", file=sys.stderr, flush=True)
        elif phase != self._phase:
            print(f"loading: {phase}", file=sys.stderr, flush=True)
        self._phase = phase

    def done(self) -> None:
        if self._moving and self._phase:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class LoggedProgress:
    """The same in the log, a record per phase."""

    def __init__(self) -> None:
        self._phase = ""

    def __call__(self, phase: str, fraction: float) -> None:
        if phase != self._phase:
            logger.info("loading: %s", phase, extra={"fields": {"phase": phase}})
        self._phase = phase

    def done(self) -> None:
        """Nothing to wipe away."""


def print_ready(info: EngineInfo, config: ServerConfig, url: str) -> None:
    print(ready_screen(info, config, url), flush=True)


def log_ready(info: EngineInfo, config: ServerConfig, url: str) -> None:
    """What matters of the screen, as one record. All of it: GET /v1/precision."""
    facts = {
        "version": __version__,
        "url": url,
        "model": config.served_model_names[0],
        "numerics": info.numerics,
        "device": info.device,
        "weight_bytes": sum(info.weight_bytes.values()),
        "kv_cache_bytes": info.kv_bytes,
        "startup_seconds": info.startup_seconds,
    }
    logger.info("ready at %s", url, extra={"fields": facts})


def ready_screen(info: EngineInfo, config: ServerConfig, url: str) -> str:
    """Model, backends, precision by layer group with kernel and reason, memory, start-up times, address, a curl."""
    blocks = info.num_blocks - 1  # block 0 is never handed out
    tokens = blocks * info.block_size
    weights = ", ".join(f"{stored} {megabytes(size)}" for stored, size in info.weight_bytes.items())
    phases = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in info.startup_seconds.items())
    body = json.dumps({"messages": [{"role": "user", "content": "What is the capital of France?"}]})
    key = ' -H "authorization: Bearer $KEY"' if config.api_key_hashes else ""
    rows = [
        ("model", f"{config.served_model_names[0]}: {info.architecture}, context {info.max_model_len} tokens"),
        ("", config.model_root or info.model),
        ("numerics", f"{info.numerics} ({info.numerics_reason}); activations {info.dtype}"),
        ("device", info.device),
        *([("engines", replica_line(info))] if info.replica_pids else []),
        *([("ranks", rank_line(info))] if info.tensor_parallel_size > 1 else []),
        ("backends", backend_line(info)),
        *(("layers" if i == 0 else "", line) for i, line in enumerate(layer_lines(info))),
        *(("other ops" if i == 0 else "", line) for i, line in enumerate(op_lines(info))),
        *(("adapters" if i == 0 else "", adapter_line(each)) for i, each in enumerate(info.adapters)),
        ("weights", f"{megabytes(sum(info.weight_bytes.values()))}" + (f": {weights}" if weights else "")),
        (
            "KV cache",
            f"{megabytes(info.kv_bytes)} {info.kv_dtype}: {blocks} blocks of {info.block_size}, {tokens} tokens fit "
            f"({tokens / info.max_model_len:.1f} requests of full length)"
            + ("" if info.enable_prefix_caching else "; no prefix caching"),
        ),
        (
            "limits",
            f"{info.max_num_seqs} requests and {info.max_num_batched_tokens} tokens per step, "
            f"{info.max_queued_requests} requests waiting",
        ),
        ("start-up", phases),
        ("address", url),
    ]
    lines = [f"nvfp4 {__version__}", *(f"  {label:<10}{text}" for label, text in rows)]
    lines += ["", f"  curl {url}/v1/chat/completions{key} -H 'content-type: application/json' -d '{body}'"]
    return "\n".join(lines)


def replica_line(info: EngineInfo) -> str:
    pids = ", ".join(map(str, info.replica_pids))
    return f"{len(info.replica_pids)} (processes {pids}), each with all layers below; caches and queues are added up"


def rank_line(info: EngineInfo) -> str:
    pids = f" (processes {', '.join(map(str, [info.pid, *info.rank_pids]))})" if info.rank_pids else ""
    return f"{info.tensor_parallel_size} share every layer{pids}; layers below are rank 0's part"


def adapter_line(adapter: AdapterInfo) -> str:
    return f"{adapter.name} (LoRA, rank {adapter.rank}): {adapter.path}"


def backend_line(info: EngineInfo) -> str:
    """Each backend with its ISA variant and threads; one that cannot run here says why."""
    shown = []
    for name, facts in info.backends.items():
        threads = f", {facts['threads']} threads" if "threads" in facts else ""
        shown.append(f"{name} ({facts.get('status') or facts.get('isa', 'no ISA variants')}{threads})")
    return "; ".join(shown) or "none"


def layer_lines(info: EngineInfo) -> list[str]:
    """One aligned line per layer group: what is stored, which kernel runs it in which numerics, and why not another."""
    rows = [
        (
            f"{group.count} x {group.name}",
            f"{group.stored} {group.bits_per_weight:.2f} bit",
            megabytes(group.num_bytes),
            f"{group.backend} {group.numerics}",
            f"({group.reason})" if group.reason else "",
        )
        for group in info.layers
        if has_weights(group)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)] if rows else []
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip()
        for row in rows
    ]


def has_weights(group: LayerGroup) -> bool:
    """Whether a group of the report is of layers with stored weights, not of an op such as attention."""
    return group.stored != "-"


def op_lines(info: EngineInfo) -> list[str]:
    """What runs the ops without weights: one line for the ops that one backend runs for one reason."""
    names: dict[tuple[str, str], list[str]] = {}
    for group in info.layers:
        if not has_weights(group):
            alike = names.setdefault((group.backend, group.reason), [])
            alike += [group.name] if group.name not in alike else []
    return [
        f"{', '.join(ops)}: {backend}" + (f"  ({reason})" if reason else "") for (backend, reason), ops in names.items()
    ]


def megabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
