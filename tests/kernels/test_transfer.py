"""Weights reach a device whole, piece by piece, through two buffers that are never written while they are read."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nvfp4_runtime.kernels.transfer import Uploader, finish_transfers, to_device


class LazyLink:
    """Copies only when somebody waits for it, so that a buffer reused too early would arrive changed."""

    def __init__(self) -> None:
        self.num_pinned = 0
        self.waiting: deque[tuple[Tensor, Tensor]] = deque()
        self.most_waiting = 0

    def pinned(self, num_bytes: int) -> Tensor:
        self.num_pinned += 1
        return torch.empty(num_bytes, dtype=torch.uint8)

    def copy(self, target: Tensor, source: Tensor) -> Callable[[], None]:
        entry = (target, source)
        self.waiting.append(entry)
        self.most_waiting = max(self.most_waiting, len(self.waiting))

        def wait() -> None:
            while any(entry is other for other in self.waiting):
                arrived, sent = self.waiting.popleft()
                arrived.copy_(sent)

        return wait


@pytest.mark.parametrize("num_bytes", [0, 1, 99, 100, 101, 1000, 1234])
def test_every_byte_arrives_through_two_buffers(num_bytes: int) -> None:
    link = LazyLink()
    uploader = Uploader(torch.device("cpu"), link, chunk_bytes=100)
    source = torch.arange(num_bytes, dtype=torch.int64).to(torch.uint8)
    first, second = uploader(source), uploader(source.flip(0))
    uploader.close()
    assert torch.equal(first, source)
    assert torch.equal(second, source.flip(0))
    assert uploader.num_bytes == 2 * num_bytes
    assert link.num_pinned == (2 if num_bytes else 0)
    assert link.most_waiting <= 2
    assert not link.waiting


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.int64])
def test_types_shapes_and_strides_survive(dtype: torch.dtype) -> None:
    uploader = Uploader(torch.device("cpu"), LazyLink(), chunk_bytes=64)
    source = torch.arange(120).to(torch.float32).view(10, 12).to(dtype)[:, ::3]
    found = uploader(source)
    uploader.close()
    assert (found.dtype, found.shape, found.is_contiguous()) == (dtype, source.shape, True)
    assert torch.equal(found.to(torch.float32), source.to(torch.float32))


def test_a_scalar_arrives() -> None:
    uploader = Uploader(torch.device("cpu"), LazyLink())
    found = uploader(torch.tensor(2.5))
    uploader.close()
    assert found.shape == ()
    assert found.item() == 2.5


def test_on_the_cpu_tensors_stay_what_they_are() -> None:
    tensor = torch.ones(3)
    assert to_device(tensor, torch.device("cpu")) is tensor
    assert finish_transfers(torch.device("cpu")) == (0, 0.0)


@pytest.mark.gpu
def test_a_gpu_gets_what_the_host_has() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda", 0)
    source = torch.randn(3000, 7001)  # 84 MB: three pieces
    found = to_device(source, device)
    num_bytes, seconds = finish_transfers(device)
    assert torch.equal(found.cpu(), source)
    assert num_bytes == source.nbytes
    assert seconds > 0
