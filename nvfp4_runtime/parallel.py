"""Tensor parallelism: which part of a layer a process holds, and what the processes of a team do together. Torch-free.

Every rank runs the same steps on its part: query heads with their keys and values, rows of the first and columns of
the second matrix of a feed-forward, whole experts, rows of the head. What ranks give for one output is partial, and is
added up in the order of the ranks, whatever the batch: sums have the same bits on every rank, and in every company.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from nvfp4_runtime.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

FLAG = "--tensor-parallel-size"
BLOCK = 16  # columns under one NVFP4 block scale: a cut never goes through one
_UNITS = (128, 64, 32, BLOCK)  # what a cut of columns is a multiple of: tiles like large ones, FP8 blocks need 128


class Team(Protocol):
    """This process among those that share a model's layers. All ranks make the same calls in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`, in the order of the ranks, the same bits on each."""
        ...

    def join(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """On rank 0 all ranks' `x` [R, widths[rank]] side by side; elsewhere, where nobody reads it, `x`."""
        ...


@dataclass(frozen=True)
class Alone:
    """The team of a process that holds whole layers."""

    rank: int = 0
    size: int = 1

    def sum(self, x: Tensor) -> Tensor:
        return x

    def join(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        return x


def share(total: int, team: Team, what: str, rank: int | None = None) -> range:
    """The run of `total` things that `rank` (None: this process) holds: as equal as can be, the first ones larger.

    Raises ConfigError, naming `what`, when somebody would get nothing.
    """
    if total < team.size:
        raise ConfigError(f"{FLAG} {team.size}: there are only {total} {what} to share; use fewer ranks", FLAG)
    rank = team.rank if rank is None else rank
    least, more = divmod(total, team.size)
    start = rank * least + min(rank, more)
    return range(start, start + least + (rank < more))


def share_columns(total: int, team: Team, what: str, rank: int | None = None) -> range:
    """The same of columns, cut between blocks of 16: in equal parts if a unit of 128, 64, 32 or 16 gives those."""
    if team.size == 1:
        return range(total)
    even = [unit for unit in _UNITS if total % (unit * team.size) == 0]
    some = [unit for unit in _UNITS if total % unit == 0 and total // unit >= team.size]
    if not (even or some):
        raise ConfigError(
            f"{FLAG} {team.size}: {total} {what} have no cut between blocks of {BLOCK} that leaves something for every "
            "rank; use fewer ranks",
            FLAG,
        )
    unit = (even or some)[0]
    return scaled(share(total // unit, team, what, rank), unit)


def share_heads(num_heads: int, num_kv_heads: int, team: Team) -> tuple[range, range]:
    """(query heads, heads of keys and values) of this rank.

    Groups of query heads stay with their keys and values; where there are fewer groups than ranks, several ranks hold
    the same keys and values and share the group's query heads.
    """
    per_group = num_heads // num_kv_heads
    if num_kv_heads >= team.size:
        kv = share(num_kv_heads, team, "heads of keys and values")
        return scaled(kv, per_group), kv
    share(num_heads, team, "query heads")  # a clear word where even those are too few
    owners = [rank * num_kv_heads // team.size for rank in range(team.size)]
    group = owners[team.rank]
    mates = [rank for rank, owner in enumerate(owners) if owner == group]
    within = share(per_group, _Mates(mates.index(team.rank), len(mates)), "query heads of one group")
    start = group * per_group
    return range(start + within.start, start + within.stop), range(group, group + 1)


def shifted(run: range, by: int) -> range:
    return range(run.start + by, run.stop + by)


def scaled(run: range, width: int) -> range:
    """A run of things `width` wide each, counted in what they are wide in."""
    return range(run.start * width, run.stop * width)


class _Mates(Alone):
    """Ranks that share one group of heads: only counted, never called."""
