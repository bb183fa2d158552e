"""Quantising with a calibration text, layer by layer: AWQ's folding, GPTQ's compensation, input and KV scales.

Each layer meets the hidden states that the layers before it give as quantised. In memory are one layer, one Hessian
[K, K] in float32, and the hidden states of the text.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from nvfp4_runtime.checkpoint.shards import TensorInfo
from nvfp4_runtime.checkpoint.writer import MAX_SHARD_BYTES
from nvfp4_runtime.config import Numerics
from nvfp4_runtime.kernels.registry import Kernels, available_backends
from nvfp4_runtime.nvfp4 import codec
from nvfp4_runtime.nvfp4.block_scales import BlockMethod, tensor_scale
from nvfp4_runtime.nvfp4.fp8 import FP8Weight
from nvfp4_runtime.nvfp4.weight import DenseWeight, NVFP4Weight, Weight
from nvfp4_runtime.quantize import awq
from nvfp4_runtime.quantize.calibrate import (
    cache_scales,
    input_scale_of,
    largest_inputs,
    report_unreached,
    tokenize,
)
from nvfp4_runtime.quantize.gptq import gptq, inverse_factor
from nvfp4_runtime.quantize.layerwise import (
    SITES,
    Input,
    LayerRun,
    Overlay,
    Walk,
    readers,
    site_modules,
    windows,
)
from nvfp4_runtime.quantize.plan import Group, Plan, make_plan
from nvfp4_runtime.quantize.ptq import Job, Output, QuantizeReport, Source
from nvfp4_runtime.quantize.recipes import CalibratedMethod
from nvfp4_runtime.quantize.resume import text_digest
from nvfp4_runtime.quantize.weights import fp8_per_tensor, largest, nvfp4, write_fp8, write_nvfp4

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """How layers are made.

    method    "awq", "gptq" or both
    blocks    how block scales are chosen, by errors weighed with the inputs' mean squares
    numerics  "w4a16", or "w4a4": then what layers see, and the Hessians, are of quantised activations
    """

    method: CalibratedMethod
    blocks: BlockMethod = "mse"
    numerics: Numerics = "w4a16"

    @property
    def folds(self) -> bool:
        return self.method != "gptq"

    @property
    def compensates(self) -> bool:
        return self.method != "awq"


def quantize_calibrated(
    src: str | Path,
    out: str | Path,
    texts: Sequence[str],
    options: Options,
    *,
    fp8_kv: bool = False,
    exclude: Sequence[str] = (),
    fp8: Sequence[str] = (),
    plan: Plan | None = None,
    max_windows: int = 128,
    backend: str = "auto",
    progress: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> QuantizeReport:
    """Write `src` as a ModelOpt NVFP4 folder `out`, made on up to `max_windows` windows of 512 tokens of `texts`.

    Interrupted, it leaves a partial folder that the same call goes on from: finished layers are read back and run, not
    made again. Raises ConfigError, CheckpointError, UnsupportedFormatError for models that do not run here.
    """
    source = Source.open(Path(src))
    plan = plan or make_plan(source.shards, source.raw_config, exclude, fp8)
    kernels = Kernels(available_backends(backend), "bfloat16", options.numerics)
    sequences = windows(tokenize(Path(src), texts), max_windows)
    walk = Walk(Overlay.over(src), kernels, sequences)
    attention = tuple(f"model.layers.{i}.self_attn" for i in range(walk.config.num_layers)) if fp8_kv else ()
    job = Job(source, plan, True, attention, max_shard_bytes)
    recipe = {
        "method": options.method,
        "blocks": options.blocks,
        "numerics": options.numerics,
        "text": text_digest(texts),
        "windows": len(sequences),
        "fp8_kv": fp8_kv,
    }
    logger.info("calibrating on %d tokens", walk.num_tokens)
    start = time.perf_counter()
    with job.started(Path(out), recipe, progress) as output:
        unreached = 0
        for layer_id in range(walk.config.num_layers):
            layer = Layer(walk, job, options, output, layer_id, fp8_kv)
            layer.make()
            unreached += layer.unreached
    if unreached:
        report_unreached(unreached)
    return job.report(time.perf_counter() - start)


class Layer:
    """One decoder layer on its way from plain to quantised."""

    def __init__(self, walk: Walk, job: Job, options: Options, out: Output, layer_id: int, fp8_kv: bool) -> None:
        self.walk, self.options, self.out, self.layer_id, self.fp8_kv = walk, options, out, layer_id, fp8_kv
        self.readers = {site: readers(walk, layer_id, site) for site in SITES}
        self.mixture = any(len(found) > 1 for found in self.readers.values())
        every = {site: {module for modules in found for module in modules} for site, found in self.readers.items()}
        self.groups = {site: [g for g in job.plan.groups if set(g.modules) & every[site]] for site in SITES}
        self.unreached = 0
        self.infos: dict[str, TensorInfo] = {m: i for gs in self.groups.values() for g in gs for m, i in g.members}
        self.names = [name for groups in self.groups.values() for group in groups for name in job.names(group)]
        self.prefix = f"model.layers.{layer_id}"
        # what AWQ multiplies: columns by input, rows by output; None until folded
        self.columns: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}

    def make(self) -> None:
        """Quantise, write, and run the layer as quantised; or only run it where an earlier run finished it."""
        run = LayerRun(self.walk, self.layer_id)
        if self.out.has_all(self._written_names()):
            self._read_back()
            run.through()
        else:
            if self.options.folds:
                self._fold()
            for site in SITES:
                run.to(site)
                self._make_site(site, run.inputs(site))
            run.end()
            if self.fp8_kv:
                self.out.write_kv_scales(f"{self.prefix}.self_attn", cache_scales(run.kv_amax))
        self.out.advance(self._num_bytes())
        self.walk.ckpt.linears.clear()
        self.walk.ckpt.tensors.clear()

    def _written_names(self) -> list[str]:
        norms = [f"{self.prefix}.{name}.weight" for name in _NORM_BEFORE.values()] if self.options.folds else []
        kv = [f"{self.prefix}.self_attn.{n}" for n in ("k_proj.k_scale", "v_proj.v_scale")] if self.fp8_kv else []
        return [*self.names, *norms, *kv]

    def _num_bytes(self) -> int:
        return sum(info.nbytes for groups in self.groups.values() for group in groups for _, info in group.members)

    def _plain(self, module: str) -> Tensor:
        """The module's weight in float32, folded as far as it has been. CheckpointError where it is not finite."""
        stored = self.walk.ckpt.tensor(f"{module}.weight")
        largest(self.walk.kernels, stored, self.infos[module])
        weight = stored.to(torch.float32)
        if module in self.columns:
            weight = weight * self.columns[module]
        if module in self.rows:
            weight = weight / self.rows[module].unsqueeze(1)
        return weight

    def _bias(self, module: str) -> Tensor | None:
        name = f"{module}.bias"
        return self.walk.ckpt.tensor(name) if self.walk.ckpt.has(name) else None

    def _make_site(self, site: str, inputs: list[Input]) -> None:
        """An expert that no token was sent to is made as one that saw every row its siblings saw."""
        largest, missed = largest_inputs(inputs)
        self.unreached += missed if site == "down" else 0
        for each in inputs:
            groups = [g for g in self.groups[site] if set(g.modules) & set(each.modules)]
            if not groups:
                continue
            input_scale = input_scale_of(largest[each.modules], each.modules)
            rows = each.take() or [part for other in inputs for part in other.take()]
            self._make_groups(groups, rows, input_scale)

    def _make_groups(self, groups: Sequence[Group], rows: list[Tensor], input_scale: float) -> None:
        for group in groups:
            parts = [self._plain(module) for module in group.modules]
            if group.stored == "fp8":
                made: Sequence[NVFP4Weight | FP8Weight] = [self._fp8(part, input_scale) for part in parts]
            else:
                hessian = hessian_of(rows, input_scale if self.options.numerics == "w4a4" else None)
                made = self._nvfp4(parts, hessian, input_scale)
            for module, weight in zip(group.modules, made, strict=True):
                self._keep(module, weight)

    def _fp8(self, part: Tensor, input_scale: float) -> FP8Weight:
        codes, scale = fp8_per_tensor(part, part.abs().max())
        return FP8Weight(codes, scale.reshape(1, 1), (part.shape[0], part.shape[1]), input_scale * codec.E2M1_MAX)

    def _nvfp4(self, parts: list[Tensor], hessian: Tensor, input_scale: float) -> list[NVFP4Weight]:
        """Parts that share an input, quantised under one tensor scale against one Hessian."""
        rows = [part.shape[0] for part in parts]
        w = torch.cat(parts)
        scale_2 = tensor_scale(self.walk.kernels.largest(DenseWeight(w)), self.options.blocks)
        importance = relative(hessian.diagonal())
        if self.options.compensates:
            choose = self._chooser(scale_2, importance)
            packed, scales = gptq(w, inverse_factor(hessian), scale_2, choose)
        else:
            one = nvfp4(self.walk.kernels, w, scale_2, self.options.blocks, importance)
            packed, scales = one.packed, one.block_scale
        raw = scales.view(torch.uint8)
        return [
            NVFP4Weight(p.contiguous(), s.contiguous().view(torch.float8_e4m3fn), scale_2.reshape(1), (n,), input_scale)
            for p, s, n in zip(torch.split(packed, rows), torch.split(raw, rows), rows, strict=True)
        ]

    def _chooser(self, scale_2: Tensor, importance: Tensor) -> Callable[[Tensor, int], Tensor]:
        def choose(block: Tensor, first: int) -> Tensor:
            counts = importance[first : first + codec.BLOCK].contiguous()
            return nvfp4(self.walk.kernels, block, scale_2, self.options.blocks, counts).block_scale

        return choose

    def _keep(self, module: str, weight: NVFP4Weight | FP8Weight) -> None:
        """Write a finished weight and let the layer run with it."""
        assert weight.input_scale is not None
        write = self._write_missing
        if isinstance(weight, NVFP4Weight):
            write_nvfp4(module, weight, write)
        else:
            write_fp8(module, weight.codes, weight.scale.reshape(()), write)
        write(f"{module}.input_scale", torch.tensor(weight.input_scale, dtype=torch.float32))
        self.walk.ckpt.linears[module] = with_bias(weight, self._bias(module))

    def _write_missing(self, name: str, tensor: Tensor) -> None:
        if not self.out.has(name):
            self.out.write(name, tensor)

    def _read_back(self) -> None:
        """The layer as an earlier run wrote it."""
        read = self.out.read
        for groups in self.groups.values():
            for group in groups:
                for module, info in group.members:
                    scale = float(read(f"{module}.input_scale"))
                    weight, scales = read(f"{module}.weight"), read(f"{module}.weight_scale")
                    made: NVFP4Weight | FP8Weight
                    if group.stored == "fp8":
                        made = FP8Weight(weight, scales.reshape(1, 1), (info.shape[0], info.shape[1]), scale)
                    else:
                        scale_2 = read(f"{module}.weight_scale_2").reshape(1)
                        made = NVFP4Weight(weight, scales, scale_2, (info.shape[0],), scale)
                    self.walk.ckpt.linears[module] = with_bias(made, self._bias(module))
        if self.options.folds:
            for norm in _NORM_BEFORE.values():
                name = f"{self.prefix}.{norm}.weight"
                self.walk.ckpt.tensors[name] = read(name)

    def _fold(self) -> None:
        """Find AWQ's factors of the four inputs on the plain layer, and fold each into what comes before it."""
        states = self.walk.states()
        run = LayerRun(self.walk, self.layer_id)
        sites = ("qkv", "o") if self.mixture else SITES  # the norm before experts feeds the router, which stays plain
        hessians = {site: hessian_of(run.to(site)) for site in sites}
        self.walk.restore(states)
        for site in ("gate_up", "down", "qkv", "o"):
            if site not in hessians or not self._can_fold(site):
                continue
            modules = site_modules(self.layer_id, site)
            w = torch.cat([self._plain(module) for module in modules])
            repeats = self._value_channels() if site == "o" else None
            factors, exponent = awq.search(w, hessians[site], self._round_trip, repeats)
            if exponent == 0:
                continue
            self._apply(site, modules, factors, repeats)
            logger.debug("%s: exponent %.1f for %s", self.prefix, exponent, site)
        for norm in _NORM_BEFORE.values():
            name = f"{self.prefix}.{norm}.weight"
            self._write_missing(name, self.walk.ckpt.tensor(name))

    def _apply(self, site: str, modules: Sequence[str], factors: Tensor, repeats: Tensor | None) -> None:
        if site in _NORM_BEFORE:
            name = f"{self.prefix}.{_NORM_BEFORE[site]}.weight"
            self.walk.ckpt.tensors[name], factors = awq.fold_into_norm(self.walk.ckpt.tensor(name), factors)
        else:
            producer = f"{self.prefix}.{_LINEAR_BEFORE[site]}"
            if repeats is None:
                self.rows[producer] = factors
            else:
                self.rows[producer] = torch.empty(int(repeats.max()) + 1).index_copy_(0, repeats, factors)
        self.columns |= dict.fromkeys(modules, factors)

    def _can_fold(self, site: str) -> bool:
        """Whether all that reads this input is NVFP4, and so is the linear before it, which must have no bias."""
        nvfp4_modules = {m for groups in self.groups.values() for g in groups if g.stored == "nvfp4" for m in g.modules}
        if not set(site_modules(self.layer_id, site)) <= nvfp4_modules:
            return False
        if site in _NORM_BEFORE:
            return True
        producer = f"{self.prefix}.{_LINEAR_BEFORE[site]}"
        return producer in nvfp4_modules and self._bias(producer) is None

    def _value_channels(self) -> Tensor:
        """For each input of o_proj, the output of v_proj it comes from: int64 [heads * head_dim]."""
        config = self.walk.config
        values = torch.arange(config.num_kv_heads * config.head_dim).reshape(config.num_kv_heads, config.head_dim)
        return values.repeat_interleave(config.num_heads // config.num_kv_heads, dim=0).flatten()

    def _round_trip(self, w: Tensor, importance: Tensor) -> Tensor:
        scale_2 = tensor_scale(self.walk.kernels.largest(DenseWeight(w)), self.options.blocks)
        return nvfp4(self.walk.kernels, w, scale_2, self.options.blocks, relative(importance)).dequantize()


_NORM_BEFORE = {"qkv": "input_layernorm", "gate_up": "post_attention_layernorm"}
_LINEAR_BEFORE = {"o": "self_attn.v_proj", "down": "mlp.up_proj"}


def hessian_of(inputs: Sequence[Tensor], input_scale: float | None = None) -> Tensor:
    """X^T X over all steps, fp32 [K, K]; of X as W4A4 quantises it where an input scale is given."""
    k = inputs[0].shape[1]
    total = torch.zeros((k, k))
    for x in inputs:
        if input_scale is not None:
            x = codec.activation_operand(x, torch.tensor(input_scale)).to(torch.float32) * input_scale
        x = x.to(torch.float32)
        total.addmm_(x.t(), x)
    return total


def relative(importance: Tensor) -> Tensor:
    """Scaled to a mean of 1. An input that was never active counts a thousandth: its weights still round sensibly."""
    mean = importance.mean()
    if float(mean) == 0:
        return torch.ones_like(importance)
    return (importance / mean).clamp(min=1e-3).contiguous()


def with_bias(weight: NVFP4Weight | FP8Weight, bias: Tensor | None) -> Weight:
    return replace(weight, bias=bias)
