"""Which device a model runs on, and the little that a runner needs of one: order, marks, graphs, pinned memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from nvfp4_runtime.config import DeviceName
from nvfp4_runtime.errors import ConfigError

# Backends that run on one kind of device only. The reference runs on both.
HOME = {"cpu": "cpu", "triton": "cuda", "blackwell": "cuda"}


class Device(Protocol):
    """Work is done in the order in which it was submitted, later than `submit` returns; only a mark's call waits.

    What `submit` is given must not look at anything the host changes meanwhile.
    """

    torch_device: torch.device

    def pinned(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] of host memory that copies from and to the device need not stage."""
        ...

    def submit(self, work: Callable[[], None]) -> None: ...

    def mark(self) -> Callable[[], None]:
        """A call that returns when everything submitted before the mark is done."""
        ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """`work`, which ran before, as one launch: later calls do the same to the same memory, whatever it holds."""
        ...


class CudaDevice:
    """PyTorch's current stream of one GPU. All graphs share a memory pool: capture the largest first."""

    def __init__(self, torch_device: torch.device) -> None:
        self.torch_device = torch_device
        self._pool = torch.cuda.graph_pool_handle()

    def pinned(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)  # from PyTorch's cache of pinned blocks

    def submit(self, work: Callable[[], None]) -> None:
        work()  # every operation of it is queued on the stream

    def mark(self) -> Callable[[], None]:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # PyTorch's
        event.record()
        return event.synchronize

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        return graph.replay


def resolve_device(asked: DeviceName, backend: str, index: int = 0) -> torch.device:
    """The device of `--device` and `--backend`: auto is a GPU if PyTorch can use one, else the CPU. `index`: of GPUs.

    Raises ConfigError when the two contradict each other, or a GPU was asked for and there is none.
    """
    home = HOME.get(backend)
    if home is not None and asked not in ("auto", home):
        raise ConfigError(
            f"--backend {backend} runs on {home}, and --device {asked} was asked for; leave one of them out", "--device"
        )
    wanted = home or asked
    if wanted == "cpu":
        return torch.device("cpu")
    reason = why_no_gpu()
    if reason is None:
        if index and index >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {index} of this host needs a GPU of its own; there are {torch.cuda.device_count()}"
            )
        return torch.device("cuda", index)
    if wanted == "auto":
        return torch.device("cpu")
    flag = "--device" if asked == "cuda" else "--backend"
    value = asked if asked == "cuda" else backend
    raise ConfigError(f"{flag} {value} needs a GPU: {reason}; use --device cpu, or a machine that has one", flag)


def why_no_gpu() -> str | None:
    """Why PyTorch cannot run anything on a GPU here, or None: it can."""
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} was built without CUDA (install a CUDA build of torch)"
    if not torch.cuda.is_available():
        return "PyTorch sees no NVIDIA GPU (check nvidia-smi, the driver and CUDA_VISIBLE_DEVICES)"
    try:
        torch.ones(1, device="cuda").sum().item()
    except RuntimeError as error:  # an architecture this PyTorch has no kernels for, a GPU in a broken state, no memory
        return f"{torch.cuda.get_device_name(0)} cannot run PyTorch's kernels: {str(error).splitlines()[0]}"
    return None


def describe(device: torch.device) -> str:
    """The device in words, for the start-up screen and /version."""
    if device.type == "cpu":
        return "cpu"
    facts = torch.cuda.get_device_properties(device)
    memory = facts.total_memory / 2**30
    return f"{device}: {facts.name}, sm_{facts.major}{facts.minor}, {memory:.0f} GiB"
