"""The engine behind a pipe, for measurements: the real engine process, its socket and its messages, without HTTP.

    python -m nvfp4_runtime.engine.bench CONFIG [--steps | --profile] [--absorbed]

CONFIG is an EngineConfig as JSON; what it leaves out has its default. The first line of stdout is {"ready": EngineInfo}
or {"refused": reason}. Then one JSON command per line of stdin gives one answer:

    {"prompts": [[ids], ...], "max_tokens": n}  ->  {"arrivals": [[[seconds, tokens], ...] per prompt]}

Greedy, EOS ignored; seconds count from the moment before the first prompt is sent. With --steps one more answer comes
after stdin is closed, {"steps": [...]}: per step its new tokens, its seconds from one message of outputs to the next,
and its "experts": how many experts it ran, summed over the layers. With --profile also the seconds inside each timed
part; "native", the calls into the compiled kernels, lies inside "forward". Its timers slow a step down a little.
With --absorbed latent attention takes long parts of prompts as it takes single tokens: layers/mla_prompt.py rests.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from nvfp4_runtime.config import EngineConfig
from nvfp4_runtime.engine.messages import Failed, FromEngine, Outputs, Ready, Refused, Shutdown, Start, Submit
from nvfp4_runtime.engine.wire import FrameBuffer, decode_from_engine, frame
from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.sampling.params import SamplingParams


class EngineProcess:
    """An engine in a child process, spoken to in its own messages. `info` after start; ConfigError when it refuses."""

    def __init__(
        self, config: EngineConfig, record: Path | None = None, profile: bool = False, absorbed: bool = False
    ) -> None:
        ours, theirs = socket.socketpair()
        fd = str(theirs.fileno())
        module = ["nvfp4_runtime.engine.core", fd]
        if record is not None:
            module = [
                "nvfp4_runtime.engine.bench_steps",
                fd,
                str(record),
                *["--profile"] * profile,
                *["--absorbed"] * absorbed,
            ]
        self._process = subprocess.Popen([sys.executable, "-P", "-m", *module], pass_fds=[theirs.fileno()])
        theirs.close()
        self._sock, self._frames, self._sent = ours, FrameBuffer(), 0
        self._sock.sendall(frame(Start(config)))
        while True:
            for message in self._receive():
                if isinstance(message, Failed):
                    raise ConfigError(message.message, message.flag)
                if isinstance(message, Ready):
                    self.info = message.info
                    return

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[list[tuple[float, int]]]:
        """(seconds, tokens) of each prompt's outputs. Raises RuntimeError when the engine refuses one."""
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        started = time.monotonic()
        arrivals: dict[str, list[tuple[float, int]]] = {}
        for prompt in prompts:
            self._sent += 1
            arrivals[str(self._sent)] = []
            self._sock.sendall(frame(Submit(str(self._sent), prompt, params, time.monotonic())))
        open_requests = set(arrivals)
        while open_requests:
            for message in self._receive():
                if isinstance(message, Refused | Failed):
                    raise RuntimeError(message.message)
                if not isinstance(message, Outputs):
                    continue
                seconds = time.monotonic() - started
                for output in message.outputs:
                    if output.token_ids:
                        arrivals[output.request_id].append((seconds, len(output.token_ids)))
                    if output.finish_reason is not None:
                        open_requests.discard(output.request_id)
        return list(arrivals.values())

    def close(self) -> None:
        self._sock.sendall(frame(Shutdown()))
        self._process.wait(timeout=60)
        self._sock.close()

    def _receive(self) -> list[FromEngine]:
        data = self._sock.recv(1 << 16)
        if not data:
            raise RuntimeError(f"the engine process ended with code {self._process.wait()}; see its log above")
        return [decode_from_engine(payload) for payload in self._frames.feed(data)]


def parse_config(text: str) -> EngineConfig:
    """An EngineConfig from JSON. Raises ConfigError for unknown names, types and values."""
    raw = json.loads(text)
    _refuse_unknown(raw, EngineConfig(), "")
    try:
        return msgspec.convert(raw, EngineConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"the engine cannot be configured so: {error}") from error


def _refuse_unknown(raw: dict[str, Any], known: Any, where: str) -> None:
    for name, value in raw.items():
        if not hasattr(known, name):
            raise ConfigError(f"unknown setting {where}{name}; expected one of {', '.join(vars(known))}")
        if isinstance(value, dict):
            _refuse_unknown(value, getattr(known, name), f"{where}{name}.")


def serve(config: str, record: bool, profile: bool, absorbed: bool) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints goes to stderr

    def answer(value: Any) -> None:
        print(msgspec.json.encode(value).decode(), file=answers, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        steps = Path(folder) / "steps.json" if record or profile or absorbed else None
        try:
            engine = EngineProcess(parse_config(config), steps, profile, absorbed)
        except ConfigError as error:
            answer({"refused": str(error)})
            return
        answer({"ready": engine.info})
        for line in sys.stdin:
            command = json.loads(line)
            answer({"arrivals": engine.generate(command["prompts"], command["max_tokens"])})
        engine.close()
        if record or profile:
            assert steps is not None
            answer({"steps": json.loads(steps.read_text())})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--absorbed", action="store_true")
    args = parser.parse_args()
    serve(args.config, args.steps, args.profile, args.absorbed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
