"""One step's tensors as one run of bytes: filled on the host, copied in one go, cut into views on the device.

The order and the alignment of the fields depend on their sizes alone, so the part that a captured graph reads lies at
the same addresses in every step of its batch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nvfp4_runtime.engine.scheduler import Schedule

PENDING = -1
ALIGNMENT = 16  # bytes: what kernels compiled for aligned pointers expect


@dataclass(frozen=True)
class StepSizes:
    """How much of each kind a step has.

    tokens   new tokens, T
    seqs     sequences, B
    logits   rows whose logits are computed, R
    samples  rows of these from which a token is chosen
    host     rows of these that the host wants to see
    width    blocks per row of the block tables
    drawn    some token is drawn and not simply the likeliest: the sampler needs its parameters
    """

    tokens: int
    seqs: int
    logits: int
    samples: int
    host: int
    width: int
    drawn: bool = True


@dataclass(frozen=True)
class Layout:
    """Where each field lies: name -> (byte offset, type, count). `num_bytes` in all."""

    fields: dict[str, tuple[int, torch.dtype, int]]
    num_bytes: int

    @classmethod
    def of(cls, sizes: StepSizes) -> Layout:
        """First what a graph of this batch size reads, then what changes from step to step."""
        drawn = sizes.samples if sizes.drawn else 0
        counts: list[tuple[str, torch.dtype, int]] = [
            ("input_ids", torch.int64, sizes.tokens),
            ("positions", torch.int64, sizes.tokens),
            ("slot_mapping", torch.int64, sizes.tokens),
            ("sources", torch.int64, sizes.tokens),
            ("logits_rows", torch.int64, sizes.logits),
            ("state_slots", torch.int64, sizes.seqs),
            ("seq_lens", torch.int32, sizes.seqs),
            ("cu_seqlens_q", torch.int32, sizes.seqs + 1),
            ("block_tables", torch.int32, sizes.seqs * sizes.width),
            ("sample_rows", torch.int64, sizes.samples),
            ("host_rows", torch.int64, sizes.host),
            ("uniform", torch.float64, drawn),
            ("temperature", torch.float64, drawn),
            ("top_p", torch.float32, drawn),
            ("min_p", torch.float32, drawn),
            ("top_k", torch.int32, drawn),
        ]
        fields: dict[str, tuple[int, torch.dtype, int]] = {}
        at = 0
        for name, dtype, count in counts:
            fields[name] = (at, dtype, count)
            at += -(-count * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        return cls(fields, at)

    def view(self, buffer: Tensor, name: str) -> Tensor:
        """The field in `buffer`, uint8 [at least num_bytes]."""
        at, dtype, count = self.fields[name]
        return buffer[at : at + count * dtype.itemsize].view(dtype)

    def fill(self, buffer: npt.NDArray[np.uint8], name: str, values: Sequence[int] | Sequence[float]) -> None:
        """Write a whole field."""
        at, dtype, count = self.fields[name]
        assert len(values) == count, (name, len(values), count)
        buffer[at : at + count * dtype.itemsize].view(_NUMPY[dtype])[:] = values


_NUMPY: dict[torch.dtype, type[np.generic]] = {
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.float64: np.float64,
    torch.float32: np.float32,
}


@dataclass
class StepLists:
    """A step's ragged batch as Python lists; see ForwardBatch for what each holds. tables[i]: blocks of sequence i.

    A token that the step before is still sampling stands as PENDING. Nothing else of its request is scheduled with it,
    since everything before it is computed.
    """

    input_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slot_mapping: list[int] = field(default_factory=list)
    logits_rows: list[int] = field(default_factory=list)
    seq_lens: list[int] = field(default_factory=list)
    cu_seqlens: list[int] = field(default_factory=lambda: [0])
    state_slots: list[int] = field(default_factory=list)
    tables: list[list[int]] = field(default_factory=list)

    @classmethod
    def of(cls, schedule: Schedule, rows: Sequence[range], block_size: int) -> StepLists:
        """`rows[i]`: which of entry i's new tokens want logits, counted from its first."""
        lists = cls()
        ids, positions, slots = lists.input_ids, lists.positions, lists.slot_mapping
        for entry, wanted in zip(schedule.entries, rows, strict=True):
            request, start, stop = entry.request, entry.start, entry.stop
            lists.logits_rows.extend(len(ids) + row for row in wanted)
            ids.extend(request.tokens[start:stop] or [PENDING])
            positions.extend(range(start, stop))
            blocks = request.block_ids
            slots.extend(blocks[p // block_size] * block_size + p % block_size for p in range(start, stop))
            lists.seq_lens.append(stop)
            lists.cu_seqlens.append(len(ids))
            lists.state_slots.append(request.state_slot)
            lists.tables.append(blocks[: -(-stop // block_size)])
        return lists

    @property
    def width(self) -> int:
        return max(len(table) for table in self.tables)

    def padded_tables(self, width: int) -> list[int]:
        """All tables in a row, each filled up to `width` with the null block."""
        return [block for t in self.tables for block in (*t, *([0] * (width - len(t))))]

    def fill(self, layout: Layout, buffer: npt.NDArray[np.uint8], width: int) -> None:
        """Write every list into its field; the layout's sizes are these lists', with tables `width` wide."""
        layout.fill(buffer, "input_ids", self.input_ids)
        layout.fill(buffer, "positions", self.positions)
        layout.fill(buffer, "slot_mapping", self.slot_mapping)
        layout.fill(buffer, "logits_rows", self.logits_rows)
        layout.fill(buffer, "seq_lens", self.seq_lens)
        layout.fill(buffer, "cu_seqlens_q", self.cu_seqlens)
        layout.fill(buffer, "state_slots", self.state_slots)
        layout.fill(buffer, "block_tables", self.padded_tables(width))

    def pad_decodes(self, batch_size: int) -> None:
        """Sequences of one token up to `batch_size`, which write to the null block and to slot 0, and whose logits
        nobody reads."""
        for _ in range(batch_size - len(self.seq_lens)):
            self.logits_rows.append(len(self.input_ids))
            self.input_ids.append(0)
            self.positions.append(0)
            self.slot_mapping.append(0)
            self.seq_lens.append(1)
            self.cu_seqlens.append(len(self.input_ids))
            self.state_slots.append(0)
            self.tables.append([0])
