"""Which backend runs which op: decided once, at load, and reported."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from torch import Tensor

from nvfp4_runtime.config import SILU, Dtype, Gate, Numerics
from nvfp4_runtime.errors import ConfigError, KernelError, NoBackendError
from nvfp4_runtime.kernels.ops import (
    WEIGHT_ONLY_NUMERICS,
    ActivationSpec,
    AttentionKernel,
    Backend,
    DeltaKernel,
    DeltaSpec,
    GroupedLinearKernel,
    GroupedLinearSpec,
    LinearKernel,
    LinearSpec,
    Mamba2Kernel,
    Mamba2Spec,
    MLAKernel,
    MLASpec,
    NormSpec,
    OpSpec,
    PagedAttentionSpec,
    QuantizeSpec,
    ReluSquaredSpec,
    RMSNormKernel,
    RopeKernel,
    RopeSpec,
)
from nvfp4_runtime.kernels.transfer import to_device
from nvfp4_runtime.kernels.whole_ops import (
    DecoderKernel,
    DecoderOps,
    LatentKernel,
    LatentOps,
    MixtureKernel,
    MixtureOps,
    RunsLayersWhole,
)
from nvfp4_runtime.nvfp4.block_scales import BlockMethod
from nvfp4_runtime.nvfp4.fp8 import FP8Weight
from nvfp4_runtime.nvfp4.weight import DenseWeight, NVFP4Weight, Weight

logger = logging.getLogger(__name__)

PREFERENCE: dict[str, tuple[str, ...]] = {"cuda": ("blackwell", "triton", "reference"), "cpu": ("cpu", "reference")}


def choose(spec: OpSpec, backends: Sequence[Backend]) -> tuple[Backend, dict[str, str]]:
    """The first backend that accepts `spec`, and why those before it refused; NoBackendError lists every refusal."""
    refusals: dict[str, str] = {}
    for backend in backends:
        if (reason := backend.refuses(spec)) is None:
            return backend, refusals
        refusals[backend.name] = reason
    raise NoBackendError(spec, refusals)


def available_backends(
    name: str = "auto", threads: int | None = None, device: Literal["cpu", "cuda"] = "cpu"
) -> list[Backend]:
    """Backends by preference for tensors on `device`.

    Asking for one by name gives a list of one: it runs there, or ConfigError says why it cannot.
    """
    from nvfp4_runtime.kernels.blackwell.backend import BlackwellBackend
    from nvfp4_runtime.kernels.cpu.backend import CPUBackend
    from nvfp4_runtime.kernels.reference.backend import ReferenceBackend
    from nvfp4_runtime.kernels.triton.backend import TritonBackend

    makers: dict[str, Callable[[], Backend]] = {
        "blackwell": BlackwellBackend,
        "triton": TritonBackend,
        "cpu": lambda: CPUBackend(threads=threads),
        "reference": lambda: ReferenceBackend(threads, torch.device(device)),
    }
    if name == "auto":
        return [makers[known]() for known in PREFERENCE[device]]
    if name not in makers:
        raise ConfigError(f"unknown backend {name!r}; expected one of auto, {', '.join(makers)}", "--backend")
    backend = makers[name]()
    if isinstance(backend, CPUBackend | TritonBackend | BlackwellBackend) and backend.missing is not None:
        raise ConfigError(f"the {name} backend was asked for: {backend.missing}", "--backend")
    return [backend]


@dataclass(frozen=True)
class Choice:
    """One op's record for the precision report. Ops without weights have stored "-" and no bytes."""

    group: str
    stored: str
    bits_per_weight: float
    num_bytes: int
    backend: str
    numerics: str
    reason: str


W = TypeVar("W")


Samples = dict[LinearSpec | GroupedLinearSpec, tuple[Sequence[Weight], LinearKernel | GroupedLinearKernel, str]]


@dataclass
class Kernels:
    """Hands layers their kernels and remembers every choice. One per loaded model.

    backends  by preference
    numerics  of NVFP4 layers; "auto" is what the first backend that runs them does fastest; see docs/numerics.md
    dtype     of activations that enter a multiplication by weights
    stream    of activations between ops (see kernels/ops.py)
    device    where the kernels run: layers put what they hold beside weights there, by `place`
    observe   wraps every linear kernel with the module prefixes it serves: how calibration sees each layer's input.
              Layers therefore pass `names` to `linear`, e.g. names=["model.layers.0.self_attn.q_proj", "...k_proj",
              "...v_proj"] for one fused kernel: the same prefixes they gave to Checkpoint.linear.
    samples   where a dict is given: weight, kernel and backend of each distinct linear, for kernels/self_test.py
    chosen    the backend of each distinct op without weights
    """

    backends: Sequence[Backend]
    dtype: Dtype
    numerics: Numerics | Literal["auto"] = "auto"
    stream: Dtype = "float32"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    observe: Callable[[tuple[str, ...], LinearKernel], LinearKernel] | None = None
    choices: list[Choice] = field(default_factory=list)
    samples: Samples | None = None
    chosen: dict[OpSpec, Backend] = field(default_factory=dict)
    _logged: set[OpSpec] = field(default_factory=set)

    def place(self, tensor: Tensor) -> Tensor:
        """`tensor` on the kernels' device; itself where it is there already."""
        return to_device(tensor, self.device)

    def resolved_numerics(self) -> tuple[Numerics, str]:
        """The arithmetic of NVFP4 layers, and why."""
        if self.numerics != "auto":
            return self.numerics, "asked for"
        for backend in self.backends:
            numerics = backend.fastest_numerics
            if backend.refuses(LinearSpec(16, 16, "nvfp4", numerics, self.dtype, self.stream)) is None:
                return numerics, f"auto: what {backend.name} runs fastest"
        return "w4a16", "auto: no backend runs NVFP4 layers"

    def linear(
        self,
        group: str,
        weight: Weight,
        names: Sequence[str] = (),
        made_from: str | None = None,
        out_dtype: Dtype | None = None,
        counted: bool = True,
    ) -> LinearKernel:
        """A kernel for `weight`; `group` names the kind of layer ("qkv_proj", "lm_head") in the report.

        `names` are the module prefixes of the parts fused into `weight`, in order; only `observe` uses them.
        `made_from` is the format the checkpoint stores, where `weight` was quantised from it at load. Such a weight has
        no calibrated input_scale, so it runs W4A16 where W4A4 was asked for; the report says so.
        `out_dtype` is the results' type, None: the stream's. `counted` False: another kernel's weight once more, whose
        bytes the report has already.
        """
        spec = self.linear_spec(group, weight, made_from)
        if out_dtype is not None:
            spec = dataclasses.replace(spec, out_dtype=out_dtype)
        backend, reason = self._choose(spec)
        kernel = backend.linear(weight, spec)
        self._record_weights(group, [weight] if counted else [], spec, backend, reason, made_from)
        if self.samples is not None:
            self.samples.setdefault(spec, ([weight], kernel, backend.name))
        return kernel if self.observe is None else self.observe(tuple(names), kernel)

    def linear_spec(self, group: str, weight: Weight, made_from: str | None = None) -> LinearSpec:
        """What running `weight` asks of a backend. ConfigError where the numerics cannot be had."""
        numerics = self.resolved_numerics()[0] if isinstance(weight, NVFP4Weight) else None
        if isinstance(weight, NVFP4Weight) and numerics == "w4a4" and weight.input_scale is None:
            if made_from is None:
                raise ConfigError(
                    f"w4a4 needs an input_scale for every NVFP4 layer and {group} has none in this checkpoint; "
                    "use --numerics w4a16, or quantise with --calib",
                    "--numerics",
                )
            numerics = "w4a16"
        return LinearSpec(
            weight.n,
            weight.k,
            weight.format,
            numerics,
            self.dtype,
            self.stream,
            weight.block if isinstance(weight, FP8Weight) else None,
        )

    def _record_weights(
        self,
        group: str,
        weights: Sequence[Weight],
        spec: LinearSpec | GroupedLinearSpec,
        backend: Backend,
        reason: str,
        made_from: str | None = None,
    ) -> None:
        stored, num_bytes = spec.weight if weights else "-", sum(w.nbytes for w in weights)
        numerics = spec.numerics or WEIGHT_ONLY_NUMERICS.get(spec.weight, "dense")
        reasons = [reason] if reason else []
        if made_from is not None:
            reasons.insert(0, f"quantised at load from {made_from}")
            if spec.numerics == "w4a16" and self.numerics == "w4a4":
                reasons.append("w4a4 needs a calibrated input_scale, which it has not")
        bits = 8 * num_bytes / sum(w.n * w.k for w in weights) if weights else 0.0
        self.choices.append(Choice(group, stored, bits, num_bytes, backend.name, numerics, "; ".join(reasons)))

    def rms_norm(self, hidden: int, out_dtype: Dtype | None = None) -> RMSNormKernel:
        """`out_dtype` is the normed rows' type, None: that of inputs of multiplications."""
        spec = NormSpec(hidden, self.stream, out_dtype or self.dtype)
        return self._record(spec).rms_norm(spec)

    def silu_mul(self, width: int, gate: Gate = SILU) -> Callable[[Tensor], Tensor]:
        spec = ActivationSpec(width, self.stream, self.dtype, gate)
        return self._record(spec).silu_mul(spec)

    def relu_squared(self, width: int) -> Callable[[Tensor], Tensor]:
        spec = ReluSquaredSpec(width, self.stream, self.dtype)
        return self._record(spec).relu_squared(spec)

    def rope_and_cache(self, spec: RopeSpec) -> RopeKernel:
        return self._record(spec).rope_and_cache(spec)

    def paged_attention(self, spec: PagedAttentionSpec) -> AttentionKernel:
        return self._record(spec).paged_attention(spec)

    def mla_decode(self, spec: MLASpec) -> MLAKernel:
        return self._record(spec).mla_decode(spec)

    def mamba2(self, spec: Mamba2Spec) -> Mamba2Kernel:
        return self._record(spec).mamba2(spec)

    def gated_delta(self, spec: DeltaSpec) -> DeltaKernel:
        return self._record(spec).gated_delta(spec)

    def grouped_linear(self, group: str, weights: Sequence[Weight], names: Sequence[str] = ()) -> GroupedLinearKernel:
        """One kernel for all experts' `weights`, alike in shape and format; each keeps its own scales.

        Raises KernelError when they are not alike. `names` are the experts' module prefixes, for errors.
        """
        if not weights:
            raise KernelError(f"{group}: a grouped layer needs at least one expert, found none")
        specs = [
            self.linear_spec(f"{group} {name}", w)
            for w, name in zip(weights, names or map(str, range(len(weights))), strict=True)
        ]
        if different := [i for i, spec in enumerate(specs) if spec != specs[0]]:
            raise KernelError(
                f"{group}: all experts must be alike; expert {different[0]} is {specs[different[0]]}, "
                f"expert 0 is {specs[0]}"
            )
        if len({w.bias is None for w in weights}) != 1:
            raise KernelError(f"{group}: either every expert has a bias or none has")
        one = specs[0]
        spec = GroupedLinearSpec(
            len(weights), one.n, one.k, one.weight, one.numerics, one.dtype, one.out_dtype, one.block
        )
        backend, reason = self._choose(spec)
        kernel = backend.grouped_linear(weights, spec)
        self._record_weights(group, weights, spec, backend, reason)
        if self.samples is not None:
            self.samples.setdefault(spec, (weights, kernel, backend.name))
        return kernel

    def quantize(
        self,
        weight: DenseWeight,
        form: Literal["fp8", "nvfp4"],
        method: BlockMethod = "max",
        scale_2: Tensor | None = None,
        importance: Tensor | None = None,
    ) -> FP8Weight | NVFP4Weight:
        """`weight` in another format, as nvfp4/fp8.py (a scale per row) or nvfp4/block_scales.py defines it.

        scale_2     NVFP4's tensor scale where fused parts share one; None: from this weight's own maximum
        importance  fp32 [K], see block_scales.quantize

        Raises ValueError on NaN or Inf, NVFP4ShapeError when K does not suit.
        """
        spec = QuantizeSpec(weight.n, weight.k, weight.format, form, method)
        return self._choose(spec)[0].quantize(weight, spec, scale_2, importance)

    def largest(self, weight: DenseWeight) -> Tensor:
        """The largest magnitude, fp32 []; NaN where the weight holds NaN or Inf."""
        return self._choose(QuantizeSpec(weight.n, weight.k, weight.format, "nvfp4"))[0].largest(weight.weight)

    def decoder(self, ops: DecoderOps) -> DecoderKernel | None:
        """Everything before the head as one call where a backend has that; None: call their ops one by one."""
        return self._whole("decoder", lambda backend: backend.decoder(ops))

    def mixture(self, ops: MixtureOps) -> MixtureKernel | None:
        """The routed part of a mixture, likewise."""
        return self._whole("mixture", lambda backend: backend.mixture(ops))

    def latent(self, ops: LatentOps) -> LatentKernel | None:
        """Latent attention between its projections, likewise."""
        return self._whole("latent", lambda backend: backend.latent(ops))

    def _whole(self, group: str, make: Callable[[RunsLayersWhole], W | str]) -> W | None:
        refusals: list[str] = []
        for backend in self.backends:
            if not isinstance(backend, RunsLayersWhole):
                refusals.append(f"{backend.name}: calls ops one by one")
                continue
            made = make(backend)
            if not isinstance(made, str):
                self.choices.append(Choice(group, "-", 0.0, 0, backend.name, self.stream, "; ".join(refusals)))
                return made
            refusals.append(f"{backend.name}: {made}")
        logger.info("%s: op by op (%s)", group, "; ".join(refusals))
        return None

    def record_fusion(self, producer: str, group: str) -> None:
        """The op `producer` writes the input of the linears `group` quantised: a line of its own in the report."""
        backend = next(c.backend for c in reversed(self.choices) if c.group == producer)
        reason = "writes its result as NVFP4, scales swizzled"
        self.choices.append(Choice(f"{producer} -> {group}", "-", 0.0, 0, backend, "w4a4", reason))

    def _record(
        self,
        spec: NormSpec
        | ActivationSpec
        | ReluSquaredSpec
        | RopeSpec
        | PagedAttentionSpec
        | MLASpec
        | Mamba2Spec
        | DeltaSpec,
    ) -> Backend:
        backend, reason = self._choose(spec)
        self.chosen[spec] = backend
        self.choices.append(Choice(spec.kind, "-", 0.0, 0, backend.name, spec.dtype, reason))
        return backend

    def _choose(self, spec: OpSpec) -> tuple[Backend, str]:
        """The backend for `spec`, and why those before it refused."""
        backend, refusals = choose(spec, self.backends)
        reason = "; ".join(f"{name}: {why}" for name, why in refusals.items())
        if spec not in self._logged:
            self._logged.add(spec)
            logger.info("%s -> %s%s", spec, backend.name, f" ({reason})" if reason else "")
        return backend, reason
