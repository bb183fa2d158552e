"""The Blackwell backend: NVFP4 weights times NVFP4 activations on FP4 tensor cores. Everything else is Triton's.

It takes W4A4 linears only. W4A16 gains nothing from FP4 tensor cores: its activations have 16 bits. Importing this
needs neither a GPU nor Triton.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nvfp4_runtime.config import Numerics
from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.blackwell import probe
from nvfp4_runtime.kernels.blackwell.capability import capability, refuses_machine, tile_for
from nvfp4_runtime.kernels.blackwell.linear import BlackwellLinear, upload
from nvfp4_runtime.kernels.ops import (
    ActivationSpec,
    AttentionKernel,
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
from nvfp4_runtime.nvfp4.fp8 import FP8Weight
from nvfp4_runtime.nvfp4.weight import DenseWeight, NVFP4Weight, Weight

logger = logging.getLogger(__name__)

_PROBED_ROWS = 128


class BlackwellBackend:
    """W4A4 linears of compute capability 10.0, 10.3, 12.0 and 12.1.

    device  where weights go; None: the current CUDA device

    `fastest_numerics` is W4A16, which Triton runs: decoding reads the same bytes in both, below a few hundred rows
    others measured FP4 GEMMs behind BF16 ones, and W4A16 does not round activations. --numerics w4a4 asks for W4A4.
    Not `row_invariant`: the number of rows decides which kernel runs.
    """

    name = "blackwell"
    fastest_numerics: Numerics = "w4a16"
    row_invariant = False

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cuda")

    @functools.cached_property
    def missing(self) -> str | None:
        """Why this machine cannot run it, or None; the first call multiplies known matrices on the GPU."""
        if (reason := refuses_machine(self.device)) is not None:
            return reason
        plain = functools.partial(self._make, few=False)
        return probe.check(plain, _PROBED_ROWS, self.device) or probe.check(plain, 1, self.device)

    @functools.cached_property
    def few_tokens_missing(self) -> str | None:
        """Why few rows go to scaled_mm instead of the kernel made for them, or None."""
        tile, reason = tile_for(capability(self.device))
        if tile is not None:
            found = (probe.check(functools.partial(self._make, few=True), m, self.device) for m in (1, 17, 64))
            reason = next((wrong for wrong in found if wrong is not None), "")
        if reason:
            logger.warning("blackwell: few rows run in scaled_mm, slower: %s", reason)
        return reason or None

    def refuses(self, spec: OpSpec) -> str | None:
        if not isinstance(spec, LinearSpec):
            return "runs plain linear layers only"
        if spec.weight != "nvfp4" or spec.numerics != "w4a4":
            return f"multiplies NVFP4 by NVFP4 (w4a4) only, asked for {spec.weight} weights in {spec.numerics}"
        if spec.dtype != "bfloat16":
            return f"activations are bfloat16, asked for {spec.dtype}"
        if spec.out_dtype not in ("bfloat16", "float32"):
            return f"results are bfloat16 or float32, asked for {spec.out_dtype}"
        return self.missing

    def linear(self, weight: Weight, spec: LinearSpec) -> LinearKernel:
        assert isinstance(weight, NVFP4Weight)  # refuses
        return self._make(weight, few=self.few_tokens_missing is None, spec=spec)

    def _make(self, weight: NVFP4Weight, few: bool, spec: LinearSpec | None = None) -> BlackwellLinear:
        from nvfp4_runtime.kernels.blackwell.few_tokens import MAX_TOKENS, FewTokens
        from nvfp4_runtime.kernels.blackwell.quantize import ActivationQuantizer

        spec = spec or LinearSpec(weight.n, weight.k, "nvfp4", "w4a4", "bfloat16", "bfloat16")
        assert weight.input_scale is not None
        operand = upload(weight, self.device)
        quantizer = ActivationQuantizer(weight.input_scale, weight.k, operand.codes.shape[1] * 2, emulated=False)
        make_few = None
        if few:
            tile = tile_for(capability(self.device))[0]
            assert tile is not None
            num_sms = torch.cuda.get_device_properties(self.device).multi_processor_count
            out_dtype: torch.dtype = getattr(torch, spec.out_dtype)

            def make_few(whole: Any, multipliers: Tensor, bias: Tensor | None) -> FewTokens:
                return FewTokens(whole, weight.n, multipliers, bias, out_dtype, tile, num_sms, emulated=False)

        return BlackwellLinear(operand, weight, spec, quantizer, make_few, MAX_TOKENS)

    def grouped_linear(self, weights: Sequence[Weight], spec: GroupedLinearSpec) -> GroupedLinearKernel:
        raise KernelError(self._not_here(spec))

    def quantize(
        self,
        weight: DenseWeight,
        spec: QuantizeSpec,
        scale_2: Tensor | None = None,
        importance: Tensor | None = None,
    ) -> FP8Weight | NVFP4Weight:
        raise KernelError(self._not_here(spec))

    def largest(self, weight: Tensor) -> Tensor:
        raise KernelError(f"{self.name}: runs plain linear layers only; expected another backend to look at weights")

    def rms_norm(self, spec: NormSpec) -> RMSNormKernel:
        raise KernelError(self._not_here(spec))

    def silu_mul(self, spec: ActivationSpec) -> Callable[[Tensor], Tensor]:
        raise KernelError(self._not_here(spec))

    def relu_squared(self, spec: ReluSquaredSpec) -> Callable[[Tensor], Tensor]:
        raise KernelError(self._not_here(spec))

    def rope_and_cache(self, spec: RopeSpec) -> RopeKernel:
        raise KernelError(self._not_here(spec))

    def paged_attention(self, spec: PagedAttentionSpec) -> AttentionKernel:
        raise KernelError(self._not_here(spec))

    def mla_decode(self, spec: MLASpec) -> MLAKernel:
        raise KernelError(self._not_here(spec))

    def mamba2(self, spec: Mamba2Spec) -> Mamba2Kernel:
        raise KernelError(self._not_here(spec))

    def gated_delta(self, spec: DeltaSpec) -> DeltaKernel:
        raise KernelError(self._not_here(spec))

    def describe(self) -> dict[str, Any]:
        if self.missing is not None:
            return {"status": self.missing}
        return {
            "device": torch.cuda.get_device_name(self.device),
            "capability": capability(self.device),
            "torch": torch.__version__,
            "few rows": self.few_tokens_missing or "own kernel",
        }

    def _not_here(self, spec: OpSpec) -> str:
        """Whoever asks after `refuses` said no."""
        return f"{self.name} was asked for {spec.kind} although it refuses it: {self.refuses(spec)}"
