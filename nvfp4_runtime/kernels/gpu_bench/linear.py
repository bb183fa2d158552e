"""NVFP4 linears at Llama-3.1-8B's shapes beside cuBLAS in BF16, weights cold in cache."""

from __future__ import annotations

import functools
from typing import Any

import torch

from nvfp4_runtime.config import Numerics
from nvfp4_runtime.kernels.gpu_bench import made
from nvfp4_runtime.kernels.gpu_bench.check import tested
from nvfp4_runtime.kernels.gpu_bench.setting import Setting
from nvfp4_runtime.kernels.gpu_bench.timing import seconds_per_call
from nvfp4_runtime.kernels.ops import Backend, LinearSpec

# (N, K) of Llama-3.1-8B's fused projections
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
PREFILL_ROWS = (512, 2048)
TINY_SHAPES, TINY_ROWS = {"qkv": (48, 64)}, (1, 3)
NUMERICS: tuple[Numerics, ...] = ("w4a16", "w4a4")


def measure(setting: Setting) -> None:
    """Per shape and M: seconds of cuBLAS, and of every backend and arithmetic with bytes of weights per second."""
    shapes, rows = (TINY_SHAPES, TINY_ROWS) if setting.tiny else (SHAPES, (*ROWS, *PREFILL_ROWS))
    for name, (n, k) in shapes.items():
        _cublas(setting, name, n, k, rows)
        for backend in tested(setting):
            for numerics in NUMERICS:
                spec = LinearSpec(n, k, "nvfp4", numerics, "bfloat16", "bfloat16")
                label = {"part": "linear", "shape": name, "n": n, "k": k, "backend": backend.name, "numerics": numerics}
                if (reason := backend.refuses(spec)) is not None:
                    setting.emit(label | {"refused": reason})
                    continue
                with setting.attempt(label):
                    _ours(setting, backend, spec, label, rows)


def _ours(setting: Setting, backend: Backend, spec: LinearSpec, label: dict[str, Any], rows: tuple[int, ...]) -> None:
    n, k = spec.n, spec.k
    num_bytes = n * k // 2 + n * k // 16
    copies = setting.copies(num_bytes)
    kernels = [backend.linear(made.nvfp4_weight(n, k, seed, setting.place), spec) for seed in range(copies)]
    for m in rows:
        row = label | {"m": m}
        with setting.attempt(row):
            x = made.activations(m, k, seed=m, device=setting.place)
            seconds = seconds_per_call([functools.partial(kernel, x) for kernel in kernels], setting)
            row |= {"seconds": seconds, "bytes_per_second": num_bytes / seconds}
            setting.emit(row | {"operations_per_second": 2 * m * n * k / seconds})


def _cublas(setting: Setting, name: str, n: int, k: int, rows: tuple[int, ...]) -> None:
    copies = setting.copies(2 * n * k)
    weights = [made.activations(n, k, seed=s, device=setting.place) for s in range(copies)]
    for m in rows:
        x = made.activations(m, k, seed=m, device=setting.place)
        seconds = seconds_per_call([functools.partial(torch.nn.functional.linear, x, w) for w in weights], setting)
        setting.emit(
            {
                "part": "linear",
                "shape": name,
                "n": n,
                "k": k,
                "backend": "cublas",
                "numerics": "bf16",
                "m": m,
                "seconds": seconds,
                "bytes_per_second": 2 * n * k / seconds,
                "operations_per_second": 2 * m * n * k / seconds,
            }
        )
