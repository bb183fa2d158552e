"""What the loader will ask a checkpoint for. Models know it, and the doctor may not import them: it is handed in."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nvfp4_runtime.checkpoint.experts import ALIASES, FUSED, HALVES


@dataclass(frozen=True)
class Module:
    """A module the model reads.

    shape     [out, in] of a matrix, [size] of a norm
    linear    may be stored in any format that has a reader; others are plain
    bias      it has one, and the loader insists; False: the loader refuses one
    optional  may be absent: a head that is tied to the embedding
    experts   0, or how many matrices of `shape` are stacked in one tensor
    """

    shape: tuple[int, ...]
    linear: bool = True
    bias: bool = False
    optional: bool = False
    experts: int = 0


@dataclass(frozen=True)
class Mixture:
    """The experts of one layer: [inner, hidden] (gate, up) and [hidden, inner] (down), one by one or stacked."""

    num_experts: int
    hidden: int
    inner: int

    def modules(self, container: str, stored: Collection[str]) -> dict[str, Module]:
        """The modules as these files keep them; one by one under their usual names where nothing tells.

        stored  the paths of all modules in the files
        """
        shapes = dict.fromkeys(HALVES, (self.inner, self.hidden)) | {"down_proj": (self.hidden, self.inner)}
        if f"{container}.{FUSED}" in stored or f"{container}.down_proj" in stored:
            if f"{container}.gate_proj" not in stored:
                shapes = {FUSED: (2 * self.inner, self.hidden), "down_proj": shapes["down_proj"]}
            return {f"{container}.{name}": Module(shape, experts=self.num_experts) for name, shape in shapes.items()}
        if f"{container}.0.{ALIASES['down_proj']}" in stored:
            shapes = {ALIASES[name]: shape for name, shape in shapes.items()}
        return {f"{container}.{i}.{n}": Module(shape) for i in range(self.num_experts) for n, shape in shapes.items()}


@dataclass(frozen=True)
class Expected:
    """Every module of an architecture by its path, and patterns of tensors that may lie there unread.

    loose     plain tensors of no module that the model reads: name -> shape
    mixtures  by the experts' container, e.g. "model.layers.3.mlp.experts": what `placed` makes modules of
    """

    architecture: str
    modules: Mapping[str, Module]
    harmless: tuple[str, ...] = ()
    loose: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    mixtures: Mapping[str, Mixture] = field(default_factory=dict)

    def placed(self, stored: Collection[str]) -> Expected:
        """The same with every mixture's modules as the files keep them. `stored`: the paths of all their modules."""
        experts = [mixture.modules(container, stored) for container, mixture in self.mixtures.items()]
        return replace(self, modules=dict(self.modules) | {k: v for group in experts for k, v in group.items()})

    def excuses(self, tensor: str) -> bool:
        """Whether the loader lets `tensor` lie there unread."""
        return any(fnmatch.fnmatchcase(tensor, pattern) for pattern in self.harmless)


# config.json -> what its architecture reads, or None for one that is not served here. Raises UnsupportedFormatError
# where the architecture is served and its config.json asks for something it cannot do.
Expect = Callable[[Mapping[str, Any]], Expected | None]


def nothing_expected(config: Mapping[str, Any]) -> None:
    """No architecture is known: layers are judged by each other."""
    return None
