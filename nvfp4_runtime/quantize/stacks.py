"""Stacks of experts seen as single matrices, under the names that published NVFP4 checkpoints give them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nvfp4_runtime.checkpoint.shards import DTYPES, PLAIN, Shards, TensorInfo
from nvfp4_runtime.errors import TensorShapeError
from nvfp4_runtime.models.vision import text_config

_UP, _DOWN = ".gate_up_proj", ".down_proj"


@dataclass(frozen=True)
class _View:
    """One projection of one expert in a stack.

    rows    of the matrix [N, K], or of a bias [N]
    turned  the stack's matrices are [K, N]
    """

    stack: str
    expert: int
    rows: slice
    turned: bool = False


class UnstackedShards(Shards):
    """A plain folder's tensors, in which prefix.gate_up_proj [E, 2I, K] and prefix.down_proj [E, K, I] are

        prefix.e.gate_proj.weight, prefix.e.up_proj.weight  [I, K]
        prefix.e.down_proj.weight                           [K, I]

    for each expert e, read from the stacks; prefix.gate_up_proj_bias [E, 2I] and prefix.down_proj_bias [E, K] likewise,
    as .bias. Stacks of transposed matrices ([E, K, 2I] and [E, I, K]; the two shapes tell) are turned. gate lies before
    up, but in gpt-oss, where they alternate: what checkpoint.experts reads. Others stay as they are.
    """

    def __init__(self, folder: Path, raw_config: dict[str, Any]) -> None:
        super().__init__(folder)
        self._views: dict[str, _View] = {}
        self._stacks: dict[str, TensorInfo] = {}
        text = text_config(raw_config)
        hidden = text.get("hidden_size")
        alternate = raw_config.get("model_type") == "gpt_oss"
        for up in [info for info in self if _projection(info.name) == _UP]:
            down = self.info(_sibling(up.name))
            if down is None or not isinstance(hidden, int):
                continue
            if (turned := _order(up, down, hidden)) is not None:
                self._unstack(up, down, turned, alternate)

    def _unstack(self, up: TensorInfo, down: TensorInfo, turned: bool, alternate: bool) -> None:
        experts, size = up.shape[0], up.shape[2 if turned else 1]
        prefix = up.name.removesuffix(".weight").removesuffix(_UP)
        gate, upper = slice(0, size // 2), slice(size // 2, size)
        if alternate:
            gate, upper = slice(0, size, 2), slice(1, size, 2)
        outputs = down.shape[2 if turned else 1]
        wanted = [(up, "gate_proj", gate), (up, "up_proj", upper), (down, "down_proj", slice(0, outputs))]
        stacks: dict[str, TensorInfo] = {}
        found: dict[str, TensorInfo] = {}
        for e in range(experts):
            for stack, leaf, rows in wanted:
                n = len(range(outputs if stack is down else size)[rows])
                k = stack.shape[1 if turned else 2]
                self._add(f"{prefix}.{e}.{leaf}.weight", stack, (n, k), _View(stack.name, e, rows, turned), found)
                stacks[stack.name] = stack
                bias = self.info(f"{stack.name.removesuffix('.weight')}_bias")
                if bias is not None:
                    self._add(f"{prefix}.{e}.{leaf}.bias", bias, (n,), _View(bias.name, e, rows), found)
                    stacks[bias.name] = bias
        for name, stack in stacks.items():
            self._stacks[name] = stack
            del self._tensors[name]
        self._tensors |= found

    def _add(
        self, name: str, stack: TensorInfo, shape: tuple[int, ...], view: _View, found: dict[str, TensorInfo]
    ) -> None:
        nbytes = DTYPES[stack.dtype].itemsize
        for size in shape:
            nbytes *= size
        found[name] = TensorInfo(name, stack.dtype, shape, nbytes, stack.file)
        self._views[name] = view

    def read(
        self, name: str, shape: tuple[int, ...] | None = None, dtypes: tuple[str, ...] = PLAIN, hint: str = ""
    ) -> Tensor:
        view = self._views.get(name)
        if view is None:
            return super().read(name, shape, dtypes, hint)
        whole = super().read(view.stack, None, dtypes, hint)
        self.used.add(name)
        part = whole[view.expert].t() if view.turned else whole[view.expert]
        part = part[view.rows].contiguous()
        if shape is not None and tuple(part.shape) != shape:
            raise TensorShapeError(name, self._stacks[view.stack].file.name, f"{list(shape)}", f"{list(part.shape)}")
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


def _order(up: TensorInfo, down: TensorInfo, hidden: int) -> bool | None:
    """Whether the stacks' matrices are transposed; None where the shapes are those of neither order."""
    if len(up.shape) != 3 or len(down.shape) != 3 or up.dtype not in PLAIN or down.dtype not in PLAIN:
        return None
    experts, first, last = up.shape
    if last == hidden and first % 2 == 0 and down.shape == (experts, hidden, first // 2):
        return False
    if first == hidden and last % 2 == 0 and down.shape == (experts, last // 2, hidden):
        return True
    return None
