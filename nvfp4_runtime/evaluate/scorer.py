"""A loaded model that answers to every token of a window, with the server's loading, kernels, runner and KV cache."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from nvfp4_runtime.checkpoint.detect import read_config
from nvfp4_runtime.config import CacheConfig, Dtype, EngineConfig, HeadDtype, KVDtype, Numerics, SchedulerConfig
from nvfp4_runtime.engine.build import build_engine
from nvfp4_runtime.engine.messages import EngineInfo, Submit
from nvfp4_runtime.engine.plan import context_limit
from nvfp4_runtime.engine.request import Request
from nvfp4_runtime.engine.runner import ModelRunner
from nvfp4_runtime.engine.scheduler import Schedule, Scheduled
from nvfp4_runtime.errors import CheckpointError, ConfigError
from nvfp4_runtime.evaluate.divergence import Rows
from nvfp4_runtime.evaluate.windows import Windows
from nvfp4_runtime.models import describe_model
from nvfp4_runtime.quantize.default_model import default_bf16, ensure_default_model
from nvfp4_runtime.sampling.params import SamplingParams

BLOCK_SIZE = 16
MAX_CHUNK = 256  # tokens in one forward pass, fewer for a large vocabulary
LOGITS_BYTES = 24 << 20  # of one chunk's logits; malloc gives blocks beyond 32 MB back each time, and gets them zeroed


@dataclass(frozen=True)
class Side:
    """A checkpoint and how to run it; the same choices as `nvfp4 serve`'s flags of these names."""

    folder: Path
    numerics: Numerics | Literal["auto"] = "auto"
    kv_dtype: KVDtype | Literal["auto"] = "auto"
    lm_head_dtype: HeadDtype = "auto"
    dtype: Dtype | Literal["auto"] = "auto"
    backend: str = "auto"
    threads: int | None = None


class Scorer:
    """One side, loaded for `windows`.

    Scheduler and sampler take no part: a window is one request whose tokens are computed in chunks, as in chunked
    prefill, with the logits of every token wanted.
    seconds  spent in forward passes so far
    """

    def __init__(self, side: Side, windows: Windows) -> None:
        """Raises ConfigError for windows beyond the model's context, CheckpointError for tokens it does not have, and
        what loading raises."""
        window = windows.size
        limit = context_limit(describe_model(read_config(side.folder)))
        if window > limit:
            raise ConfigError(
                f"a window of {window} tokens exceeds the context of {side.folder}, which is {limit}", "--window"
            )
        num_blocks = -(-window // BLOCK_SIZE)
        self.side = side
        self.seconds = 0.0
        engine = build_engine(
            EngineConfig(
                model=str(side.folder),
                dtype=side.dtype,
                numerics=side.numerics,
                lm_head_dtype=side.lm_head_dtype,
                backend=side.backend,
                threads=side.threads,
                cache=CacheConfig(BLOCK_SIZE, 1 + num_blocks, kv_dtype=side.kv_dtype, enable_prefix_caching=False),
                scheduler=SchedulerConfig(max_num_seqs=1, max_model_len=window),
            )
        )
        assert isinstance(engine.executor, ModelRunner)
        self.info: EngineInfo = engine.info
        self._runner = engine.executor
        self._blocks = engine.scheduler.pool.allocate(num_blocks)
        highest = max(max(tokens) for tokens in windows.ids)
        if highest >= self.info.vocab_size:
            raise CheckpointError(
                f"the text has the token {highest}, and {side.folder} has {self.info.vocab_size} of them: its "
                "tokenizer belongs to another model"
            )

    @property
    def chunk(self) -> int:
        """Tokens per forward pass."""
        return max(1, min(MAX_CHUNK, LOGITS_BYTES // (4 * self.info.vocab_size)))

    def rows(self, tokens: tuple[int, ...], start: int, stop: int) -> Rows:
        """The answers after the tokens at `start` .. `stop - 1`; those before them were given in the calls before.

        Raises CheckpointError when a row is not finite.
        """
        request = Request(Submit("window", list(tokens), SamplingParams(), 0.0), 0, (), len(tokens) + 1)
        request.block_ids = self._blocks
        started = time.perf_counter()
        schedule = Schedule((Scheduled(request, start, stop - start),))
        logits = self._runner.logits(schedule, [range(stop - start)]).cpu()
        self.seconds += time.perf_counter() - started
        rows = Rows.of_logits(logits, tokens[start + 1 : stop + 1])
        finite = np.isfinite(rows.top_prob)  # NaN and +Inf are faults; -Inf below the top is a probability of 0
        if not finite.all():
            raise CheckpointError(
                f"{self.side.folder}: the logits after token {start + int(finite.argmin())} of a window are not "
                "finite: weights or scales are broken, which nvfp4 inspect can tell more about"
            )
        return rows


def find_model(name: str, flag: str | None = None) -> Path:
    """The folder a command's user means: `default` and `default-bf16` by name, else a local folder. ConfigError."""
    if name == "default":
        return ensure_default_model()
    if name == "default-bf16":
        return default_bf16()
    if not Path(name).is_dir():
        raise ConfigError(f"there is no model folder {name}; give a local folder, or `default`", flag)
    return Path(name)
