"""Mixed precision under a bits budget: what each layer costs in KL when only it is NVFP4, and who gets more bits.

One pass through the model, a layer in memory at a time: beside the text's hidden states run copies of them, one per
fused group, that differ by that group being quantised. KL to the untouched states is taken at the end.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.kernels.registry import Kernels, available_backends
from nvfp4_runtime.layers.head import lm_head
from nvfp4_runtime.layers.norm import RMSNorm
from nvfp4_runtime.nvfp4.block_scales import tensor_scale
from nvfp4_runtime.quantize.calibrate import tokenize
from nvfp4_runtime.quantize.layerwise import SITES, LayerRun, Overlay, Step, Walk, site_modules, windows
from nvfp4_runtime.quantize.plan import Format, Group, Plan
from nvfp4_runtime.quantize.weights import bits_per_weight, fp8_per_tensor, largest, nvfp4

logger = logging.getLogger(__name__)

NUM_WINDOWS = 2  # of 512 tokens, all in one step: every group keeps a copy of their hidden states
LOGIT_ROWS = 256  # positions whose logits are in memory at once


@dataclass(frozen=True)
class Sensitivity:
    """What one fused group costs: KL in nats per token when only it is quantised."""

    nvfp4: float
    fp8: float


def measure(
    folder: str | Path, texts: Sequence[str], plan: Plan, *, backend: str = "auto", progress: bool = True
) -> dict[str, Sensitivity]:
    """Fused-group key -> its sensitivity, over two windows of 512 tokens of `texts`.

    NVFP4 by block-scale search is measured. FP8 is taken to be as much smaller as its squared error of the weights is:
    KL is quadratic in small errors. Raises ConfigError, CheckpointError.
    """
    kernels = Kernels(available_backends(backend), "float32")  # small differences drown in bfloat16's rounding
    walk = Walk(Overlay.over(folder), kernels, windows(tokenize(Path(folder), texts), NUM_WINDOWS))
    if walk.config.moe is not None:
        raise ConfigError(
            "a bits budget measures one layer of linears after another, and this model's are experts: say what is FP8 "
            "or plain by --fp8 and --exclude",
            "--bits-budget",
        )
    (base,) = walk.steps
    copies: dict[str, Step] = {}
    ratios: dict[str, float] = {}
    for layer_id in tqdm(range(walk.config.num_layers), desc="sensitivity", unit="layer", disable=not progress):
        before = (base.x.clone(), None if base.residual is None else base.residual.clone())
        walk.steps = [base, *copies.values()]
        LayerRun(walk, layer_id).through()
        for group in _groups_of(plan, layer_id):
            ratios[group.key] = _quantise(walk, group)
            step = replace(base, x=before[0].clone(), residual=None if before[1] is None else before[1].clone())
            walk.steps = [step]
            LayerRun(walk, layer_id).through()
            copies[group.key] = step
            walk.ckpt.linears.clear()
    divergences = _divergences(walk, base, copies)
    return {key: Sensitivity(kl, kl * ratios[key]) for key, kl in divergences.items()}


def check_budget(budget: float) -> None:
    """Raise ConfigError unless the budget is from NVFP4's own 4.5 bits per weight to less than plain weights' 16."""
    least, most = bits_per_weight("nvfp4"), bits_per_weight("plain")
    if budget >= most:
        raise ConfigError(
            f"{budget:g} bits per weight hold the plain weights ({most:g}): nothing needs quantising; expected fewer",
            "--bits-budget",
        )
    if not budget >= least:  # NaN is neither
        raise ConfigError(
            f"{budget:g} bits per weight are fewer than NVFP4 itself takes ({least:g}); expected {least:g} or more, "
            f"and fewer than {most:g}",
            "--bits-budget",
        )


def spend(plan: Plan, sensitivities: Mapping[str, Sensitivity], budget: float) -> dict[str, Format | None]:
    """Fused-group key -> format (None: plain), at most `budget` bits per weight over what the plan quantises.

    Greedy: the step (NVFP4 to FP8, or to plain; FP8 to plain) that saves most KL per bit is taken while it fits.
    Raises ConfigError as `check_budget`.
    """
    check_budget(budget)
    least = bits_per_weight("nvfp4")
    sizes = {group.key: group.num_weights for group in plan.groups}
    left = (budget - least) * sum(sizes.values())
    chosen: dict[str, Format | None] = dict.fromkeys(sizes, "nvfp4")
    while True:
        steps = [
            (saved / bits, key, better, bits)
            for key, now in chosen.items()
            for better in _BETTER[now]
            for saved, bits in [_step(sensitivities[key], now, better, sizes[key])]
            if bits <= left and saved > 0
        ]
        if not steps:
            return chosen
        _, key, better, bits = max(steps, key=lambda step: step[:2])
        chosen[key] = better
        left -= bits


_BETTER: dict[Format | None, tuple[Format | None, ...]] = {"nvfp4": ("fp8", None), "fp8": (None,), None: ()}


def _step(s: Sensitivity, now: Format | None, better: Format | None, num_weights: int) -> tuple[float, float]:
    """(KL saved, bits spent)."""
    cost = {"nvfp4": s.nvfp4, "fp8": s.fp8, None: 0.0}
    bits = bits_per_weight(better or "plain") - bits_per_weight(now or "plain")
    return cost[now] - cost[better], bits * num_weights


def _groups_of(plan: Plan, layer_id: int) -> list[Group]:
    modules = {module for site in SITES for module in site_modules(layer_id, site)}
    return [group for group in plan.groups if set(group.modules) <= modules]


def _quantise(walk: Walk, group: Group) -> float:
    """Put the group into the overlay as NVFP4; returns FP8's squared error as a share of NVFP4's."""
    weights = [walk.ckpt.tensor(info.name) for _, info in group.members]
    infos = [info for _, info in group.members]
    amax = [largest(walk.kernels, weight, info) for weight, info in zip(weights, infos, strict=True)]
    scale_2 = tensor_scale(torch.stack(amax).max(), "mse")
    fp4_error = fp8_error = 0.0
    for module, weight, own in zip(group.modules, weights, amax, strict=True):
        made = nvfp4(walk.kernels, weight, scale_2, "mse")
        codes, scale = fp8_per_tensor(weight, own)
        exact = weight.to(torch.float32)
        fp4_error += float((made.dequantize() - exact).square().sum())
        fp8_error += float((codes.to(torch.float32) * scale - exact).square().sum())
        bias = f"{module}.bias"
        walk.ckpt.linears[module] = replace(made, bias=walk.ckpt.tensor(bias) if walk.ckpt.has(bias) else None)
    return min(1.0, fp8_error / fp4_error) if fp4_error else 1.0


@torch.inference_mode()
def _divergences(walk: Walk, base: Step, copies: Mapping[str, Step]) -> dict[str, float]:
    """Mean KL of each copy's next-token distribution to the base's."""
    config, ckpt = walk.config, walk.ckpt
    norm = RMSNorm(ckpt, walk.kernels, "model.norm", config.hidden_size, config.rms_norm_eps)
    embedding = ckpt.tensor("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
    head = lm_head(ckpt, walk.kernels, config, embedding, "auto")

    def log_probs(step: Step, rows: slice) -> Tensor:
        residual = None if step.residual is None else step.residual[rows].clone()
        return torch.log_softmax(head(norm(step.x[rows].clone(), residual)[0]).to(torch.float32), dim=-1)

    totals = dict.fromkeys(copies, 0.0)
    count = base.x.shape[0]
    for start in range(0, count, LOGIT_ROWS):
        rows = slice(start, min(start + LOGIT_ROWS, count))
        wanted = log_probs(base, rows)
        weight = wanted.exp()
        for key, step in copies.items():
            totals[key] += float((weight * (wanted - log_probs(step, rows))).sum())
    return {key: max(total / count, 0.0) for key, total in totals.items()}
