"""DeviceRunner: launches steps on a GPU and reads them later. Nothing in a step waits for the device.

A step is staged into pinned memory, copied over in one go, run (one captured launch where every sequence decodes, op by
op otherwise), sampled on the device, and its tokens copied back into pinned memory behind a mark. Tokens that the step
before is still sampling are taken from the device's memory, so a step can be launched before the one before it is read.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nvfp4_runtime.batch import AdapterRows, CacheLayer, ForwardBatch
from nvfp4_runtime.engine.device import Device
from nvfp4_runtime.engine.graphs import DecodeGraphs
from nvfp4_runtime.engine.messages import Submit
from nvfp4_runtime.engine.request import Request
from nvfp4_runtime.engine.runner import Model, ModelRunner, wanted_rows
from nvfp4_runtime.engine.scheduler import Schedule, Scheduled, StepResult
from nvfp4_runtime.engine.staging import PENDING, Layout, StepLists, StepSizes
from nvfp4_runtime.sampling.draw import uniform
from nvfp4_runtime.sampling.on_device import Controls, DeviceSampler, can_sample
from nvfp4_runtime.sampling.params import SamplingParams
from nvfp4_runtime.sampling.sampler import BatchSampler

logger = logging.getLogger(__name__)

_NOWHERE = -1  # a new token that the last step did not sample
_MOST_TOP_K = 2**31 - 1  # a request may ask for more, which means the same: all


@dataclass(frozen=True)
class Capacity:
    """The largest step there will be.

    tokens        new tokens of one step
    seqs          sequences of one step
    seq_tokens    tokens of one sequence
    vocab_size    V
    """

    tokens: int
    seqs: int
    seq_tokens: int
    vocab_size: int


@dataclass(frozen=True)
class _Slot:
    """Pinned memory of one step. Two take turns: the step that used one is read before the next but one is staged."""

    staged: Tensor  # uint8 [num_bytes of the largest step]
    tokens: Tensor  # int64 [seqs]


@dataclass(frozen=True)
class _Step:
    """What is known of a step when it is launched; nothing in it changes afterwards.

    graph_size    the captured batch size that runs it, or None
    samples       rows of the logits from which a token is chosen
    host          index of each entry whose tokens or scores the host makes -> its rows among its new tokens
    host_logits   pinned float32 [rows of host, V], or None
    """

    schedule: Schedule
    slot: _Slot
    layout: Layout
    sizes: StepSizes
    graph_size: int | None
    samples: list[int]
    has_pending: bool
    max_query_len: int
    adapters: AdapterRows | None
    max_seq_len: int
    host: dict[int, range]
    host_logits: Tensor | None


class DeviceTicket:
    """See `overlap.Ticket`."""

    def __init__(self, step: _Step, arrived: Callable[[], None], read: Callable[[_Step], list[StepResult]]) -> None:
        self.chosen_on_host = any(step.schedule.entries[i].samples for i in step.host)
        self._step, self._arrived, self._read = step, arrived, read

    def wait(self) -> list[StepResult]:
        self._arrived()
        return self._read(self._step)


@dataclass(frozen=True)
class _Waited:
    """A step that was waited for at its launch."""

    results: list[StepResult]
    chosen_on_host: bool = True

    def wait(self) -> list[StepResult]:
        return self.results


class DeviceRunner(ModelRunner):
    """The executor over a model on a GPU: `launch` for the overlapped engine, `execute` as everywhere.

    sampler         of rows that the host need not see; the others go through `host_sampler`, and a step that has some
                    of them is read before the next is scheduled
    """

    def __init__(
        self,
        model: Model,
        kv: tuple[CacheLayer, ...],
        host_sampler: BatchSampler,
        device: Device,
        sampler: DeviceSampler,
        capacity: Capacity,
        adapters: Sequence[str] = (),
    ) -> None:
        super().__init__(model, kv, host_sampler, adapters)
        self._device = device
        self._choose = sampler
        self._capacity = capacity
        on = device.torch_device
        self._width = _rounded(-(-capacity.seq_tokens // self._block_size))
        largest = StepSizes(
            capacity.tokens, capacity.seqs, capacity.tokens, capacity.seqs, capacity.tokens, self._width
        )
        num_bytes = Layout.of(largest).num_bytes
        self._staged = torch.zeros(num_bytes, dtype=torch.uint8, device=on)
        self._tokens = torch.zeros(capacity.seqs, dtype=torch.int64, device=on)
        self._slots = tuple(
            _Slot(device.pinned(num_bytes), device.pinned(8 * capacity.seqs).view(torch.int64)) for _ in range(2)
        )
        self._turn = 0
        self._rows_of_last: dict[Request, int] = {}
        self._graphs: DecodeGraphs | None = None
        self._told_about_host = False

    # -- a step ----------------------------------------------------------------------------------------------------

    def execute(self, schedule: Schedule) -> list[StepResult]:
        """Launch, and wait."""
        return self.launch(schedule).wait()

    def launch(self, schedule: Schedule) -> DeviceTicket | _Waited:
        """Queue the step on the device. The launches before the last one must have been waited for.

        A step in which somebody wants hidden states (pooling) is waited for here.
        """
        if any(entry.request.pooling is not None for entry in schedule.entries):
            return _Waited(self._execute_apart(schedule))
        return self._launch(schedule)

    def _pool(self, schedule: Schedule) -> list[StepResult]:
        made: list[StepResult] = []
        self._device.submit(lambda: made.extend(super(DeviceRunner, self)._pool(schedule)))
        self._device.mark()()
        return made

    @torch.inference_mode()
    def _launch(self, schedule: Schedule) -> DeviceTicket:
        step = self._stage(schedule)
        self._device.submit(lambda: self._run(step))
        return DeviceTicket(step, self._device.mark(), self._read)

    def _stage(self, schedule: Schedule) -> _Step:
        """Write the step into pinned memory."""
        entries = schedule.entries
        graph_size = self._graph_for(schedule)
        # a graph gives the logits of every row, wanted or not
        rows = [wanted_rows(entry) if graph_size is None else range(1) for entry in entries]
        lists = StepLists.of(schedule, rows, self._block_size)
        sources = self._sources(schedule, lists)
        samples: list[int] = []
        host: dict[int, range] = {}
        host_rows: list[int] = []
        at = 0
        self._rows_of_last = {}
        for i, (entry, wanted) in enumerate(zip(entries, rows, strict=True)):
            at += len(wanted)
            if entry.samples:
                self._rows_of_last[entry.request] = len(samples)
                samples.append(at - 1)
            if _needs_host(entry):
                host[i] = wanted
                host_rows.extend(range(at - len(wanted), at))
        if graph_size is not None:
            lists.pad_decodes(graph_size)
            sources.extend([_NOWHERE] * (graph_size - len(entries)))
        drawing = [e for i, e in enumerate(entries) if e.samples and i not in host and e.request.params.temperature > 0]
        sizes = StepSizes(
            tokens=len(lists.input_ids),
            seqs=len(lists.seq_lens),
            logits=len(lists.logits_rows),
            samples=len(samples),
            host=len(host_rows),
            width=_rounded(lists.width),
            drawn=bool(drawing),
        )
        slot, layout = self._slots[self._turn], Layout.of(sizes)
        self._turn = 1 - self._turn
        buffer = slot.staged.numpy()
        lists.fill(layout, buffer, sizes.width)
        layout.fill(buffer, "sources", sources)
        layout.fill(buffer, "sample_rows", samples)
        layout.fill(buffer, "host_rows", host_rows)
        if drawing:
            _fill_controls(layout, buffer, [e for e in entries if e.samples])
        if any(entries[i].samples for i in host):
            self._tell_about_host()
        vocab = self._capacity.vocab_size
        pinned = self._device.pinned(4 * vocab * len(host_rows)) if host_rows else None
        return _Step(
            schedule=schedule,
            slot=slot,
            layout=layout,
            sizes=sizes,
            graph_size=graph_size,
            samples=samples,
            has_pending=any(source != _NOWHERE for source in sources),
            max_query_len=max(entry.count for entry in entries),
            max_seq_len=max(lists.seq_lens),
            adapters=self.adapter_rows(schedule),
            host=host,
            host_logits=None if pinned is None else pinned.view(torch.float32).view(len(host_rows), vocab),
        )

    def _sources(self, schedule: Schedule, lists: StepLists) -> list[int]:
        """Per new token, the row of the last step's samples that it is; _NOWHERE: `input_ids` has it."""
        sources = [_NOWHERE] * len(lists.input_ids)
        for entry, at in zip(schedule.entries, lists.cu_seqlens, strict=False):  # one bound more than entries
            if lists.input_ids[at] == PENDING:
                sources[at] = self._rows_of_last[entry.request]
        return sources

    def _graph_for(self, schedule: Schedule) -> int | None:
        # what a graph replays passes no adapters
        if self._graphs is None or any(entry.count != 1 or entry.request.adapter for entry in schedule.entries):
            return None
        return self._graphs.padded_size(len(schedule.entries))

    def _tell_about_host(self) -> None:
        if not self._told_about_host:
            self._told_about_host = True
            logger.info(
                "a request asks for logprobs, structured output, min_tokens, penalties or edited logits: tokens of its "
                "steps are chosen on the host, and the next step waits for them"
            )

    # -- on the device ---------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _run(self, step: _Step) -> None:
        staged = self._staged[: step.layout.num_bytes]
        staged.copy_(step.slot.staged[: step.layout.num_bytes], non_blocking=True)
        tables = step.layout.view(staged, "block_tables").view(step.sizes.seqs, step.sizes.width)
        if step.graph_size is not None:
            assert self._graphs is not None
            logits = self._graphs.replay(step.graph_size, tables)
        else:
            if step.has_pending:
                self._feed(step.layout)
            batch = self._batch(step.layout, tables, step.max_query_len, step.max_seq_len, step.adapters)
            logits = self._model.forward(batch).float()
        if step.host_logits is not None:
            step.host_logits.copy_(logits.index_select(0, step.layout.view(staged, "host_rows")), non_blocking=True)
        if (count := len(step.samples)) > 0:
            if step.samples == list(range(count)):
                logits = logits[:count]
            else:
                logits = logits.index_select(0, step.layout.view(staged, "sample_rows"))
            controls = _controls(step.layout, staged) if step.sizes.drawn else None
            self._tokens[:count].copy_(self._choose(logits, controls))
            step.slot.tokens[:count].copy_(self._tokens[:count], non_blocking=True)

    def _feed(self, layout: Layout) -> None:
        """Put the tokens that the last step sampled where this step reads them."""
        sources = layout.view(self._staged, "sources")
        # a row without a token (-1) ends its request; until that is read, it may be any token
        sampled = self._tokens.index_select(0, sources.clamp(min=0)).clamp(min=0)
        input_ids = layout.view(self._staged, "input_ids")
        input_ids.copy_(torch.where(sources == _NOWHERE, input_ids, sampled))

    def _decode(self, layout: Layout, tables: Tensor) -> Tensor:
        """The step that is captured: one new token per sequence, up to the longest context."""
        self._feed(layout)
        return self._model.forward(self._batch(layout, tables, 1, self._capacity.seq_tokens)).float()

    def _batch(
        self,
        layout: Layout,
        tables: Tensor,
        max_query_len: int,
        max_seq_len: int,
        adapters: AdapterRows | None = None,
    ) -> ForwardBatch:
        return ForwardBatch(
            input_ids=layout.view(self._staged, "input_ids"),
            positions=layout.view(self._staged, "positions"),
            slot_mapping=layout.view(self._staged, "slot_mapping"),
            block_tables=tables,
            seq_lens=layout.view(self._staged, "seq_lens"),
            cu_seqlens_q=layout.view(self._staged, "cu_seqlens_q"),
            logits_rows=layout.view(self._staged, "logits_rows"),
            kv=self._kv,
            max_query_len=max_query_len,
            max_seq_len=max_seq_len,
            adapters=adapters,
            state_slots=layout.view(self._staged, "state_slots") if self._has_states else None,
        )

    # -- start-up --------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        for _ in range(3):  # of two launched steps each may raise once
            with contextlib.suppress(Exception):
                self._device.mark()()
                return

    def probe(self) -> None:
        self.execute(self._idle(1, 1))

    def warm_up(self) -> None:
        """Steps of several sizes in the null block and slot 0: kernels are compiled and tuned before any request."""
        capacity = self._capacity
        sizes = [1]
        while sizes[-1] < capacity.tokens:
            sizes.append(min(4 * sizes[-1], capacity.tokens))
        for size in sizes:
            for num_seqs in (1, 2, 16):  # kernels are compiled for 1, for multiples of 16, and for the rest
                if num_seqs <= min(size, capacity.seqs):
                    self.execute(self._idle(size, num_seqs))
        self.execute(self._idle(1, 1, temperature=0.0))

    def capture(self, sizes: Sequence[int], progress: Callable[[float], None]) -> None:
        """From now on, steps that only decode, and no more sequences than the largest of `sizes`, are one launch."""
        capacity = self._capacity
        if self._graphs is None:
            self._graphs = DecodeGraphs(self._device, self._staged, capacity.seqs, self._width, capacity.vocab_size)
        with torch.inference_mode():
            self._graphs.capture(sizes, self._decode, progress)

    def run_largest(self) -> None:
        """The steps that need the most memory: one long sequence, or the most logits. Prompt logprobs may need more."""
        for num_seqs in (1, self._capacity.seqs):
            self.execute(self._idle(self._capacity.tokens, num_seqs))

    def _idle(self, num_tokens: int, num_seqs: int, temperature: float = 1.0) -> Schedule:
        """A step of about `num_tokens` tokens that keeps nothing, in `num_seqs` sequences or as few as hold them."""
        capacity = self._capacity
        count = min(max(1, num_tokens // num_seqs), capacity.seq_tokens)
        entries: list[Scheduled] = []
        params = SamplingParams(temperature=temperature, max_tokens=1)
        while len(entries) < capacity.seqs and count * (len(entries) + 1) <= num_tokens:
            request = Request(Submit("idle", [0] * count, params, 0.0), 0, (), count + 1)
            request.block_ids = [0] * -(-count // self._block_size)
            entries.append(Scheduled(request, 0, count, samples=True))
        return Schedule(tuple(entries))

    # -- its results -----------------------------------------------------------------------------------------------

    def _read(self, step: _Step) -> list[StepResult]:
        """The results of a step whose copies have arrived."""
        entries = step.schedule.entries
        on_host: dict[int, StepResult] = {}
        if step.host_logits is not None:
            # those that ended or were preempted meanwhile are not sampled: what came of it would be dropped
            parts = torch.split(step.host_logits, [len(rows) for rows in step.host.values()])
            wanted = {i: part for i, part in zip(step.host, parts, strict=True) if not entries[i].is_stale}
            made = self._results(
                Schedule(tuple(entries[i] for i in wanted)),
                [step.host[i] for i in wanted],
                step.host_logits if len(wanted) == len(parts) else torch.cat([*wanted.values(), parts[0][:0]]),
            )
            on_host = dict(zip(wanted, made, strict=True))
        tokens = iter(step.slot.tokens[: len(step.samples)].tolist())
        results = []
        for i, entry in enumerate(entries):
            token = next(tokens) if entry.samples else None
            results.append(on_host.get(i) or StepResult(token, finite=token is None or token >= 0))
        return results


def _rounded(width: int) -> int:
    """Blocks per row of the tables: a multiple of 16, since kernels are compiled anew for other widths."""
    return -(-width // 16) * 16


def _needs_host(entry: Scheduled) -> bool:
    request = entry.request
    if request.params.prompt_logprobs is not None and entry.start < request.num_prompt_tokens:
        return True
    return entry.samples and not can_sample(request.sampling, entry.stop - request.num_prompt_tokens)


def _fill_controls(layout: Layout, buffer: npt.NDArray[np.uint8], sampling: Sequence[Scheduled]) -> None:
    params = [entry.request.params for entry in sampling]
    positions = [entry.stop - entry.request.num_prompt_tokens for entry in sampling]
    seeds = [entry.request.sampling.seed for entry in sampling]
    layout.fill(buffer, "uniform", [uniform(seed, at) for seed, at in zip(seeds, positions, strict=True)])
    layout.fill(buffer, "temperature", [p.temperature for p in params])
    layout.fill(buffer, "top_p", [p.top_p for p in params])
    layout.fill(buffer, "min_p", [p.min_p for p in params])
    layout.fill(buffer, "top_k", [min(max(p.top_k, 0), _MOST_TOP_K) for p in params])


def _controls(layout: Layout, staged: Tensor) -> Controls:
    return Controls(**{name: layout.view(staged, name) for name in Controls.__dataclass_fields__})
