"""Leader: the model as rank 0's runner sees it. Each step goes to the other ranks, then everybody runs it.

A step is numbers: what is asked for, the sizes, and the batch's tensors one behind the other. Caches stay where they
are: each rank has its own part of every layer's, under the same block ids and slots.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from nvfp4_runtime.batch import CacheLayer, ForwardBatch
from nvfp4_runtime.engine.runner import Model
from nvfp4_runtime.engine.team import TorchTeam
from nvfp4_runtime.errors import EngineDeadError

logger = logging.getLogger(__name__)

STOP, LOGITS, HIDDEN = 0, 1, 2
_HEADER = 8  # what, tokens, sequences, blocks per table, rows of logits, the two maxima, whether there are state slots


class Leader:
    """A Model over this rank's model and its mates'."""

    def __init__(self, model: Model, team: TorchTeam) -> None:
        self._model, self._team = model, team

    def forward(self, batch: ForwardBatch) -> Tensor:
        return self._together(LOGITS, batch, self._model.forward)

    def hidden(self, batch: ForwardBatch) -> Tensor:
        return self._together(HIDDEN, batch, self._model.hidden)

    def stop(self) -> None:
        """The others end."""
        try:
            self._team.tell(torch.tensor([STOP]))
        except RuntimeError as error:
            logger.debug("the other ranks were gone already: %s", error)

    def _together(self, what: int, batch: ForwardBatch, run: Callable[[ForwardBatch], Tensor]) -> Tensor:
        """Ranks that stopped in different places of a step cannot go on together: whatever is raised is the end."""
        try:
            self._team.tell(pack(what, batch))
            return run(batch)
        except Exception as error:
            raise EngineDeadError(f"a step failed on rank 0 of {self._team.size}: {error}") from error


def follow(model: Model, team: TorchTeam, kv: tuple[CacheLayer, ...], device: torch.device) -> None:
    """Run what rank 0 tells, until it says that it is enough. EngineDeadError when it is gone without a word."""
    while True:
        numbers = team.hear()
        what = int(numbers[0])
        if what == STOP:
            return
        batch = unpack(numbers, kv, device)
        with torch.inference_mode():
            if what == HIDDEN:
                model.hidden(batch)
            else:
                model.forward(batch)


def pack(what: int, batch: ForwardBatch) -> Tensor:
    """int64, on the CPU."""
    assert batch.adapters is None, "adapters are refused at start"
    assert batch.max_query_len is not None
    assert batch.max_seq_len is not None
    slots = batch.state_slots
    header = [
        what,
        len(batch.input_ids),
        *batch.block_tables.shape,
        len(batch.logits_rows),
        batch.max_query_len,
        batch.max_seq_len,
        slots is not None,
    ]
    parts = [
        torch.tensor(header, dtype=torch.int64),
        batch.input_ids,
        batch.positions,
        batch.slot_mapping,
        batch.logits_rows,
        batch.seq_lens,
        batch.cu_seqlens_q,
        batch.block_tables.flatten(),
        *([] if slots is None else [slots]),
    ]
    return torch.cat([part.to("cpu", torch.int64) for part in parts])


def unpack(numbers: Tensor, kv: tuple[CacheLayer, ...], device: torch.device) -> ForwardBatch:
    _, tokens, seqs, width, rows, max_query_len, max_seq_len, has_slots = numbers[:_HEADER].tolist()
    sizes = [tokens, tokens, tokens, rows, seqs, seqs + 1, seqs * width, seqs * has_slots]
    ids, positions, slots, logits, lengths, bounds, tables, states = torch.split(numbers[_HEADER:], sizes)
    narrow = [part.to(device, torch.int32) for part in (tables.view(seqs, width), lengths, bounds)]
    return ForwardBatch(
        input_ids=ids.to(device),
        positions=positions.to(device),
        slot_mapping=slots.to(device),
        block_tables=narrow[0],
        seq_lens=narrow[1],
        cu_seqlens_q=narrow[2],
        logits_rows=logits.to(device),
        kv=kv,
        max_query_len=max_query_len,
        max_seq_len=max_seq_len,
        state_slots=states if has_slots else None,
    )
