"""One run of bytes per step: fields lie apart, aligned, and where a captured launch of that size looks for them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nvfp4_runtime.engine.staging import ALIGNMENT, Layout, StepLists, StepSizes

SIZES = StepSizes(tokens=7, seqs=3, logits=5, samples=2, host=1, width=4)


def test_fields_are_aligned_and_do_not_overlap() -> None:
    layout = Layout.of(SIZES)
    buffer = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    for number, (name, (at, dtype, count)) in enumerate(layout.fields.items(), start=1):
        assert at % ALIGNMENT == 0
        layout.fill(buffer.numpy(), name, [number] * count)
        assert layout.view(buffer, name).dtype == dtype
    for number, (name, (_, _, count)) in enumerate(layout.fields.items(), start=1):
        assert layout.view(buffer, name).tolist() == [number] * count


def test_what_a_captured_launch_reads_does_not_move_with_the_rest_of_the_step() -> None:
    read = ("input_ids", "positions", "slot_mapping", "sources", "logits_rows")
    read += ("seq_lens", "cu_seqlens_q", "state_slots")
    layout = Layout.of(SIZES)
    other = Layout.of(dataclasses.replace(SIZES, samples=0, host=9, width=70, drawn=False))
    assert {name: layout.fields[name] for name in read} == {name: other.fields[name] for name in read}


def test_a_larger_step_needs_no_less_room() -> None:
    for name in ("tokens", "seqs", "logits", "samples", "host", "width"):
        larger = dataclasses.replace(SIZES, **{name: getattr(SIZES, name) + 5})
        assert Layout.of(larger).num_bytes > Layout.of(SIZES).num_bytes


def test_a_field_takes_exactly_its_count() -> None:
    layout = Layout.of(SIZES)
    with pytest.raises(AssertionError, match="seq_lens"):
        layout.fill(torch.zeros(layout.num_bytes, dtype=torch.uint8).numpy(), "seq_lens", [1, 2])


def test_padding_rows_write_to_the_null_block_and_to_slot_0_and_see_one_token() -> None:
    lists = StepLists([5, 6], [8, 3], [40, 19], [0, 1], [9, 4], [0, 1, 2], [7, 2], [[10, 11, 12], [4]])
    lists.pad_decodes(4)
    assert lists.input_ids == [5, 6, 0, 0]
    assert lists.positions == [8, 3, 0, 0]
    assert lists.slot_mapping == [40, 19, 0, 0]
    assert lists.seq_lens == [9, 4, 1, 1]
    assert lists.cu_seqlens == [0, 1, 2, 3, 4]
    assert lists.logits_rows == [0, 1, 2, 3]
    assert lists.state_slots == [7, 2, 0, 0]
    assert lists.padded_tables(3) == [10, 11, 12, 4, 0, 0, 0, 0, 0, 0, 0, 0]
