"""LoRA adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors beside it.

What is learnt for the module "model.layers.0.self_attn.q_proj" lies there as
base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight [r, k] and .lora_B.weight [n, r]; the module then gives
y + scaling * B (A x), with scaling = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from nvfp4_runtime.checkpoint.shards import Shards, load_json
from nvfp4_runtime.config import AdapterConfig
from nvfp4_runtime.errors import CheckpointError, TensorShapeError, UnexpectedTensorError, UnsupportedFormatError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Fields of adapter_config.json that change the arithmetic, and the values that leave it alone.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "lora_bias": (None, False),
    "bias": (None, "none"),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "fan_in_fan_out": (None, False),
    "alora_invocation_tokens": (None, []),
    "layer_replication": (None, []),
    "exclude_modules": (None, []),
    "megatron_config": (None,),
}


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to one linear layer: scaling * (x A^T) B^T, a [r, k], b [n, r]."""

    a: Tensor
    b: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


class Adapter:
    """One adapter, opened for reading.

    name  what requests call it
    path  its folder
    rank  the largest of its modules
    """

    def __init__(self, name: str, path: Path, config: dict[str, Any], shards: Shards, max_rank: int) -> None:
        self.name, self.path = name, path
        self._config, self._shards = config, shards
        self._modules: dict[str, set[str]] = {}
        for info in shards:
            if (match := _TENSOR.fullmatch(info.name)) is None:
                raise UnsupportedFormatError(
                    f"{self._where}: the tensor {info.name!r} is no LoRA matrix; expected "
                    "base_model.model.<module>.lora_A.weight and lora_B.weight only"
                )
            self._modules.setdefault(match[1], set()).add(match[2])
        if not self._modules:
            raise UnsupportedFormatError(f"{self._where} holds no tensors")
        for module, halves in self._modules.items():
            if len(halves) != 2:
                missing = ({"A", "B"} - halves).pop()
                raise CheckpointError(f"{self._where}: {module} has no lora_{missing}.weight")
        self.rank = max(self._rank(module) for module in self._modules)
        if self.rank > max_rank:
            raise UnsupportedFormatError(
                f"{path} has the rank {self.rank}, and at most {max_rank} is allowed; start with --max-lora-rank "
                f"{self.rank}"
            )

    @classmethod
    def open(cls, adapter: AdapterConfig, max_rank: int) -> Self:
        """Raises CheckpointError and its kinds for a folder that is none, or asks for what is not done here."""
        folder = Path(adapter.path).expanduser()
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise CheckpointError(
                    f"the adapter {adapter.name!r}: {folder} has no {name}; expected a folder that PEFT saved, with "
                    "safetensors (.bin files are never read)"
                )
        config = load_json(folder / CONFIG)
        for field, neutral in _NEUTRAL.items():
            if (value := config.get(field)) not in neutral:
                raise UnsupportedFormatError(
                    f"{folder / CONFIG}: {field} is {value!r:.100}, which changes the arithmetic in a way that is not "
                    f"done here; expected {' or '.join(map(repr, neutral))}"
                )
        return cls(adapter.name, folder, config, Shards(folder, WEIGHTS), max_rank)

    def linear(self, module: str, n: int, k: int) -> LowRank | None:
        """What is learnt for `module`, a linear layer [n, k]; None where nothing is.

        Raises TensorShapeError for matrices of another layer, CheckpointError for values that are not finite.
        """
        if module not in self._modules:
            return None
        rank = self._rank(module)
        a = self._read(f"base_model.model.{module}.lora_A.weight", (rank, k))
        b = self._read(f"base_model.model.{module}.lora_B.weight", (n, rank))
        return LowRank(a, b, self._scaling(module, rank))

    def finish(self) -> None:
        """Every matrix must have found its layer: UnexpectedTensorError names the rest. Drops the file handles."""
        unread = [info.name for info in self._shards if info.name not in self._shards.used]
        if unread:
            raise UnexpectedTensorError(
                [f"{name} (no linear layer that takes adapters has this name)" for name in sorted(unread)], self._where
            )
        self._shards.close()

    @property
    def _where(self) -> str:
        return str(self.path / WEIGHTS)

    def _rank(self, module: str) -> int:
        shape = self._shards.require(f"base_model.model.{module}.lora_A.weight").shape
        if len(shape) != 2 or shape[0] < 1:
            raise TensorShapeError(f"{module}.lora_A.weight", self._where, "[rank, in features]", str(list(shape)))
        return shape[0]

    def _read(self, name: str, shape: tuple[int, int]) -> Tensor:
        tensor = self._shards.read(name, shape)
        if not bool(tensor.to(torch.float32).isfinite().all()):
            raise CheckpointError(f"{self._where}: {name} holds NaN or Inf")
        return tensor

    def _scaling(self, module: str, rank: int) -> float:
        """lora_alpha over the rank (or its root), as the config says for this module."""
        declared = self._number(self._pattern("rank_pattern", module) or self._config.get("r"), "r")
        if declared != rank:
            raise CheckpointError(f"{self._where}: {module} has the rank {rank}, and {CONFIG} says {declared:g}")
        alpha = self._pattern("alpha_pattern", module)
        alpha = self._number(self._config.get("lora_alpha") if alpha is None else alpha, "lora_alpha")
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def _pattern(self, field: str, module: str) -> Any:
        """The value that rank_pattern or alpha_pattern has for `module`, by exact name or as the end of its path."""
        patterns = self._config.get(field) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{self.path / CONFIG}: {field} is {patterns!r:.100}; expected names with numbers")
        for name, value in patterns.items():
            if not re.fullmatch(r"[\w.^$]+", name):
                raise UnsupportedFormatError(
                    f"{self.path / CONFIG}: {field} has the pattern {name!r:.100}; expected module names"
                )
            plain = name.removeprefix("^").removesuffix("$")
            if module == plain or (not name.startswith("^") and module.endswith(f".{plain}")):
                return value
        return None

    def _number(self, value: Any, field: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
            raise CheckpointError(f"{self.path / CONFIG}: {field} is {value!r:.100}; expected a positive number")
        return float(value)
