"""The engine's process as engine/bench.py starts it to record steps: python -m ... FD FILE [--profile] [--absorbed]."""

from __future__ import annotations

import functools
import json
import socket
import sys
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from nvfp4_runtime.engine import core, runner, scheduler
from nvfp4_runtime.engine.messages import FromEngine, Outputs, Ready
from nvfp4_runtime.kernels.cpu import backend
from nvfp4_runtime.kernels.cpu.whole import NativeMixture
from nvfp4_runtime.layers import mla
from nvfp4_runtime.layers.moe import Experts
from nvfp4_runtime.models.stack import Stack
from nvfp4_runtime.sampling.sampler import BatchSampler


class PartTimer:
    """Wraps functions so that the seconds spent inside them are added up by name. Not for nested calls of one name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Replace `owner.attribute` by a timed one; what is not callable stays."""
        inner = getattr(owner, attribute)
        if not callable(inner):
            return
        seconds = self.seconds
        seconds.setdefault(name, 0.0)

        @functools.wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                seconds[name] += time.perf_counter() - begin

        setattr(owner, attribute, timed)

    def wrap_native(self, native: Any) -> None:
        """Every method of the extension's classes, so that kernels count whichever class offers them."""
        for value in vars(native).values():
            if isinstance(value, type):
                for attribute, member in list(vars(value).items()):
                    if not attribute.startswith("_") and callable(member):
                        self.wrap(value, attribute, "native")


class RoutedExperts:
    """Counts the experts that every mixture runs, all layers and calls together."""

    def __init__(self) -> None:
        self._plain = 0
        self._native: list[NativeMixture] = []

    def wrap(self) -> None:
        plain, make = Experts.__call__, NativeMixture.__init__

        def run_plain(experts: Experts, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
            self._plain += len(set(chosen.flatten().tolist()))
            return plain(experts, x, weights, chosen)

        def keep(mixture: NativeMixture, *args: Any) -> None:
            make(mixture, *args)
            self._native.append(mixture)

        Experts.__call__, NativeMixture.__init__ = run_plain, keep  # type: ignore[method-assign,assignment]  # as any wrapper

    def take(self) -> int:
        """Those of the step that just ended: a native mixture remembers its last call, whoever called it."""
        taken, self._plain = self._plain, 0
        return taken + sum(len(set(mixture.chosen)) for mixture in self._native)


class RecordingCore(core.EngineCore):
    """The engine's loop, noting at each message of outputs what happened since the one before."""

    def __init__(self, sock: socket.socket, timer: PartTimer, routed: RoutedExperts) -> None:
        super().__init__(sock)
        self._timer, self._routed = timer, routed
        self._last, self._parts = time.perf_counter(), dict(timer.seconds)
        self.steps: list[dict[str, Any]] = []

    def _send(self, message: FromEngine) -> None:
        super()._send(message)
        if isinstance(message, Outputs):
            now = time.perf_counter()
            parts = {name: total - self._parts.get(name, 0.0) for name, total in self._timer.seconds.items()}
            tokens = sum(len(output.token_ids) for output in message.outputs)
            experts = self._routed.take()
            self.steps.append({"tokens": tokens, "seconds": now - self._last, "experts": experts, "parts": parts})
        if isinstance(message, Outputs | Ready):  # loading, which packs weights natively, is no part of the first step
            self._last, self._parts = time.perf_counter(), dict(self._timer.seconds)


def run(fd: int, result: Path, profile: bool, absorbed: bool) -> int:
    """`core.main`, recorded; with `profile` there are timers round its parts. Writes the steps when told to stop."""
    if absorbed:
        mla.long_parts = lambda batch: []
    timer, routed = PartTimer(), RoutedExperts()
    routed.wrap()
    if profile:
        if backend._native is not None:
            timer.wrap_native(backend._native)
        timer.wrap(Stack, "forward", "forward")
        timer.wrap(runner.ModelRunner, "prepare", "prepare batch")
        timer.wrap(BatchSampler, "sample", "sample")
        timer.wrap(scheduler.Scheduler, "schedule", "schedule")
        timer.wrap(scheduler.Scheduler, "commit", "commit")
    recording = RecordingCore(socket.socket(fileno=fd), timer, routed)
    code = recording.run()
    result.write_text(json.dumps(recording.steps))
    return code


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1]), Path(sys.argv[2]), "--profile" in sys.argv[3:], "--absorbed" in sys.argv[3:]))
