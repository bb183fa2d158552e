"""A rank of a tensor-parallel engine that is not rank 0: loads its part of the model and follows rank 0's steps.

Started by rank 0 as `python -m nvfp4_runtime.engine.rank`, with a RankStart on stdin; across hosts `nvfp4 serve` runs
it where RANK is not 0. Exit codes: 0 rank 0 said that it is enough, 2 it did not load, 3 the team fell apart.
"""

from __future__ import annotations

import gc
import logging
import signal
import sys
from pathlib import Path

import msgspec

from nvfp4_runtime.config import EngineConfig
from nvfp4_runtime.engine.logs import configure_logs
from nvfp4_runtime.engine.ranks import RankStart
from nvfp4_runtime.engine.torch_import import import_torch
from nvfp4_runtime.errors import ConfigError, EngineDeadError, NVFP4Error
from nvfp4_runtime.process import die_with_parent, leave

logger = logging.getLogger(__name__)


def run(config: EngineConfig, file: Path | None, log_level: int) -> int:
    """Follow until told to end. `file`: where the ranks of this host meet; None: at config.parallel.address."""
    # whoever signals the whole group, a terminal or a cluster, has told rank 0, which drains and then ends us
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    rank = config.parallel.rank
    text = f"%(levelname)s rank {rank}: %(message)s"
    # what all ranks have to say of the same files, rank 0 says
    level = log_level if log_level <= logging.DEBUG else max(log_level, logging.ERROR)
    configure_logs(config.log_format, level, text, process=f"rank {rank}")
    gc.disable()  # a million objects are made now, and none of them is garbage
    import_torch()
    from nvfp4_runtime.engine.leader import follow
    from nvfp4_runtime.engine.tensor_parallel import build_rank

    try:
        model, team, kv, device = build_rank(config, file)
    except NVFP4Error as error:
        # flags are the same everywhere; of files and memory every host has its own
        logger.log(logging.DEBUG if isinstance(error, ConfigError) else logging.ERROR, "it was not loaded: %s", error)
        return 2
    gc.freeze()
    gc.enable()
    try:
        follow(model, team, kv, device)
    except EngineDeadError as error:
        logger.warning("%s", error)
        return 3
    return 0


def main() -> int:
    start = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=RankStart)
    die_with_parent(start.parent)
    try:
        return run(start.config, Path(start.file), start.log_level)
    except Exception:  # last resort: say why; rank 0 sees that this process ends
        logger.exception("rank %d failed", start.config.parallel.rank)
        return 3


if __name__ == "__main__":
    leave(main())
