"""Checkpoint: the one thing layers ask for weights, by exact name, whatever dialect the files are written in."""

from __future__ import annotations

import difflib
import fnmatch
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from nvfp4_runtime.checkpoint import bf16, compressed_tensors, fp8, modelopt, mxfp4
from nvfp4_runtime.checkpoint.adapter import Adapter
from nvfp4_runtime.checkpoint.declared import declared_algos, disagreements
from nvfp4_runtime.checkpoint.detect import INSTEAD, W4A8, WEIGHT_ONLY, check_readable, detect, read_config
from nvfp4_runtime.checkpoint.experts import ALIASES, FUSED, HALVES, fill_input_scales, half_of
from nvfp4_runtime.checkpoint.kv import kv_scales
from nvfp4_runtime.checkpoint.pages import release_pages
from nvfp4_runtime.checkpoint.parts import Parts, read_one, read_stack
from nvfp4_runtime.checkpoint.patterns import compiled
from nvfp4_runtime.checkpoint.shards import PLAIN, Shards
from nvfp4_runtime.checkpoint.stored import FORMATS, StoredLayer, modules, stored_layer
from nvfp4_runtime.config import QuantConfig
from nvfp4_runtime.errors import (
    InvalidScaleError,
    MissingTensorError,
    TensorShapeError,
    UnexpectedTensorError,
    UnsupportedFormatError,
)
from nvfp4_runtime.nvfp4.codec import BLOCK
from nvfp4_runtime.nvfp4.weight import NVFP4Weight, Weight

logger = logging.getLogger(__name__)

# Words in a safetensors header's metadata by which layouts give themselves away whose tensors look like ours.
_FOREIGN_METADATA = {
    "NVFP4Tensor": "torchao's NVFP4Tensor, whose scales may be swizzled",
    "_quantization_metadata": "a ComfyUI single file, whose rows may be padded and scales swizzled",
    "swizzle": "a file with swizzled scales",
}


class Checkpoint:
    """A local Hugging Face folder, opened for reading. Tensors are mapped, not loaded.

    path        the folder
    raw_config  config.json as it stands
    quant       what the files declare; the tensors decide, and `notes` says where the two disagree
    adapters    LoRA adapters to load beside it: linear layers ask each for what it learnt for them
    """

    def __init__(self, path: Path, raw_config: dict[str, Any], quant: QuantConfig, shards: Shards) -> None:
        self.path = path
        self.raw_config = raw_config
        self.quant = quant
        self.adapters: tuple[Adapter, ...] = ()
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
        check_metadata(shards)
        ckpt = cls(folder, raw_config, quant, shards)
        for note in ckpt.notes:
            logger.warning("%s: %s", folder, note)
        return ckpt

    @property
    def notes(self) -> tuple[str, ...]:
        """What was odd but harmless: contradictions between configs, index, and tensors."""
        found = (
            f"{len(prefixes)} layer(s) {what}, e.g. {prefixes[0]}" for what, prefixes in self._disagreements.items()
        )
        targets = [target for target, _ in self.quant.layers]
        unread = [*compiled(self.quant.exclude).unevaluated, *compiled(targets).unevaluated]
        patterns = (f"the pattern {p[:80]!r} is too costly to evaluate and matches nothing here" for p in unread)
        return (*self.quant.notes, *patterns, *self._shards.notes, *found)

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

    def linear(self, prefix: str, n: int, k: int) -> Weight:
        """The weight [n, k] of the linear layer `prefix`, with its scales and bias, in the format it is stored in.

        The tensors decide the format; where the configs disagree, that is noted and logged once per kind.
        Raises MissingTensorError, TensorShapeError, InvalidScaleError or UnsupportedFormatError.
        """
        layer = self._stored(prefix, n, k, experts=0)
        parts = read_one(self._shards, layer)
        if parts.input_scale is not None and not (math.isfinite(parts.input_scale) and parts.input_scale >= 0):
            name = layer.tensors["input_scale"]
            raise InvalidScaleError(name, self._shards.require(name).file.name, f"{parts.input_scale}")
        weight = self._canonical(layer, parts)
        self._note_missing_input_scale(prefix, weight)
        return weight

    def experts(self, prefix: str, projection: str, num_experts: int, n: int, k: int) -> list[Weight]:
        """One weight [n, k] for each expert of the mixture `prefix` ("model.layers.3.mlp.experts"), in order.

        projection  "gate_proj", "up_proj" or "down_proj", however the files spell and stack it
        An expert without a usable input_scale (missing, 0 or not finite: calibration never reached it) is given the
        largest of its layer, and that is noted. Raises what `linear` raises.
        """
        single = self._single_expert(prefix, projection)
        if single is not None:
            weights = [self._expert(f"{prefix}.{e}.{single}", n, k) for e in range(num_experts)]
            if self._stored_or_none(f"{prefix}.{num_experts}.{single}") is not None:
                raise UnexpectedTensorError([f"{prefix}.{num_experts}.{single}"], self._shards.where)
        else:
            weights = list(self._from_stack(prefix, projection, num_experts, n, k))
        filled, count = fill_input_scales(weights)
        if count:
            self._disagree("have experts without a usable input_scale: these were given their layer's largest", prefix)
        else:
            self._note_missing_input_scale(f"{prefix}.0.{projection}", filled[0])
        return filled

    def kv_scales(self, attn_prefix: str) -> tuple[float, float] | None:
        """(k_scale, v_scale) for a quantised KV cache; (1.0, 1.0) where one is declared without tensors; else None."""
        stored = kv_scales(self._shards, attn_prefix)
        if stored is None:
            return (1.0, 1.0) if self.quant.kv_algo is not None else None
        if self.quant.kv_algo is None:
            self._disagree(
                "have KV scales although no FP8 KV cache is declared (used if FP8 is asked for)", attn_prefix
            )
        if stored.note:
            self._disagree(stored.note, attn_prefix)
        return stored.k, stored.v

    def excuse(self, pattern: str, reason: str) -> None:
        """Allow tensors matching the fnmatch `pattern` to stay unread, and say why."""
        self._excuses[pattern] = reason

    def finish(self) -> None:
        """Every tensor must now be read or excused, and every adapter's read: UnexpectedTensorError names the rest.

        Drops the file handles.
        """
        unread = [
            name
            for name in self.names()
            if name not in self._shards.used and not any(fnmatch.fnmatchcase(name, p) for p in self._excuses)
        ]
        if unread:
            files = {info.name: info.file.name for info in self._shards}
            raise UnexpectedTensorError([f"{name} ({files[name]})" for name in sorted(unread)], self._shards.where)
        for adapter in self.adapters:
            adapter.finish()
        self._shards.close()
        release_pages(self._shards.files)  # what was repacked need not stay; what is read in place comes back by itself

    def nbytes_by_format(self) -> dict[str, int]:
        """Bytes on disk by stored format: "nvfp4" (codes and all their scales), "fp8", "bf16", "fp32", others."""
        totals: dict[str, int] = {}
        owned: set[str] = set()
        for layer in modules(self._shards):
            totals[layer.format] = totals.get(layer.format, 0) + layer.nbytes
            owned.update(name for role, name in layer.tensors.items() if role != "bias")
        for info in self._shards:
            if info.name not in owned:
                kind = FORMATS.get(info.dtype, info.dtype.lower())
                totals[kind] = totals.get(kind, 0) + info.nbytes
        return totals

    def _stored_or_none(self, prefix: str) -> StoredLayer | None:
        return stored_layer(self._shards, prefix)

    def _stored(self, prefix: str, n: int, k: int, experts: int) -> StoredLayer:
        """The module as stored, when it can be read and is of this size."""
        layer = self._stored_or_none(prefix)
        if layer is None:
            name = f"{prefix}.weight"
            raise MissingTensorError(name, self._shards.where, self._closest(name))
        weight = self._shards.info(layer.tensors.get("weight", ""))
        if weight is not None and weight.dtype in ("U8", "F8_E4M3", *PLAIN):
            packed = weight.dtype == "U8"
            if packed and k % BLOCK:
                expected = f"input features in multiples of {BLOCK}, as NVFP4 needs"
                raise TensorShapeError(weight.name, weight.file.name, expected, f"{k}")
            if (layer.n, layer.k, layer.experts) != (n, k, experts):
                shape = [experts] * bool(experts) + [n, k // 2 if packed else k]
                wanted = f"{' or '.join(PLAIN) if weight.dtype in PLAIN else weight.dtype} {shape}"
                raise TensorShapeError(weight.name, weight.file.name, wanted, str(weight))
        if layer.problem is not None:
            raise layer.problem
        return layer

    def _canonical(self, layer: StoredLayer, parts: Parts) -> Weight:
        """Through the dialect's reader to the canonical form; disagreements with the configs are noted on the way."""
        for what in disagreements(self.quant, layer):
            self._disagree(what, layer.prefix)
        weight = _reader(layer)(parts)
        if isinstance(weight, NVFP4Weight):
            algos = declared_algos(self.quant, layer.prefix)
            if layer.block != (1, BLOCK):
                self._check_group(layer, algos)
            elif algos == {WEIGHT_ONLY}:
                return replace(weight, input_scale=None)
        return weight

    def _check_group(self, layer: StoredLayer, algos: frozenset[str]) -> None:
        """One scale per 32 weights is right where W4A8 (or nothing) is declared; else half of the scales are gone."""
        if algos and W4A8 not in algos:
            scale = self._shards.require(layer.tensors["block_scale"])
            expected = f"F8_E4M3 {[layer.n, layer.k // BLOCK]}, as {' or '.join(sorted(algos))} declares"
            raise TensorShapeError(scale.name, scale.file.name, expected, str(scale))
        self._disagree(f"are stored for {W4A8}: they run W4A16, their activations are not rounded to FP8", layer.prefix)

    def _note_missing_input_scale(self, prefix: str, weight: Weight) -> None:
        missing = isinstance(weight, NVFP4Weight) and weight.input_scale is None
        if missing and declared_algos(self.quant, prefix) & {"NVFP4", "NVFP4_AWQ"}:
            self._disagree(_NO_INPUT_SCALE, prefix)

    def _single_expert(self, prefix: str, projection: str) -> str | None:
        """What the files call this projection of one expert; None where experts are stacked."""
        names = (projection, ALIASES[projection])
        return next((name for name in names if self._stored_or_none(f"{prefix}.0.{name}") is not None), None)

    def _expert(self, prefix: str, n: int, k: int) -> Weight:
        layer = self._stored(prefix, n, k, experts=0)
        if "pre_quant_scale" in layer.tensors:
            raise UnsupportedFormatError(
                f"{prefix} has a pre_quant_scale (AWQ), which is not applied to experts here: {INSTEAD}"
            )
        return self._canonical(layer, read_one(self._shards, layer))

    def _from_stack(self, prefix: str, projection: str, num_experts: int, n: int, k: int) -> Iterator[Weight]:
        fused = projection in HALVES and self._stored_or_none(f"{prefix}.{projection}") is None
        layer = self._stored(
            f"{prefix}.{FUSED if fused else projection}", 2 * n if fused else n, k, experts=num_experts
        )
        parts = read_stack(self._shards, layer)
        if fused:
            interleaved = layer.dialect == "gpt-oss" or self.raw_config.get("model_type") == "gpt_oss"
            parts = half_of(parts, HALVES[projection], interleaved)
        return (self._canonical(layer, part) for part in parts)

    def _closest(self, name: str) -> str:
        close = difflib.get_close_matches(name[:300], list(self.names())[:20_000], n=1, cutoff=0.6)
        return f"the nearest name there is {close[0]!r}" if close else ""

    def _disagree(self, what: str, prefix: str) -> None:
        known = self._disagreements.setdefault(what, [])
        if not known:
            logger.warning("%s: layers %s, first %s", self.path, what, prefix)
        if not known or known[-1] != prefix:  # each expert of a stack says the same
            known.append(prefix)


_NO_INPUT_SCALE = "have no usable input_scale although NVFP4 declares one (W4A4 is impossible)"


def check_metadata(shards: Shards) -> None:
    """Raise UnsupportedFormatError where the files' own remarks name a layout that only looks like one of ours."""
    for key, value in shards.metadata.items():
        for word, what in _FOREIGN_METADATA.items():
            if word in key or word in value:
                raise UnsupportedFormatError(f"{shards.where} is {what} (its metadata has {key!r}): {INSTEAD}")


def _reader(layer: StoredLayer) -> Callable[[Parts], Weight]:
    if layer.format == "nvfp4":
        return compressed_tensors.weight if layer.divides else modelopt.weight
    readers: dict[str, Callable[[Parts], Weight]] = {"fp8": fp8.weight, "mxfp4": mxfp4.weight}
    return readers.get(layer.format, bf16.weight)
