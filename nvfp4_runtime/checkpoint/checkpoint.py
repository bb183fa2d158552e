"""Checkpoint: the one thing layers ask for weights, by exact name, whatever dialect the files are written in."""

from __future__ import annotations

import difflib
import fnmatch
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from nvfp4_runtime.checkpoint import bf16, modelopt
from nvfp4_runtime.checkpoint.detect import check_readable, detect, is_excluded, read_config
from nvfp4_runtime.checkpoint.pages import release_pages
from nvfp4_runtime.checkpoint.shards import Shards
from nvfp4_runtime.config import QuantConfig
from nvfp4_runtime.errors import MissingTensorError, TensorShapeError, UnexpectedTensorError, UnsupportedFormatError
from nvfp4_runtime.nvfp4.weight import DenseWeight, NVFP4Weight

logger = logging.getLogger(__name__)

FORMATS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F8_E4M3": "fp8"}


class Checkpoint:
    """A local Hugging Face folder, opened for reading. Tensors are mapped, not loaded.

    path        the folder
    raw_config  config.json as it stands
    quant       what the files declare; the tensors decide, and `notes` says where the two disagree
    """

    def __init__(self, path: Path, raw_config: dict[str, Any], quant: QuantConfig, shards: Shards) -> None:
        self.path = path
        self.raw_config = raw_config
        self.quant = quant
        self._shards = shards
        self._excuses: dict[str, str] = {}
        self._disagreements: dict[str, list[str]] = {}

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Read configs and headers of a local folder.

        Raises CheckpointError (and its kinds) when files are missing, malformed, or of a format without a reader.
        """
        folder = Path(path).expanduser()
        raw_config = read_config(folder)
        quant = detect(folder, raw_config)
        check_readable(quant, folder)
        shards = Shards(folder)
        for note in (*quant.notes, *shards.notes):
            logger.warning("%s: %s", folder, note)
        return cls(folder, raw_config, quant, shards)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was odd but harmless: contradictions between configs, index, and tensors."""
        found = (
            f"{len(prefixes)} layer(s) {what}, e.g. {prefixes[0]}" for what, prefixes in self._disagreements.items()
        )
        return (*self.quant.notes, *self._shards.notes, *found)

    def has(self, name: str) -> bool:
        """Whether a tensor of exactly this name exists."""
        return name in self._shards

    def names(self) -> Iterable[str]:
        return (info.name for info in self._shards)

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """A plain (BF16, FP16 or FP32) tensor; MissingTensorError or TensorShapeError when it is not as asked."""
        if name not in self._shards:
            raise MissingTensorError(name, self._shards.where, self._closest(name))
        return self._shards.read(name, shape)

    def linear(self, prefix: str, n: int, k: int) -> NVFP4Weight | DenseWeight:
        """The weight [n, k] of the linear layer `prefix`, with its scales and bias, in the format it is stored in.

        The tensors decide the format; where the configs disagree, that is noted and logged once per kind.
        Raises MissingTensorError, TensorShapeError, InvalidScaleError or UnsupportedFormatError.
        """
        if modelopt.holds(self._shards, prefix):
            packed = modelopt.linear(self._shards, prefix, n, k)
            self._cross_check_packed(prefix, packed)
            return packed
        if bf16.holds(self._shards, prefix):
            self._refuse_stray_scales(prefix)
            if self.quant.algo is not None and not is_excluded(prefix, self.quant.exclude):
                self._disagree(f"are plain although the config declares {self.quant.algo} for them", prefix)
            return bf16.linear(self._shards, prefix, n, k)
        raise self._unreadable(prefix)

    def kv_scales(self, attn_prefix: str) -> tuple[float, float] | None:
        """(k_scale, v_scale) for an FP8 KV cache; (1.0, 1.0) where FP8 is declared without tensors; None otherwise."""
        stored = modelopt.kv_scales(self._shards, attn_prefix)
        if stored is not None and self.quant.kv_algo != "FP8":
            self._disagree(
                "have KV scales although no FP8 KV cache is declared (used if FP8 is asked for)", attn_prefix
            )
        return stored or ((1.0, 1.0) if self.quant.kv_algo == "FP8" else None)

    def excuse(self, pattern: str, reason: str) -> None:
        """Allow tensors matching the fnmatch `pattern` to stay unread, and say why."""
        self._excuses[pattern] = reason

    def finish(self) -> None:
        """Every tensor must now be read or excused: UnexpectedTensorError names the rest. Drops the file handles."""
        unread = [
            name
            for name in self.names()
            if name not in self._shards.used and not any(fnmatch.fnmatchcase(name, p) for p in self._excuses)
        ]
        if unread:
            files = {info.name: info.file.name for info in self._shards}
            raise UnexpectedTensorError([f"{name} ({files[name]})" for name in sorted(unread)], self._shards.where)
        self._shards.close()
        release_pages(self._shards.files)  # what was repacked need not stay; what is read in place comes back by itself

    def nbytes_by_format(self) -> dict[str, int]:
        """Bytes on disk by stored format: "nvfp4" (codes and all their scales), "bf16", "fp16", "fp32", others."""
        totals: dict[str, int] = {}
        for info in self._shards:
            module = info.name.rpartition(".")[0]
            packed = modelopt.holds(self._shards, module) and not info.name.endswith((".bias", ".k_scale", ".v_scale"))
            kind = "nvfp4" if packed else FORMATS.get(info.dtype, info.dtype.lower())
            totals[kind] = totals.get(kind, 0) + info.nbytes
        return totals

    def _cross_check_packed(self, prefix: str, weight: NVFP4Weight) -> None:
        if self.quant.algo is None:
            self._disagree("are packed NVFP4 although no config declares it", prefix)
        elif is_excluded(prefix, self.quant.exclude):
            self._disagree("are packed NVFP4 although the config excludes them", prefix)
        if weight.input_scale is None and self.quant.algo == "NVFP4":
            self._disagree("have no usable input_scale although NVFP4 declares one (W4A4 is impossible)", prefix)

    def _refuse_stray_scales(self, prefix: str) -> None:
        name = f"{prefix}.weight_scale"
        if (info := self._shards.info(name)) is not None:
            weight = self._shards.require(f"{prefix}.weight")
            raise TensorShapeError(weight.name, weight.file.name, f"U8, since {name} ({info}) is there", str(weight))

    def _unreadable(self, prefix: str) -> Exception:
        info = self._shards.info(f"{prefix}.weight")
        if info is None:
            for relative in ("weight_packed", "weight_blocks", "qweight", "qdata"):
                if (other := self._shards.info(f"{prefix}.{relative}")) is not None:
                    return UnsupportedFormatError(
                        f"{other.name} in {other.file.name} is {other}: this layout (compressed-tensors, MXFP4, GPTQ "
                        "or torchao) has no reader here; expected ModelOpt NVFP4 or plain weights"
                    )
            return MissingTensorError(f"{prefix}.weight", self._shards.where, self._closest(f"{prefix}.weight"))
        if info.dtype.startswith("F8"):
            return UnsupportedFormatError(f"{info.name} in {info.file.name} is {info}: FP8 layers have no reader here")
        return TensorShapeError(info.name, info.file.name, "U8 (NVFP4), BF16, F16 or F32", str(info))

    def _closest(self, name: str) -> str:
        close = difflib.get_close_matches(name, list(self.names())[:20_000], n=1, cutoff=0.6)
        return f"the nearest name there is {close[0]!r}" if close else ""

    def _disagree(self, what: str, prefix: str) -> None:
        known = self._disagreements.setdefault(what, [])
        if not known:
            logger.warning("%s: layers %s, first %s", self.path, what, prefix)
        known.append(prefix)
