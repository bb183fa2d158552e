"""ModelRunner: a schedule becomes a ForwardBatch, the model's logits, and sampled tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nvfp4_runtime.batch import AdapterRows, CacheLayer, ForwardBatch, StateLayer
from nvfp4_runtime.engine.messages import TokenLogprob
from nvfp4_runtime.engine.scheduler import Schedule, Scheduled, StepResult
from nvfp4_runtime.engine.staging import StepLists
from nvfp4_runtime.engine.step_clock import StepClock
from nvfp4_runtime.sampling.masks import Masks
from nvfp4_runtime.sampling.sampler import BatchSampler, prompt_logprobs
from nvfp4_runtime.sampling.state import Logprob

NULL_SLOT = 0


class Model(Protocol):
    def forward(self, batch: ForwardBatch) -> Tensor:
        """float32 logits [R, V] of `batch.logits_rows`."""
        ...

    def hidden(self, batch: ForwardBatch) -> Tensor:
        """What enters the head: hidden states [R, hidden_size] of `batch.logits_rows`, after the final norm."""
        ...


class ModelRunner:
    """The executor over a real model. Holds the KV tensors and nothing about any request.

    `adapters`: names of the loaded LoRA adapters, in the order in which the model's layers hold them.
    `clock` laps the parts of `execute`: prepare, model, sample.
    """

    def __init__(
        self,
        model: Model,
        kv: tuple[CacheLayer, ...],
        sampler: BatchSampler,
        adapters: Sequence[str] = (),
        clock: StepClock | None = None,
    ) -> None:
        self._model = model
        self._clock = clock or StepClock()
        self._adapters = {name: i for i, name in enumerate(adapters)}
        self._kv = kv
        self._sampler = sampler
        self._block_size = next(layer.block_size for layer in kv if not isinstance(layer, StateLayer))
        self._has_states = any(isinstance(layer, StateLayer) for layer in kv)
        self._torch_device = kv[0].device

    @torch.inference_mode()
    def execute(self, schedule: Schedule) -> list[StepResult]:
        """Run the model once over all entries, then sample for those that reached their last token.

        Entries that only want hidden states (pooling) are a batch of their own.
        """
        if any(entry.request.pooling is not None for entry in schedule.entries):
            return self._execute_apart(schedule)
        rows = [wanted_rows(entry) for entry in schedule.entries]
        masks = self._sampler.begin([entry.request.sampling for entry in schedule.entries if entry.samples])
        batch = self.prepare(schedule, rows)
        self._clock.lap("prepare")
        logits = self._model.forward(batch)
        self._clock.lap("model")
        results = self._results(schedule, rows, logits, masks)
        self._clock.lap("sample")
        return results

    def _execute_apart(self, schedule: Schedule) -> list[StepResult]:
        results: dict[int, StepResult] = {}
        for run, pooled in ((self.execute, False), (self._pool, True)):
            chosen = [i for i, e in enumerate(schedule.entries) if (e.request.pooling is not None) is pooled]
            part = Schedule(tuple(schedule.entries[i] for i in chosen))
            results |= zip(chosen, run(part) if chosen else [], strict=True)
        return [results[i] for i in range(len(schedule.entries))]

    def _pool(self, schedule: Schedule) -> list[StepResult]:
        rows = [range(0 if e.request.pooling == "mean" else e.count - 1, e.count) for e in schedule.entries]
        hidden = self._model.hidden(self.prepare(schedule, rows)).float().cpu()
        sums = [part.sum(dim=0) for part in torch.split(hidden, [len(wanted) for wanted in rows])]
        return [StepResult(None, finite=bool(each.isfinite().all()), hidden_sum=each.numpy()) for each in sums]

    @torch.inference_mode()
    def logits(self, schedule: Schedule, rows: Sequence[range]) -> Tensor:
        """float32 logits [R, V] of the chosen rows (see `prepare`), before any sampling."""
        return self._model.forward(self.prepare(schedule, rows))

    def prepare(self, schedule: Schedule, rows: Sequence[range]) -> ForwardBatch:
        """The tensors of one step. `rows[i]`: which of entry i's new tokens want logits, counted from its first."""
        lists = StepLists.of(schedule, rows, self._block_size)
        width, num_seqs, count = lists.width, len(lists.seq_lens), len(lists.input_ids)
        # two tensors, cut up: making one costs more than a view, and after a step's weights no cache line is warm
        values = lists.input_ids + lists.positions + lists.slot_mapping + lists.logits_rows
        wide = torch.from_numpy(np.array(values, dtype=np.int64))
        values = lists.seq_lens + lists.cu_seqlens + lists.padded_tables(width)
        narrow = torch.from_numpy(np.array(values, dtype=np.int32))
        if self._torch_device.type != "cpu":
            wide, narrow = wide.to(self._torch_device), narrow.to(self._torch_device)
        input_ids, position, slots, logits_row = torch.split(wide, [count, count, count, len(lists.logits_rows)])
        lengths, bounds, table = torch.split(narrow, [num_seqs, num_seqs + 1, width * num_seqs])
        return ForwardBatch(
            input_ids=input_ids,
            positions=position,
            slot_mapping=slots,
            block_tables=table.view(num_seqs, width),
            seq_lens=lengths,
            cu_seqlens_q=bounds,
            logits_rows=logits_row,
            kv=self._kv,
            max_query_len=max(entry.count for entry in schedule.entries),
            max_seq_len=max(lists.seq_lens),
            adapters=self.adapter_rows(schedule),
            state_slots=self._placed_slots(lists.state_slots) if self._has_states else None,
        )

    def _placed_slots(self, slots: Sequence[int]) -> Tensor:
        return torch.tensor(slots, dtype=torch.int64, device=self._torch_device)

    def adapter_rows(self, schedule: Schedule) -> AdapterRows | None:
        """Which of the step's new tokens pass which adapter; None for a step without."""
        if not any(entry.request.adapter for entry in schedule.entries):
            return None
        found = [self._adapters.get(e.request.adapter, -1) for e in schedule.entries for _ in range(e.count)]
        return AdapterRows.of(found, len(self._adapters), self._torch_device)

    def _results(
        self, schedule: Schedule, rows: Sequence[range], logits: Tensor, masks: Masks | None = None
    ) -> list[StepResult]:
        offsets = [0]
        for wanted in rows:
            offsets.append(offsets[-1] + len(wanted))
        sampling = [i for i, entry in enumerate(schedule.entries) if entry.samples]
        last_rows = [offsets[i + 1] - 1 for i in sampling]
        picked = logits if last_rows == list(range(offsets[-1])) else logits[last_rows]
        states = [schedule.entries[i].request.sampling for i in sampling]
        sampled = dict(zip(sampling, self._sampler.sample(picked, states, masks), strict=True)) if sampling else {}
        results = []
        for i, entry in enumerate(schedule.entries):
            scores, finite = None, True
            if entry.request.params.prompt_logprobs is not None:
                scores, finite = _prompt_scores(entry, logits[offsets[i] : offsets[i + 1]])
            if i in sampled:
                choice = sampled[i]
                logprob = None if choice.logprob is None else _to_wire(choice.logprob)
                results.append(StepResult(choice.token_id, logprob, scores, choice.finite and finite, choice.error))
            else:
                results.append(StepResult(None, None, scores, finite))
        return results

    def probe(self) -> None:
        """One token that keeps nothing. Raises when the device cannot compute any more."""
        self.warm_up()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """One token into the null block: thread pools start and lazy set-up happens before the first request."""
        self._model.forward(
            ForwardBatch(
                input_ids=torch.zeros(1, dtype=torch.int64, device=self._torch_device),
                positions=torch.zeros(1, dtype=torch.int64, device=self._torch_device),
                slot_mapping=torch.tensor([NULL_SLOT], device=self._torch_device),
                block_tables=torch.zeros(1, 1, dtype=torch.int32, device=self._torch_device),
                seq_lens=torch.ones(1, dtype=torch.int32, device=self._torch_device),
                cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32, device=self._torch_device),
                logits_rows=torch.zeros(1, dtype=torch.int64, device=self._torch_device),
                kv=self._kv,
                max_query_len=1,
                max_seq_len=1,
                state_slots=self._placed_slots([0]) if self._has_states else None,
            )
        )


def wanted_rows(entry: Scheduled) -> range:
    """Which new tokens' logits are needed: the last if the entry samples; all that precede a prompt token if scored."""
    if entry.request.params.prompt_logprobs is None:
        return range(entry.count - 1, entry.count) if entry.samples else range(0)
    first = 0 if entry.start < entry.request.num_prompt_tokens - 1 else entry.count - 1
    stop = entry.count if entry.samples else min(entry.count, entry.request.num_prompt_tokens - 1 - entry.start)
    return range(first, max(stop, first))


def _prompt_scores(entry: Scheduled, logits: Tensor) -> tuple[list[TokenLogprob] | None, bool]:
    """Scores of the prompt tokens this entry predicts, and whether all its logits were finite."""
    request = entry.request
    k = request.params.prompt_logprobs
    if k is None or entry.start >= request.num_prompt_tokens:
        return None, True
    targets = request.tokens[entry.start + 1 : min(entry.stop + 1, request.num_prompt_tokens)]
    scores = [s for s in prompt_logprobs(logits[: len(targets)], targets, k) if s is not None]
    return [_to_wire(score) for score in scores], len(scores) == len(targets)


def _to_wire(logprob: Logprob) -> TokenLogprob:
    return TokenLogprob(logprob.token_id, logprob.logprob, logprob.rank, logprob.top)
