"""Stacks of experts seen as single matrices, under the names that published NVFP4 checkpoints give them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from nvfp4_runtime.checkpoint.shards import DTYPES, PLAIN, Shards, TensorInfo
from nvfp4_runtime.errors import TensorShapeError

_UP, _DOWN = ".gate_up_proj", ".down_proj"


class UnstackedShards(Shards):
    """A plain folder's tensors, in which prefix.gate_up_proj [E, 2I, K] and prefix.down_proj [E, K, I] are

        prefix.e.gate_proj.weight, prefix.e.up_proj.weight  [I, K]
        prefix.e.down_proj.weight                           [K, I]

    for each expert e, views of the stacks. Stacks in other orders (transposed, or gate and up in turns) stay as they
    are: their config.json or shapes do not say this one for certain.
    """

    def __init__(self, folder: Path, raw_config: dict[str, Any]) -> None:
        super().__init__(folder)
        self._views: dict[str, tuple[str, int, slice]] = {}  # name -> stack, expert, its rows
        self._stacks: dict[str, TensorInfo] = {}
        hidden = raw_config.get("hidden_size")
        for up in [info for info in self if _projection(info.name) == _UP]:
            down = self.info(_sibling(up.name))
            if down is not None and isinstance(hidden, int) and _in_order(up, down, hidden):
                self._unstack(up, down)

    def _unstack(self, up: TensorInfo, down: TensorInfo) -> None:
        experts, rows, _ = up.shape
        prefix = up.name.removesuffix(".weight").removesuffix(_UP)
        half = rows // 2
        wanted = [(up, "gate_proj", slice(0, half)), (up, "up_proj", slice(half, rows))]
        wanted.append((down, "down_proj", slice(0, down.shape[1])))
        found: dict[str, TensorInfo] = {}
        for e in range(experts):
            for stack, leaf, part in wanted:
                name, shape = f"{prefix}.{e}.{leaf}.weight", (part.stop - part.start, stack.shape[2])
                nbytes = shape[0] * shape[1] * DTYPES[stack.dtype].itemsize
                found[name] = TensorInfo(name, stack.dtype, shape, nbytes, stack.file)
                self._views[name] = (stack.name, e, part)
        for stack in (up, down):
            self._stacks[stack.name] = self._tensors.pop(stack.name)
        self._tensors |= found

    def read(
        self, name: str, shape: tuple[int, ...] | None = None, dtypes: tuple[str, ...] = PLAIN, hint: str = ""
    ) -> Tensor:
        if name not in self._views:
            return super().read(name, shape, dtypes, hint)
        stack, expert, rows = self._views[name]
        whole = super().read(stack, None, dtypes, hint)
        self.used.add(name)
        part = whole[expert, rows]
        if shape is not None and tuple(part.shape) != shape:
            raise TensorShapeError(name, self._stacks[stack].file.name, f"{list(shape)}", f"{list(part.shape)}")
        return part

    def require(self, name: str, hint: str = "") -> TensorInfo:
        stack = self._stacks.get(name)
        return super().require(name, hint) if stack is None else stack


def _projection(name: str) -> str | None:
    plain = name.removesuffix(".weight")
    return next((leaf for leaf in (_UP, _DOWN) if plain.endswith(leaf)), None)


def _sibling(name: str) -> str:
    plain = name.removesuffix(".weight")
    return plain.removesuffix(_UP) + _DOWN + name[len(plain) :]


def _in_order(up: TensorInfo, down: TensorInfo, hidden: int) -> bool:
    if len(up.shape) != 3 or len(down.shape) != 3 or up.dtype not in PLAIN or down.dtype not in PLAIN:
        return False
    experts, rows, width = up.shape
    inner = rows // 2
    return rows % 2 == 0 and width == hidden and down.shape == (experts, hidden, inner) and rows != hidden
