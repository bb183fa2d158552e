"""TorchTeam: the processes of one tensor-parallel engine over torch.distributed; gloo between CPUs, NCCL between GPUs.

Nothing is pickled: what crosses is numbers in tensors. On one host ranks find each other through a file that only this
user can read, and gloo listens on 127.0.0.1. Where others start the ranks, rank 0's store listens on the one address it
was given. Neither gloo, NCCL nor the store asks who connects: keep strangers off that network.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

from nvfp4_runtime.config import ParallelConfig
from nvfp4_runtime.errors import ConfigError, EngineDeadError
from nvfp4_runtime.parallel import FLAG

dist: Any = torch.distributed  # what is used of it here has no types in its stubs

LOOPBACK = "127.0.0.1"
MEET_TIMEOUT = timedelta(minutes=30)  # whoever starts us gives up sooner
# A rank that died closes its connections, which is noticed at once; one that hangs is the supervisor's affair.
NEVER = timedelta(days=1000)
_INLINE = 1024  # numbers that one message holds; a longer one is sent in two


class _Collectives(Protocol):
    """What is used of torch's process groups."""

    def allgather(self, into: list[list[Tensor]], values: list[Tensor]) -> Any: ...

    def gather(self, into: list[list[Tensor]], values: list[Tensor], options: Any) -> Any: ...

    def broadcast(self, values: list[Tensor], options: Any) -> Any: ...

    def recv(self, into: list[Tensor], rank: int, tag: int) -> Any: ...


class TorchTeam:
    """See parallel.Team. Beside that, rank 0 tells the others what to do.

    device  where `sum` and `join` find their tensors
    """

    def __init__(self, parallel: ParallelConfig, store: Any, host: str, device: torch.device) -> None:
        self.rank, self.size = parallel.rank, parallel.size
        self._told = self._gloo("told", store, host)
        self._alive = self._gloo("alive", store, host)
        self._data = self._gloo("data", store, host) if device.type == "cpu" else self._nccl(store, device)
        self.exchange(0)  # all are here

    @classmethod
    def on_this_host(cls, parallel: ParallelConfig, file: Path, device: torch.device) -> TorchTeam:
        """`file`: the same new file for all ranks."""
        return cls(parallel, dist.FileStore(str(file), parallel.size), LOOPBACK, device)

    @classmethod
    def across_hosts(cls, parallel: ParallelConfig, device: torch.device) -> TorchTeam:
        """Meet at parallel.address, where rank 0 listens, or torchrun. ConfigError when it cannot, or nobody does."""
        host, port = parallel.address, parallel.port
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listening = None
            if (
                parallel.rank == 0 and parallel.attempt is None
            ):  # ours, since a TCPStore of its own would listen on every address
                listening = socket.socket(family, socket.SOCK_STREAM)
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listening.bind(address)
                listening.listen(128)
            store = dist.TCPStore(
                host,
                port,
                parallel.size,
                is_master=listening is not None,
                timeout=MEET_TIMEOUT,
                master_listen_fd=None if listening is None else listening.detach(),
            )
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(address)  # sends nothing; tells which of our addresses leads there
                own = probe.getsockname()[0]
        except (OSError, RuntimeError) as error:
            raise ConfigError(f"{FLAG}: the ranks cannot meet at {host}:{port}: {error}", FLAG) from error
        return cls(parallel, dist.PrefixStore(f"nvfp4/{parallel.attempt or 0}", store), own, device)

    # -- arithmetic ----------------------------------------------------------------------------------------------

    def sum(self, x: Tensor) -> Tensor:
        """Each rank gets all partial results and adds them itself, in one order: a ring's would depend on the place
        of a value in the batch."""
        x = x.contiguous()
        parts = x.new_empty(self.size, *x.shape)
        self._data.allgather([list(parts.unbind(0))], [x]).wait()
        total = parts[0].to(torch.float32)
        for part in parts[1:]:
            total = total + part
        return total.to(x.dtype)

    def join(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        widest = max(widths)
        if x.shape[1] < widest:  # all send as much
            x = torch.nn.functional.pad(x, (0, widest - x.shape[1]))
        x = x.contiguous()
        if self.rank != 0:
            self._data.gather([], [x], _to_first()).wait()
            return x
        parts = list(x.new_empty(self.size, *x.shape).unbind(0))
        self._data.gather([parts], [x], _to_first()).wait()
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

    # -- what to do ----------------------------------------------------------------------------------------------

    def tell(self, numbers: Tensor) -> None:
        """Rank 0: send int64 `numbers` to all others."""
        count = len(numbers)
        first = torch.zeros(_INLINE, dtype=torch.int64)
        first[0] = count
        inline = min(count, _INLINE - 1)
        first[1 : 1 + inline] = numbers[:inline]
        self._broadcast(first)
        if count > inline:
            self._broadcast(numbers[inline:].contiguous())

    def hear(self) -> Tensor:
        """The others: what rank 0 tells next, however long that takes. EngineDeadError when it is gone."""
        first = torch.zeros(_INLINE, dtype=torch.int64)
        try:
            self._broadcast(first)
            count = int(first[0])
            inline = min(count, _INLINE - 1)
            if count == inline:
                return first[1 : 1 + count]
            rest = torch.zeros(count - inline, dtype=torch.int64)
            self._broadcast(rest)
        except RuntimeError as error:
            raise EngineDeadError(f"rank 0 is gone: {_first_line(error)}") from error
        return torch.cat([first[1:], rest])

    def exchange(self, number: int) -> list[int]:
        """Every rank's number."""
        found = torch.zeros(self.size, dtype=torch.int64)
        self._told.allgather([list(torch.split(found, 1))], [torch.tensor([number])]).wait()
        return [int(each) for each in found]

    def watch(self, ended: Callable[[int, str], None]) -> None:
        """Rank 0: from now on, threads call `ended(rank, how)` when a rank's connection closes."""

        def wait_for(rank: int) -> None:
            try:
                self._alive.recv([torch.zeros(1)], rank, 0).wait()  # nobody ever sends
            except RuntimeError as error:
                ended(rank, _first_line(error))

        for rank in range(1, self.size):
            threading.Thread(target=wait_for, args=(rank,), daemon=True, name=f"watch rank {rank}").start()

    def _broadcast(self, numbers: Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._told.broadcast([numbers], options).wait()

    def _gloo(self, name: str, store: Any, host: str) -> _Collectives:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = NEVER
        made: _Collectives = dist.ProcessGroupGloo(dist.PrefixStore(name, store), self.rank, self.size, options)
        return made

    def _nccl(self, store: Any, device: torch.device) -> _Collectives:
        torch.cuda.set_device(device)
        made: _Collectives = dist.ProcessGroupNCCL(
            dist.PrefixStore("data", store), self.rank, self.size, dist.ProcessGroupNCCL.Options()
        )
        return made


def _to_first() -> Any:
    options = dist.GatherOptions()
    options.rootRank = 0
    return options


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
