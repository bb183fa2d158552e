"""Ranks that follow one engine after the other: a test of many models imports torch in three processes, once."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import msgspec

from nvfp4_runtime.config import EngineConfig
from nvfp4_runtime.engine.ranks import Ranks, RankStart
from nvfp4_runtime.process import leave


class RankPool:
    """`size` - 1 processes; `ranks` makes as many of them as needed follow the next engine of a config."""

    def __init__(self, size: int) -> None:
        command = [sys.executable, "-m", "tests.engine.rank_pool"]
        self.processes = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(1, size)]
        self.deaths: list[str] = []
        self._folder = tempfile.TemporaryDirectory()
        self._count = 0

    def ranks(self, config: EngineConfig) -> Ranks:
        self._count += 1
        file = Path(self._folder.name) / f"store-{self._count}"
        mates = self.processes[: config.parallel.size - 1]
        for rank, process in enumerate(mates, start=1):
            own = replace(config, parallel=replace(config.parallel, rank=rank))
            payload = msgspec.msgpack.encode(RankStart(own, str(file), 30, os.getpid()))
            assert process.stdin is not None
            process.stdin.write(len(payload).to_bytes(4, "little") + payload)
            process.stdin.flush()
        return Ranks(self.deaths.append, file, [process.pid for process in mates])

    def close(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(20) == 0
        self._folder.cleanup()


def main(stream: BinaryIO) -> None:
    from nvfp4_runtime.engine.leader import follow
    from nvfp4_runtime.engine.tensor_parallel import build_rank

    while header := stream.read(4):
        start = msgspec.msgpack.decode(stream.read(int.from_bytes(header, "little")), type=RankStart)
        follow(*build_rank(start.config, Path(start.file)))


if __name__ == "__main__":
    main(sys.stdin.buffer)
    leave(0)
