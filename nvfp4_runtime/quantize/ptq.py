"""Post-training quantisation of a plain Hugging Face folder to ModelOpt's layout, tensor by tensor."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nvfp4_runtime.checkpoint.detect import detect, read_config
from nvfp4_runtime.checkpoint.shards import DTYPES, Shards
from nvfp4_runtime.checkpoint.writer import MAX_SHARD_BYTES, TensorSpec
from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.kernels.registry import Kernels, available_backends
from nvfp4_runtime.nvfp4.block_scales import BLOCK_METHODS, BlockMethod
from nvfp4_runtime.nvfp4.codec import E2M1_MAX
from nvfp4_runtime.quantize import export, recipes
from nvfp4_runtime.quantize.plan import Group, Plan, make_plan
from nvfp4_runtime.quantize.resume import JournalledWriter, fingerprint, resumable_folder
from nvfp4_runtime.quantize.stacks import UnstackedShards
from nvfp4_runtime.quantize.weights import MappedPages, bits_per_weight, write_group

logger = logging.getLogger(__name__)

RESUME_VERSION = 1  # raise it when the same recipe writes other bytes


@dataclass(frozen=True)
class QuantizeReport:
    """What was made. Bytes count tensors, not files; bits per weight those of the quantised layers."""

    algo: str
    kv_algo: str | None
    num_quantized: int
    num_plain: int
    source_bytes: int
    out_bytes: int
    num_weights: int
    bits_per_weight: float
    seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """A plain model folder, opened."""

    shards: Shards
    raw_config: dict[str, Any]

    @classmethod
    def open(cls, src: Path) -> Source:
        """Raises ConfigError when the folder is quantised already, CheckpointError when it cannot be read."""
        raw_config = read_config(src)
        if (declared := detect(src, raw_config)).method != "none":
            raise ConfigError(
                f"{src} is already quantised ({declared.method} {declared.algo}); give the plain model", "SRC"
            )
        return cls(UnstackedShards(src, raw_config), raw_config)


class Output:
    """The folder being written: tensors in any order, those of an interrupted run already there, a bar with the ETA."""

    def __init__(self, writer: JournalledWriter, bar: Any) -> None:
        self._writer = writer
        self._bar = bar
        self.write = writer.write
        self.read = writer.read
        self.has = writer.has

    def has_all(self, names: Iterable[str]) -> bool:
        return all(map(self.has, names))

    def advance(self, num_bytes: int) -> None:
        self._bar.update(num_bytes)

    def write_kv_scales(self, attn: str, scales: tuple[float, float]) -> None:
        for spec, value in zip(export.kv_specs(attn), scales, strict=True):
            if not self.has(spec.name):
                self.write(spec.name, torch.tensor(value, dtype=torch.float32))


@dataclass(frozen=True)
class Job:
    """One folder to make: from what, how, and whether activations were measured."""

    source: Source
    plan: Plan
    input_scales: bool
    kv_modules: tuple[str, ...]
    max_shard_bytes: int

    @property
    def specs(self) -> list[TensorSpec]:
        return self.plan.specs(self.source.shards, self.input_scales, self.kv_modules)

    def names(self, group: Group) -> list[str]:
        """The tensors of one group."""
        make = export.layer_specs if group.stored == "nvfp4" else export.fp8_specs
        return [
            spec.name
            for module, info in group.members
            for spec in make(module, info.shape[0], info.shape[1], input_scale=self.input_scales)
        ]

    @contextmanager
    def started(self, out: Path, recipe: dict[str, Any], progress: bool) -> Iterator[Output]:
        """Quantised tensors are written inside the block; at its end come the rest, the configs and the companions.

        `recipe` is everything beside the plan that the tensors depend on: see resume.py.
        """
        shards, plan = self.source.shards, self.plan
        for note in plan.notes:
            logger.warning("%s: %s", shards.folder, note)
        recipe = {**recipe, "version": RESUME_VERSION, "formats": plan.formats, "plain": list(plan.plain)}
        algo = plan.algo(self.input_scales)
        bar = tqdm(
            total=sum(info.nbytes for info in shards),
            unit="B",
            unit_scale=True,
            desc=f"quantise to {algo}",
            disable=not progress,
        )
        with bar, resumable_folder(out, recipe, fingerprint(shards, self.source.raw_config)) as partial:
            with JournalledWriter(partial, self.specs, self.max_shard_bytes) as writer:
                yield Output(writer, bar)
                formats, pages = plan.formats, MappedPages(shards)
                for info in shards:
                    if recipes.module_of(info.name) in formats and info.name.endswith(".weight"):
                        continue
                    if not writer.has(info.name):
                        writer.write(info.name, shards.read(info.name, dtypes=tuple(DTYPES)))
                        pages.touched(info)
                    bar.update(info.nbytes)
            kv_algo = "FP8" if self.kv_modules else None
            export.write_configs(partial.folder, self.source.raw_config, plan, self.input_scales, kv_algo)
            export.copy_companions(shards.folder, partial.folder)
        shards.close()

    def report(self, seconds: float) -> QuantizeReport:
        plan = self.plan
        num_weights = sum(group.num_weights for group in plan.groups)
        bits = sum(group.num_weights * bits_per_weight(group.stored) for group in plan.groups)
        return QuantizeReport(
            algo=plan.algo(self.input_scales),
            kv_algo="FP8" if self.kv_modules else None,
            num_quantized=sum(len(group.members) for group in plan.groups),
            num_plain=len(plan.plain),
            source_bytes=sum(info.nbytes for info in self.source.shards),
            out_bytes=sum(spec.nbytes for spec in self.specs),
            num_weights=num_weights,
            bits_per_weight=bits / num_weights,
            seconds=seconds,
            notes=plan.notes,
        )


def quantize_checkpoint(
    src: str | Path,
    out: str | Path,
    *,
    method: BlockMethod = "mse",
    input_scales: Mapping[str, float] | None = None,
    kv_scales: Mapping[str, tuple[float, float]] | None = None,
    exclude: Sequence[str] = (),
    fp8: Sequence[str] = (),
    plan: Plan | None = None,
    backend: str = "auto",
    progress: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> QuantizeReport:
    """Write the plain model folder `src` as a ModelOpt folder `out`, which appears whole or not at all.

    method        how block scales are chosen (nvfp4/block_scales.py); "max" is bit for bit ModelOpt's default
    input_scales  module -> amax / 2688 of its input, for every quantised module: gives NVFP4 (W4A4 and W4A16 serve).
                  None: W4A16_NVFP4 without input_scale, since ModelOpt's NVFP4 is not complete without
    kv_scales     attention module -> (k_scale, v_scale), amax / 448: declares an FP8 KV cache
    exclude, fp8  fnmatch patterns of modules to leave plain (besides the recipe's own), and to store as FP8
    plan          what to do with each module, instead of the two

    In memory at once: one matrix and its result. Interrupted, it leaves a partial folder (see resume.py) that the same
    call goes on from. Raises ConfigError for impossible wishes, CheckpointError for sources that cannot be read.
    """
    if method not in BLOCK_METHODS:
        raise ConfigError(f"unknown method {method!r}; expected one of {', '.join(BLOCK_METHODS)}", "--method")
    source = Source.open(Path(src))
    plan = plan or make_plan(source.shards, source.raw_config, exclude, fp8)
    scales = None if input_scales is None else shared_input_scales(input_scales, plan.groups)
    kernels = Kernels(available_backends(backend), "bfloat16")
    job = Job(source, plan, scales is not None, tuple(kv_scales or ()), max_shard_bytes)
    recipe = {"method": method, "input_scales": scales, "kv_scales": dict(kv_scales or {})}
    start, pages = time.perf_counter(), MappedPages(source.shards)
    with job.started(Path(out), recipe, progress) as output:
        for group in plan.groups:
            if not output.has_all(job.names(group)):
                write_group(source.shards, group, kernels, method, scales, output, pages)
            output.advance(sum(info.nbytes for _, info in group.members))
        for attn, pair in (kv_scales or {}).items():
            output.write_kv_scales(attn, pair)
    return job.report(time.perf_counter() - start)


def shared_input_scales(input_scales: Mapping[str, float], groups: Sequence[Group]) -> dict[str, float]:
    """One scale per input, the largest of those that read it: amax / 2688, for FP8 modules amax / 448.

    Raises ConfigError where one is missing or unusable.
    """
    modules = {module: group for group in groups for module in group.modules}
    if missing := [module for module in modules if module not in input_scales]:
        raise ConfigError(
            f"{len(missing)} layer(s) have no input scale, e.g. {missing[0]}; calibrate with the same model", "--calib"
        )
    shared: dict[str, float] = {}
    for module, group in modules.items():
        value = input_scales[module]
        if not math.isfinite(value) or value <= 0:
            raise ConfigError(f"the input scale of {module} is {value}; expected a positive number", "--calib")
        shared[group.key] = max(value, shared.get(group.key, 0.0))
    return {
        module: shared[group.key] * (1.0 if group.stored == "nvfp4" else E2M1_MAX) for module, group in modules.items()
    }
