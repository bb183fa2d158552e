"""The other ranks of a tensor-parallel engine, as rank 0 has them: processes it starts, or strangers it meets.

One that ends takes all with it: what it held of every layer is gone. Torch-free.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from nvfp4_runtime.config import EngineConfig

logger = logging.getLogger(__name__)

# While loading, ranks fail alike and for the same reason. Rank 0 has so long to say it before it is ended.
_OWN_WORDS_SECONDS = 3.0


class RankStart(msgspec.Struct):
    """What a rank is told, as msgpack on stdin. `file`: where the ranks of this host meet; `parent`: rank 0's pid."""

    config: EngineConfig
    file: str
    log_level: int
    parent: int


@dataclass
class Ranks:
    """on_end  called by a thread, with words, once a rank has ended by itself: rank 0 cannot go on
    file    where the ranks of this host meet; None: elsewhere, and nobody was started here
    ready   all is loaded
    """

    on_end: Callable[[str], None]
    file: Path | None = None
    pids: list[int] = field(default_factory=list)
    ready: bool = False
    _closing: bool = False
    _folder: tempfile.TemporaryDirectory[str] | None = None

    @classmethod
    def of(cls, config: EngineConfig, on_end: Callable[[str], None]) -> Ranks:
        """Start the other ranks on this host, unless `config` says that others do that."""
        if config.parallel.address:
            return cls(on_end)
        folder = tempfile.TemporaryDirectory(prefix="nvfp4-ranks-")  # mode 0700
        ranks = cls(on_end, Path(folder.name) / "store", _folder=folder)
        for rank in range(1, config.parallel.size):
            ranks._start(replace(config, parallel=replace(config.parallel, rank=rank)))
        return ranks

    def met(self) -> None:
        """All are connected: nobody needs the file any more."""
        if self._folder is not None:
            self._folder.cleanup()

    def close(self) -> None:
        """From now on they may end."""
        self._closing = True

    def ended(self, rank: int, how: str) -> None:
        if self._closing:
            return
        if not self.ready:
            time.sleep(_OWN_WORDS_SECONDS)
        self.on_end(f"rank {rank} {how}: the ranks end together")

    def _start(self, config: EngineConfig) -> None:
        # -P: modules of the working directory must not take the place of ours
        command = [sys.executable, "-P", "-m", "nvfp4_runtime.engine.rank"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE)
        assert process.stdin is not None
        start = RankStart(config, str(self.file), logging.getLogger().getEffectiveLevel(), os.getpid())
        with process.stdin as stream:
            stream.write(msgspec.msgpack.encode(start))
        self.pids.append(process.pid)
        rank = config.parallel.rank
        threading.Thread(target=self._wait, args=(rank, process), daemon=True, name=f"rank {rank}").start()

    def _wait(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        self.ended(rank, f"(pid {process.pid}) {how}")
