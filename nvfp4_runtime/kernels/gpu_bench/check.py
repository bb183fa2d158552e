"""Every op of every backend on this device against the reference on the same device, at sizes near a model's.

The tests (`make test-gpu`) look closer; this is here so that no figure is printed for a kernel that computes something
else. The bound is coarse, 3 % of the reference's root mean square beside BF16's rounding: an address, a scale or a
mask that is wrong costs far more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nvfp4_runtime.config import KVDtype, Numerics
from nvfp4_runtime.kernels.gpu_bench import made, recurrences
from nvfp4_runtime.kernels.gpu_bench.setting import Setting
from nvfp4_runtime.kernels.ops import (
    ActivationSpec,
    Backend,
    GroupedLinearSpec,
    LinearSpec,
    MLASpec,
    NormSpec,
    OpSpec,
    PagedAttentionSpec,
    RopeSpec,
)
from nvfp4_runtime.kernels.registry import available_backends
from nvfp4_runtime.nvfp4 import fp8
from nvfp4_runtime.nvfp4.fp8 import FP8Weight
from nvfp4_runtime.nvfp4.mx import MXFP4Weight
from nvfp4_runtime.nvfp4.weight import DenseWeight, Weight

KV_DTYPES: tuple[KVDtype, ...] = ("bfloat16", "fp8", "nvfp4")
_RTOL, _OF_RMS = 2.0**-7, 0.03


class Case(NamedTuple):
    """One op: its spec, and how a backend's result is had."""

    name: str
    spec: OpSpec
    run: Callable[[Backend], Tensor]


def measure(setting: Setting) -> None:
    """One row per op and backend: ok and the largest excess. Why a backend refuses is said once per reason."""
    reference = available_backends("reference", device=setting.device)[0]
    others, said = tested(setting), set()
    for case in cases(setting):
        expected = case.run(reference).float()
        for backend in others:
            row = {"part": "check", "name": case.name, "backend": backend.name}
            if (reason := backend.refuses(case.spec)) is not None:
                if (backend.name, reason) not in said:
                    said.add((backend.name, reason))
                    setting.emit(row | {"refused": reason})
                continue
            with setting.attempt(row | {"ok": False}):
                found = case.run(backend).float()
                room = _RTOL * expected.abs() + _OF_RMS * expected.square().mean().sqrt()
                worst = float(((found - expected).abs() / room).max())  # NaN: not ok
                setting.emit(row | {"ok": bool(worst <= 1.0), "worst": worst})


def tested(setting: Setting) -> list[Backend]:
    """The backends of this device but the reference; a rehearsal takes Triton's under its interpreter."""
    if setting.device == "cuda":
        return [b for b in available_backends("auto", device="cuda") if b.name != "reference"]
    return available_backends("triton", device="cpu")


def cases(setting: Setting) -> Iterator[Case]:
    yield from _linears(setting)
    yield from plain_cases(setting)
    yield from _attention(setting)
    yield _mla(setting)
    yield from (Case(*case) for case in recurrences.cases(setting))


def _linears(setting: Setting) -> Iterator[Case]:
    device = setting.place
    n, k = (48, 64) if setting.tiny else (6144, 4096)
    plain = made.activations(n, k, seed=1, device=device) * k**-0.5
    codes, scale = fp8.quantize_rows(plain)
    nvfp4 = made.nvfp4_weight(n, k, 0, device)
    mx_scales = torch.full((n, k // 32), 127 - 6, dtype=torch.uint8, device=device)
    weights: list[tuple[str, Weight, Numerics | None]] = [
        ("nvfp4 w4a16", nvfp4, "w4a16"),
        ("nvfp4 w4a4", nvfp4, "w4a4"),
        ("fp8", FP8Weight(codes, scale, (1, k)), None),
        ("mxfp4", MXFP4Weight(nvfp4.packed, mx_scales), None),
        ("bf16", DenseWeight(plain.to(torch.bfloat16)), None),
    ]
    for m in (5,) if setting.tiny else (1, 3, 5, 9, 17, 33, 65, 200, 2048):
        x = made.activations(m, k, seed=m, device=device)
        for name, weight, numerics in weights:
            if numerics is None and m not in (1, 5, 33, 200):
                continue  # formats beside NVFP4 take the same kernels; fewer of their sizes are compiled
            block = weight.block if isinstance(weight, FP8Weight) else None
            spec = LinearSpec(n, k, weight.format, numerics, "bfloat16", "bfloat16", block)
            yield Case(f"linear {name} M={m}", spec, _linear(weight, spec, x))
    experts, rows = 4, 6 if setting.tiny else 96
    offsets = torch.tensor([0, rows // 2, rows // 2, rows - 1, rows], dtype=torch.int32, device=device)
    group: list[Weight] = [made.nvfp4_weight(n, k, 10 + e, device) for e in range(experts)]
    x = made.activations(rows, k, seed=3, device=device)
    for numerics in ("w4a16", "w4a4"):
        grouped = GroupedLinearSpec(experts, n, k, "nvfp4", numerics, "bfloat16", "bfloat16")
        yield Case(f"grouped_linear nvfp4 {numerics}", grouped, _grouped(group, grouped, x, offsets))


def _linear(weight: Weight, spec: LinearSpec, x: Tensor) -> Callable[[Backend], Tensor]:
    return lambda backend: backend.linear(weight, spec)(x)


def _grouped(weights: list[Weight], spec: GroupedLinearSpec, x: Tensor, offsets: Tensor) -> Callable[[Backend], Tensor]:
    return lambda backend: backend.grouped_linear(weights, spec)(x, offsets)


def plain_cases(setting: Setting) -> Iterator[Case]:
    device, (tokens, width) = setting.place, (3, 64) if setting.tiny else (100, 4096)
    x, residual = (made.activations(tokens, width, seed=s, device=device) for s in (4, 5))
    weight = made.activations(width, seed=6, device=device)
    norm = NormSpec(width, "bfloat16", "bfloat16")
    yield Case(
        "rms_norm", norm, lambda backend: torch.cat(backend.rms_norm(norm)(x, residual.clone(), weight, 1e-5), dim=1)
    )
    act = ActivationSpec(width // 2, "bfloat16", "bfloat16")
    yield Case("silu_mul", act, lambda backend: backend.silu_mul(act)(x))


def _attention(setting: Setting) -> Iterator[Case]:
    device = setting.place
    heads, kv_heads, head_dim = (4, 2, 32) if setting.tiny else (32, 8, 128)
    lengths, new = ([5, 20], [1, 3]) if setting.tiny else ([1000, 77, 500, 129], [1, 1, 300, 129])
    batch, num_blocks = made.batch(lengths, new, device)
    decoding, _ = made.batch(lengths, [1] * len(lengths), device)
    q = made.activations(sum(new), heads, head_dim, seed=7, device=device)
    qkv = made.activations(sum(new), (heads + 2 * kv_heads) * head_dim, seed=8, device=device)
    angles = torch.arange(max(lengths), device=device).unsqueeze(1) * 0.1 ** torch.arange(head_dim // 2, device=device)
    cos, sin = angles.cos(), angles.sin()
    for kv_dtype in KV_DTYPES:
        rope = RopeSpec(heads, kv_heads, head_dim, head_dim, False, kv_dtype, "bfloat16")

        def write(backend: Backend, rope: RopeSpec = rope, kv_dtype: KVDtype = kv_dtype) -> Tensor:
            kv = made.cache(kv_dtype, num_blocks, kv_heads, head_dim, 9, device)
            kernel = backend.rope_and_cache(rope)
            rotated = kernel(qkv, batch.positions, cos, sin, None, None, 1e-5, kv, batch.slot_mapping)
            # what was stored is seen through the reference's attention
            spec = PagedAttentionSpec(heads, kv_heads, head_dim, None, kv_dtype, "bfloat16", "bfloat16")
            reader = available_backends("reference", device=setting.device)[0].paged_attention(spec)
            return torch.cat([rotated.flatten(1), reader(rotated, kv, batch, head_dim**-0.5)], dim=1)

        yield Case(f"rope_and_cache {kv_dtype}", rope, write)
        kv = made.cache(kv_dtype, num_blocks, kv_heads, head_dim, 11, device)
        for window in (None, 7 if setting.tiny else 256):
            spec = PagedAttentionSpec(heads, kv_heads, head_dim, window, kv_dtype, "bfloat16", "bfloat16")
            for name, one, rows in (("ragged", batch, sum(new)), ("decode", decoding, len(lengths))):

                def attend(backend: Backend, spec=spec, one=one, rows=rows, kv=kv) -> Tensor:  # type: ignore[no-untyped-def]
                    return backend.paged_attention(spec)(q[:rows], kv, one, head_dim**-0.5)

                yield Case(f"paged_attention {kv_dtype} window={window} {name}", spec, attend)


def _mla(setting: Setting) -> Case:
    """DeepSeek's latent attention, one step of a few sequences."""
    device = setting.place
    heads, rank, rope = (4, 32, 16) if setting.tiny else (16, 512, 64)
    lengths = [5, 20] if setting.tiny else [1000, 77, 2500]
    batch, num_blocks = made.batch(lengths, [1] * len(lengths), device)
    cache = made.activations(num_blocks, made.BLOCK_SIZE, rank + rope, seed=12, device=device)
    q_nope = made.activations(len(lengths), heads, rank, seed=13, device=device)
    q_rope = made.activations(len(lengths), heads, rope, seed=14, device=device)
    spec, scale = MLASpec(heads, rank, rope, "bfloat16", "bfloat16"), (rank + rope) ** -0.5
    return Case(
        "mla_decode",
        spec,
        lambda backend: backend.mla_decode(spec)(q_nope, q_rope, cache, batch.block_tables, batch.seq_lens, scale),
    )
