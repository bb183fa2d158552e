"""How long a step takes: as it was measured on a machine, or as the arithmetic of a GPU's data sheet has it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, Protocol

import msgspec
import numpy as np

from loadtest.plan.gpus import Gpu
from nvfp4_runtime.engine.cost import ModelCost
from nvfp4_runtime.engine.scheduler import Schedule

Knots = list[tuple[float, float]]  # (count, seconds), counts rising


class StepTimes(Protocol):
    """`source` says whether its times were measured.

    newcomer_seconds  that a step takes longer for each request that comes while it runs
    """

    source: str
    newcomer_seconds: float

    def seconds(self, schedule: Schedule) -> float: ...


class Measured(msgspec.Struct, forbid_unknown_fields=True):
    """What a calibration run found: measured.json.

    front_seconds     before the engine has a request, and after it has given a token away: HTTP and tokenizer
    decode            step with so many rows of one token each, at a short context
    prefill           what so many prompt tokens, from position 0 on, add to a step
    context_seconds   what each token of context adds to a decode step
    pair_seconds      what each (prompt token, earlier token of former steps) pair adds
    newcomer_seconds  what a request that comes while a step runs adds to it: the same cores parse and tokenise it
    scatter           quantiles of what steps without prompt tokens take over what they take on average; mean 1
    prompt_scatter    the same of steps with some
    template_tokens   of the chat template, around an empty message
    tokens_per_word   of the workloads' words
    """

    format: Literal["nvfp4-step-times-2"]
    made_at: str
    machine: dict[str, str]
    model: str
    flags: list[str]
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    kv_tokens: int
    front_seconds: float
    decode: Knots
    prefill: Knots
    context_seconds: float
    pair_seconds: float
    template_tokens: int
    tokens_per_word: float
    newcomer_seconds: float = 0.0
    scatter: tuple[float, ...] = (1.0,)
    prompt_scatter: tuple[float, ...] = (1.0,)


class MeasuredTimes:
    """Straight lines between what was measured; beyond the last count, on as between the last two. Each step is a draw
    from what was seen around its mean."""

    def __init__(self, measured: Measured, seed: str = "0") -> None:
        self.source = f"measured {measured.made_at} on {measured.machine.get('cpu', 'this machine')}"
        self.newcomer_seconds = measured.newcomer_seconds
        self._measured = measured
        self._draw = random.Random(f"steps {seed}")
        self._decode, self._prefill = _line(measured.decode), _line([(0.0, 0.0), *measured.prefill])

    def seconds(self, schedule: Schedule) -> float:
        rows = prompt = context = pairs = 0
        for entry in schedule.entries:
            if entry.count == 1:
                rows += 1
                context += entry.stop
            else:
                prompt += entry.count
                pairs += entry.count * entry.start
        scatter = self._measured.prompt_scatter if prompt else self._measured.scatter
        return sum(self.parts(rows, prompt, context, pairs)) * self._draw.choice(scatter)

    def parts(self, rows: int, prompt: int, context: int, pairs: int = 0) -> tuple[float, float]:
        """Mean seconds of a step for its decode rows, and for its prompt tokens."""
        decode = _at(self._decode, max(rows, 1)) + self._measured.context_seconds * context
        return decode, _at(self._prefill, prompt) + self._measured.pair_seconds * pairs


SUMS_PER_LAYER = 2  # after the output projection and after the feed-forward
PARTIAL_BYTES = 4  # of a value of a partial sum: FP32


@dataclass(frozen=True)
class Ranks:
    """`count` GPUs that share every layer. Each sends its partial sums to all others, as our server does it."""

    count: int
    hidden_size: int
    num_layers: int

    def seconds(self, gpu: Gpu, tokens: int) -> float:
        """Of all exchanges of a step of so many tokens, and of launching its layers op by op."""
        if self.count == 1:
            return 0.0
        received = (self.count - 1) * tokens * self.hidden_size * PARTIAL_BYTES
        each = gpu.exchange_seconds + received / (gpu.link_bytes_per_second * gpu.bytes_share)
        return self.num_layers * (SUMS_PER_LAYER * each + gpu.eager_layer_seconds)


class Modelled:
    """The larger of arithmetic and memory traffic, each at a share of the data sheet that good kernels reach.

    cost  of the model, or of one rank's part of it
    """

    newcomer_seconds = 0.0

    def __init__(self, gpu: Gpu, cost: ModelCost, numerics: str, ranks: Ranks | None = None) -> None:
        each = f"{ranks.count} x " if ranks is not None and ranks.count > 1 else ""
        self.source = f"MODELLED from the data sheet of {each}{gpu.name}, not measured"
        self._gpu, self._cost, self._ranks = gpu, cost, ranks
        self._flops = gpu.peak_flops(numerics) * gpu.flops_share
        self._bytes = gpu.bytes_per_second * gpu.bytes_share

    def seconds(self, schedule: Schedule) -> float:
        work = self._cost.of_step(schedule)
        moved = (work.bytes_read + work.bytes_written) / self._bytes
        exchanged = self._ranks.seconds(self._gpu, schedule.num_tokens) if self._ranks is not None else 0.0
        return self._gpu.step_overhead_seconds + max(work.flops / self._flops, moved) + exchanged


def _line(knots: Knots) -> tuple[list[float], list[float]]:
    ordered = sorted(knots)
    return [at for at, _ in ordered], [seconds for _, seconds in ordered]


def _at(line: tuple[list[float], list[float]], at: float) -> float:
    counts, seconds = line
    if at > counts[-1] and len(counts) > 1:
        slope = (seconds[-1] - seconds[-2]) / (counts[-1] - counts[-2])
        return seconds[-1] + max(slope, 0.0) * (at - counts[-1])
    return float(np.interp(at, counts, seconds))
