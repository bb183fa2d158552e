"""Captured decode steps: which sizes there are, and that one launch of fixed memory is every step of its size."""

from __future__ import annotations

import pytest
import torch

from nvfp4_runtime.engine.device_runner import Capacity, DeviceRunner
from nvfp4_runtime.engine.graphs import capture_sizes
from nvfp4_runtime.sampling.on_device import TorchSampler
from nvfp4_runtime.sampling.sampler import BatchSampler
from tests.engine.twin import HashModel, TwinDevice


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (1, [1]),
        (2, [1, 2]),
        (3, [1, 2, 3]),
        (8, [1, 2, 4, 8]),
        (20, [1, 2, 4, 8, 16, 20]),
        (32, [1, 2, 4, 8, 16, 24, 32]),
    ],
)
def test_sizes_rise_and_end_with_the_most(most: int, sizes: list[int]) -> None:
    assert capture_sizes(most) == sizes


def test_no_more_than_seven_rows_are_padding() -> None:
    sizes = capture_sizes(256)
    assert len(sizes) == 35
    waste = [min(size for size in sizes if size >= n) - n for n in range(1, 257)]
    assert max(waste) <= 7


def runner(device: TwinDevice, seqs: int = 20) -> tuple[DeviceRunner, HashModel]:
    model = HashModel(vocab_size=50)
    kv = model.cache(9, 4)
    return DeviceRunner(model, kv, BatchSampler(), device, TorchSampler(), Capacity(64, seqs, 32, 50)), model


def test_the_largest_is_captured_first_and_each_ran_before() -> None:
    device, progress = TwinDevice(), []
    made, model = runner(device)
    order: list[int] = []
    forward = model.forward

    def noting(batch):  # type: ignore[no-untyped-def]  # as forward
        order.append(len(batch.seq_lens))
        return forward(batch)

    model.forward = noting  # type: ignore[method-assign]
    made.capture(capture_sizes(20), progress.append)
    assert order == [size for size in (20, 16, 8, 4, 2, 1) for _ in range(2)]
    assert device.num_captured == 6
    assert progress == pytest.approx([(i + 1) / 6 for i in range(6)])


def test_capturing_more_keeps_what_was_captured() -> None:
    device = TwinDevice()
    made, _ = runner(device)
    made.capture([20], lambda _: None)
    made.capture([16], lambda _: None)
    assert made._graphs is not None
    assert made._graphs.sizes == [16, 20]
    assert [made._graphs.padded_size(n) for n in (1, 16, 17, 20, 21)] == [16, 16, 20, 20, None]


def test_a_captured_step_reads_the_same_memory_every_time() -> None:
    device = TwinDevice()
    made, model = runner(device, seqs=2)
    seen = []
    forward = model.forward

    def noting(batch):  # type: ignore[no-untyped-def]  # as forward
        fields = ("input_ids", "positions", "slot_mapping", "block_tables", "seq_lens", "cu_seqlens_q", "logits_rows")
        seen.append([getattr(batch, name).data_ptr() for name in fields])
        return forward(batch)

    made.capture([2], lambda _: None)
    model.forward = noting  # type: ignore[method-assign]
    for _ in range(3):
        made.execute(made._idle(1, 1))
    assert device.num_replayed == 3
    assert seen[0] == seen[1] == seen[2]
    assert torch.isfinite(made._kv[0].k).all()


def test_warming_up_meets_small_and_large_steps_and_keeps_nothing() -> None:
    made, model = runner(TwinDevice())
    before = [layer.k[1:].clone() for layer in made._kv]
    sizes = []
    forward = model.forward

    def noting(batch):  # type: ignore[no-untyped-def]  # as forward
        sizes.append((len(batch.input_ids), len(batch.seq_lens)))
        return forward(batch)

    model.forward = noting  # type: ignore[method-assign]
    made.warm_up()
    assert sizes == [(1, 1), (4, 1), (4, 2), (16, 1), (16, 2), (16, 16), (64, 2), (64, 2), (64, 16), (1, 1)]
    assert all(torch.equal(layer.k[1:], old) for layer, old in zip(made._kv, before, strict=True))


def test_memory_is_measured_on_the_longest_sequence_and_on_the_most_logits() -> None:
    made, model = runner(TwinDevice(), seqs=6)
    sizes = []
    forward = model.forward

    def noting(batch):  # type: ignore[no-untyped-def]  # as forward
        sizes.append((len(batch.input_ids), len(batch.logits_rows), batch.max_query_len))
        return forward(batch)

    model.forward = noting  # type: ignore[method-assign]
    made.run_largest()
    assert sizes == [(64, 2, 32), (60, 6, 10)]
