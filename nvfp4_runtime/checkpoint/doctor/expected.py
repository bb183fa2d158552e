"""What the loader will ask a checkpoint for. Models know it, and the doctor may not import them: it is handed in."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Module:
    """A module the model reads.

    shape     [out, in] of a matrix, [size] of a norm
    linear    may be stored in any format that has a reader; others are plain
    bias      it has one, and the loader insists; False: the loader refuses one
    optional  may be absent: a head that is tied to the embedding
    """

    shape: tuple[int, ...]
    linear: bool = True
    bias: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Expected:
    """Every module of an architecture by its path, and patterns of tensors that may lie there unread."""

    architecture: str
    modules: Mapping[str, Module]
    harmless: tuple[str, ...] = ()

    def excuses(self, tensor: str) -> bool:
        """Whether the loader lets `tensor` lie there unread."""
        return any(fnmatch.fnmatchcase(tensor, pattern) for pattern in self.harmless)


# config.json -> what its architecture reads, or None for one that is not served here. Raises UnsupportedFormatError
# where the architecture is served and its config.json asks for something it cannot do.
Expect = Callable[[Mapping[str, Any]], Expected | None]


def nothing_expected(config: Mapping[str, Any]) -> None:
    """No architecture is known: layers are judged by each other."""
    return None
