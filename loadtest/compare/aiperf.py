"""aiperf as the engine: a process of its own with our prompts, and its record of every request as our outcomes.

It is no dependency: it brings hundreds of megabytes, so it has a place of its own and is named by its program. Its
tokenizer must be a name known to the hub; a folder is given to it as a cache of the hub that holds nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.compare.loads import warm_up
from loadtest.compare.report import Arrival
from loadtest.traffic.call import Conversation, Outcome
from loadtest.traffic.wire import Endpoint

_TOKENIZER = "local/tokenizer"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json")
_TIMEOUT_SECONDS = 3600.0


@dataclass(frozen=True)
class Aiperf:
    """`tokenizer`: a folder with tokenizer.json; aiperf wants one even where tokens are counted by the server."""

    program: str
    tokenizer: Path

    @classmethod
    def find(cls, program: str, tokenizer: Path) -> Aiperf:
        """ValueError says what is missing and how to get it."""
        found = shutil.which(program)
        if found is None:
            raise ValueError(
                f"there is no program {program}; install aiperf in an environment of its own (pip install aiperf) and "
                "name it with --aiperf"
            )
        if not (tokenizer / "tokenizer.json").is_file():
            raise ValueError(f"aiperf needs a tokenizer, and {tokenizer} has no tokenizer.json")
        return cls(found, tokenizer)

    def run(self, endpoint: Endpoint, talks: Sequence[Conversation], arrival: Arrival, seed: int) -> list[Outcome]:
        """ValueError for what it is not asked to do here; RuntimeError with the end of its log when it fails."""
        if arrival.kind == "trace" or any(len(talk.calls) != 1 for talk in talks):
            raise ValueError(
                "the engine aiperf runs single calls, closed or poisson; use --engine builtin for the rest"
            )
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            warm = warm_up(_warm_calls(arrival), f"aiperf {seed}")  # its own connections and workers, not the server
            (work / "calls.jsonl").write_text("".join(_line(talk) for talk in [*warm, *talks]), encoding="utf-8")
            self._make_hub(work / "hf")
            done = subprocess.run(
                self._command(endpoint, work, len(talks), arrival, seed),
                env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hf")},
                capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False,
            )  # fmt: skip
            records = work / "out" / "profile_export.jsonl"
            if done.returncode != 0 or not records.is_file():
                raise RuntimeError(f"aiperf ended with code {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
            return read_records(records.read_text(encoding="utf-8").splitlines())

    def _command(self, endpoint: Endpoint, work: Path, count: int, arrival: Arrival, seed: int) -> list[str]:
        command = [
            self.program, "profile", "--model", endpoint.model, "--url", endpoint.url, "--endpoint-type", "chat",
            "--streaming", "--input-file", str(work / "calls.jsonl"), "--custom-dataset-type", "mooncake_trace",
            "--tokenizer", _TOKENIZER, "--use-server-token-count", "--use-legacy-max-tokens",
            "--extra-inputs", "ignore_eos:true", "--extra-inputs", "temperature:0", "--request-count", str(count),
            "--warmup-request-count", str(_warm_calls(arrival)), "--dataset-sampling-strategy", "sequential",
            "--artifact-dir", str(work / "out"), "--random-seed", str(seed), "--ui", "none",
        ]  # fmt: skip
        for name, value in endpoint.headers.items():
            command += ["--header", f"{name}:{value}"]
        if arrival.kind == "closed":
            return [*command, "--concurrency", f"{arrival.value:.0f}"]
        return [*command, "--request-rate", f"{arrival.value:g}", "--request-rate-mode", "poisson"]

    def _make_hub(self, home: Path) -> None:
        repository = home / "hub" / f"models--{_TOKENIZER.replace('/', '--')}"
        snapshot = repository / "snapshots" / "0"
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0", encoding="utf-8")
        for name in _TOKENIZER_FILES:
            if (self.tokenizer / name).is_file():
                shutil.copy(self.tokenizer / name, snapshot / name)


def _warm_calls(arrival: Arrival) -> int:
    return max(8, round(arrival.value)) if arrival.kind == "closed" else 8


def _line(talk: Conversation) -> str:
    call = talk.calls[0]
    messages = [{"role": role, "content": content} for role, content in call.messages]
    return json.dumps({"messages": messages, "output_length": call.max_tokens}) + "\n"


def read_records(lines: Iterable[str]) -> list[Outcome]:
    """aiperf's profile_export.jsonl. Times count from the first request's; a request is due when aiperf issued it."""
    records = [json.loads(line) for line in lines if line.strip()]
    records = [each for each in records if each["metadata"].get("benchmark_phase", "profiling") == "profiling"]
    if not records:
        raise RuntimeError("aiperf recorded no request")
    started = min(_issued(each["metadata"]) for each in records)
    return [_outcome(each, started) for each in records]


def _issued(metadata: dict[str, Any]) -> int:
    return int(metadata.get("credit_issued_ns") or metadata["request_start_ns"])


def _outcome(record: dict[str, Any], started: int) -> Outcome:
    metadata, metrics = record["metadata"], record.get("metrics") or {}
    sent = (metadata["request_start_ns"] - started) / 1e9
    outcome = Outcome((_issued(metadata) - started) / 1e9, sent=sent)
    outcome.ended = (metadata["request_end_ns"] - started) / 1e9
    if record.get("error") or "time_to_first_token" not in metrics:
        outcome.failure = f"aiperf: {str(record.get('error') or 'an answer without text')[:200]}"
        return outcome
    at = sent + metrics["time_to_first_token"]["value"] / 1e3
    outcome.arrivals = [at]
    for gap in metrics.get("inter_chunk_latency", {}).get("value", ()):
        outcome.arrivals.append(at := at + gap / 1e3)
    count = metrics.get("usage_completion_tokens") or metrics["output_sequence_length"]
    outcome.completion_tokens = round(count["value"])
    outcome.prompt_tokens = round(metrics["usage_prompt_tokens"]["value"]) if "usage_prompt_tokens" in metrics else None
    return outcome
