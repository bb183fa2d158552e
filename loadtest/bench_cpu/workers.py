"""Child processes that answer one JSON line with one JSON line: our engine, and the machine's limits."""

from __future__ import annotations

import itertools
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtest.bench_cpu.measure import Figure, Limits

Arrivals = list[list[tuple[float, int]]]


class Refused(Exception):
    """The engine will not be configured so; the text says why."""


class Worker:
    """`python -m MODULE ARGUMENTS` behind pipes. What it writes to stderr goes to `log`."""

    def __init__(self, module: str, arguments: Sequence[str], log: Path) -> None:
        self._log = log
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | {"OMP_NUM_THREADS": "1"},  # the engine sets its own; idle ones of torch must not spin
                text=True,
            )

    def ask(self, command: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self.read()

    def read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args!r} ended:\n{self._log.read_text(errors='replace')[-3000:]}")
        return json.loads(line)

    def end_input(self) -> None:
        """Tell it that no more comes; what it still answers can be read."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def close(self) -> None:
        self.end_input()
        self._process.wait(timeout=60)


class MachineLimits:
    """The runtime's own measurement of read bandwidth and peaks, in a process beside the measured ones."""

    def __init__(self, threads: int, log: Path) -> None:
        self._threads = threads
        self._worker = Worker("nvfp4_runtime.kernels.cpu.limits", ["--pipe"], log)

    def __call__(self) -> Limits:
        found = self._worker.ask({"threads": self._threads})
        return {name: float(limit["median"]) for name, limit in found.items()}

    def close(self) -> None:
        self._worker.close()


class Engine:
    """Our engine on `config` (EngineConfig's names), without HTTP. Raises Refused when it will not run so.

    info  what the engine says of itself: EngineInfo
    """

    def __init__(
        self,
        name: str,
        config: dict[str, Any],
        log: Path,
        profile: bool = False,
        steps: bool = False,
        absorbed: bool = False,
    ) -> None:
        self.name = name
        flags = [*["--profile"] * profile, *["--steps"] * steps, *["--absorbed"] * absorbed]
        self._worker = Worker("nvfp4_runtime.engine.bench", [json.dumps(config), *flags], log)
        answer = self._worker.read()
        if "refused" in answer:
            raise Refused(answer["refused"])
        self.info: dict[str, Any] = answer["ready"]
        self._random = random.Random(0)

    def token_bytes(self) -> float:
        """Bytes of weights that one decoded token touches: every linear and the head, not the embedding."""
        return float(sum(layer["num_bytes"] for layer in self.info["layers"] if layer["stored"] != "-"))

    def prompt(self, length: int) -> list[int]:
        """Random tokens that no earlier prompt began with."""
        return self._random.choices(range(300, self.info["vocab_size"]), k=length)

    def generate(self, prompts: list[list[int]], max_tokens: int) -> Arrivals:
        arrivals: Arrivals = self._worker.ask({"prompts": prompts, "max_tokens": max_tokens})["arrivals"]
        return arrivals

    def measure(self, figure: Figure) -> float:
        """Tokens per second, after two tokens that bring idle memory back, as llama.cpp's warm-up does for its."""
        self.generate([self.prompt(2)], 2)
        if figure.leg == "prefill":
            return figure.tokens / self.generate([self.prompt(figure.tokens)], 1)[0][0][0]
        prompts = [self.prompt(figure.prompt_tokens) for _ in range(figure.batch)]
        return decode_rate(self.generate(prompts, figure.tokens))

    def step_seconds(self, prompt: list[int], steps: int) -> float:
        """Median time between the tokens of one sequence."""
        times = [seconds for seconds, _ in self.generate([prompt], steps)[0]]
        return statistics.median(b - a for a, b in itertools.pairwise(times))

    def profile(self) -> list[dict[str, Any]]:
        """The steps so far, of an engine made with `profile` or `steps`; ends it."""
        self._worker.end_input()
        steps: list[dict[str, Any]] = self._worker.read()["steps"]
        return steps

    def close(self) -> None:
        self._worker.close()


def decode_rate(arrivals: Arrivals) -> float:
    """Tokens per second of all sequences together, from when each has its first token to when the first one ends."""
    begin = max(stream[0][0] for stream in arrivals)
    end = min(stream[-1][0] for stream in arrivals)
    tokens = sum(count for stream in arrivals for seconds, count in stream if begin < seconds <= end)
    return tokens / (end - begin)
