"""Mamba-2, the gated delta rule and relu(x)^2 for check.py: two sequences that go on, one by a part of a prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, StateLayer
from nvfp4_runtime.kernels.gpu_bench import made
from nvfp4_runtime.kernels.gpu_bench.setting import Setting
from nvfp4_runtime.kernels.ops import (
    Backend,
    DeltaSpec,
    DeltaWeights,
    Mamba2Spec,
    Mamba2Weights,
    OpSpec,
    ReluSquaredSpec,
)

Run = Callable[[Backend], Tensor]


def cases(setting: Setting) -> Iterator[tuple[str, OpSpec, Run]]:
    """Names, specs, and what gives a backend's result together with the states it leaves."""
    device = setting.place

    def values(seed: int, *shape: int) -> Tensor:
        return made.activations(*shape, seed=seed, device=device)

    def vectors(seed: int, *shape: int) -> Tensor:
        return values(seed, *shape).to(torch.float32)

    def states(conv_width: int, conv_dim: int, *ssm: int) -> StateLayer:
        return StateLayer(vectors(35, 3, conv_width - 1, conv_dim), vectors(36, 3, *ssm))

    relu = ReluSquaredSpec(64 if setting.tiny else 4096, "bfloat16", "bfloat16")
    x = values(20, 3, relu.width)
    yield "relu_squared", relu, lambda backend: backend.relu_squared(relu)(x)
    mamba = (
        Mamba2Spec(4, 16, 16, 2, 4, "bfloat16", "bfloat16")
        if setting.tiny
        else Mamba2Spec(128, 80, 128, 8, 4, "bfloat16", "bfloat16")
    )
    delta = DeltaSpec(2, 4, 16, 16, 4, "bfloat16") if setting.tiny else DeltaSpec(16, 32, 128, 128, 4, "bfloat16")
    weights = Mamba2Weights(
        vectors(21, mamba.conv_dim, mamba.conv_width),
        vectors(22, mamba.conv_dim),
        -vectors(23, mamba.num_heads).abs() - 0.1,
        vectors(24, mamba.num_heads),
        vectors(25, mamba.num_heads),
        vectors(26, mamba.inner),
        min_step=0.001,
        eps=1e-5,
    )
    of_delta = DeltaWeights(
        vectors(27, delta.conv_dim, delta.conv_width),
        -vectors(28, delta.num_value_heads).abs() - 0.1,
        vectors(29, delta.num_value_heads),
    )
    for name, new in (("decode", [1, 1]), ("ragged", [1, 5 if setting.tiny else 60])):
        plain, _ = made.batch([9, 100], new, device)
        batch, count = dataclasses.replace(plain, state_slots=torch.tensor([2, 1], device=device)), sum(new)
        projected = values(30, count, sum(mamba.widths))
        qkv, b, dt = (
            values(31 + i, count, width) for i, width in enumerate((delta.conv_dim, *2 * (delta.num_value_heads,)))
        )

        def scan(backend: Backend, projected: Tensor = projected, batch: ForwardBatch = batch) -> Tensor:
            state = states(mamba.conv_width, mamba.conv_dim, mamba.num_heads, mamba.head_dim, mamba.state_size)
            y = backend.mamba2(mamba)(projected, weights, state, batch)
            return torch.cat([y.float().flatten(), state.ssm[1:].flatten()])

        def rule(
            backend: Backend, qkv: Tensor = qkv, b: Tensor = b, dt: Tensor = dt, batch: ForwardBatch = batch
        ) -> Tensor:
            state = states(delta.conv_width, delta.conv_dim, delta.num_value_heads, delta.value_dim, delta.key_dim)
            y = backend.gated_delta(delta)(qkv, b, dt, of_delta, state, batch)
            return torch.cat([y.flatten(), state.ssm[1:].flatten()])

        yield f"mamba2 {name}", mamba, scan
        yield f"gated_delta {name}", delta, rule
