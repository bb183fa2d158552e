"""NVFP4 against MXFP4 on values: block 16 or 32, scales E4M3 or E8M0, four corners."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from nvfp4_runtime.checkpoint.shards import Shards
from nvfp4_runtime.distill.reproduce.blocks import gaussian, laplace, nmse, outlier_channels
from nvfp4_runtime.distill.reproduce.table import Row
from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.kernels.registry import Kernels, available_backends
from nvfp4_runtime.quantize.calibrate import tokenize
from nvfp4_runtime.quantize.default_model import calibration_texts, default_bf16
from nvfp4_runtime.quantize.layerwise import SITES, LayerRun, Overlay, Walk, windows

_CORNERS = ((16, "e4m3"), (32, "e4m3"), (16, "ocp"), (32, "ocp"), (32, "ceil"))
_LAYERS = (0, 14, 29)  # of the default model's 30


def run() -> list[Row]:
    rows = [_row(name, x) for name, x in _synthetic()]
    try:
        folder = default_bf16(progress=False)
    except ConfigError as error:
        rows.append(Row("the same on a real model", "the default model", str(error), "cannot be measured here"))
        return rows
    rows.append(_row("weights of SmolLM2-135M-Instruct, layers 0, 14, 29 (their only public copy was Q4_1: blocks of "
                     "32 with 16 levels, so no untouched weights)", _weights(folder)))  # fmt: skip
    rows.append(_row("inputs of its linear layers over the packaged calibration text", _activations(folder)))
    return rows


def _synthetic() -> Iterator[tuple[str, Tensor]]:
    yield "Gaussian", gaussian()
    yield "Laplace", laplace()
    yield "Gaussian with outlier channels (1 of 64, 20 times larger)", outlier_channels()


def _row(name: str, x: Tensor) -> Row:
    found = {(block, kind): nmse(x, block, kind) for block, kind in _CORNERS}  # type: ignore[arg-type]
    ours = ", ".join(
        f"{kind.upper() if kind == 'e4m3' else f'E8M0 {kind}'}/{b} {v:.4f}" for (b, kind), v in found.items()
    )
    nvfp4, mxfp4 = found[16, "e4m3"], min(found[32, "ocp"], found[32, "ceil"])
    return Row(
        "NVFP4 errs less than MXFP4",
        f"{name}: squared error over squared values, scale/block",
        f"{ours}; NVFP4 {nvfp4 / mxfp4 - 1:+.0%} against the better MXFP4",
        "reproduces" if nvfp4 < mxfp4 else "does not reproduce",
    )


def _weights(folder: Path) -> Tensor:
    shards = Shards(folder)
    names = [i.name for i in shards if any(f"layers.{n}." in i.name for n in _LAYERS) and "proj" in i.name]
    return torch.cat([shards.read(name).to(torch.float32).flatten() for name in names])


def _activations(folder: Path) -> Tensor:
    sequences = windows(tokenize(folder, calibration_texts(folder)), 2)
    walk = Walk(Overlay.over(folder), Kernels(available_backends("auto"), "bfloat16"), sequences)
    found = []
    for layer_id in range(walk.config.num_layers):
        layer = LayerRun(walk, layer_id)
        for site in SITES:
            inputs = layer.to(site)
            if layer_id in _LAYERS:
                found += [x.to(torch.float32).flatten().clone() for x in inputs]
        layer.end()
    return torch.cat(found)
