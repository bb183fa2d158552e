"""Paged decode attention: bytes of keys and values read per second, by batch, context and type of cache."""

from __future__ import annotations

import functools
from typing import Any

import torch

from nvfp4_runtime.kernels.gpu_bench import made
from nvfp4_runtime.kernels.gpu_bench.check import KV_DTYPES, tested
from nvfp4_runtime.kernels.gpu_bench.setting import Setting
from nvfp4_runtime.kernels.gpu_bench.timing import seconds_per_call
from nvfp4_runtime.kernels.ops import PagedAttentionSpec

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
BATCHES, CONTEXTS = (1, 64, 256), (1024, 8192)
_SHARE_OF_FREE = 0.8  # of memory, that the caches of one case may take


def measure(setting: Setting) -> None:
    """One layer of Llama-3.1-8B, one new token per sequence."""
    heads, kv_heads, head_dim = (4, 2, 32) if setting.tiny else (HEADS, KV_HEADS, HEAD_DIM)
    for backend in tested(setting):
        for num_sequences in (2,) if setting.tiny else BATCHES:
            for context in (20,) if setting.tiny else CONTEXTS:
                batch, num_blocks = made.batch([context] * num_sequences, [1] * num_sequences, setting.place)
                q = made.activations(num_sequences, heads, head_dim, seed=1, device=setting.place)
                for kv_dtype in KV_DTYPES:
                    row: dict[str, Any] = {"part": "attention", "backend": backend.name, "batch": num_sequences}
                    row |= {"context": context, "kv_dtype": kv_dtype}
                    spec = PagedAttentionSpec(heads, kv_heads, head_dim, None, kv_dtype, "bfloat16", "bfloat16")
                    if (reason := backend.refuses(spec)) is not None:
                        setting.emit(row | {"refused": reason})
                        continue
                    per_value = {"bfloat16": 2.0, "fp8": 1.0, "nvfp4": 0.5625}[kv_dtype]
                    num_bytes = int(2 * num_sequences * context * kv_heads * head_dim * per_value)
                    if num_bytes > _SHARE_OF_FREE * free_bytes(setting):
                        setting.emit(row | {"refused": f"its cache of {num_bytes / 2**30:.1f} GiB does not fit"})
                        continue
                    with setting.attempt(row):
                        layers = [
                            made.cache(kv_dtype, num_blocks, kv_heads, head_dim, seed, setting.place)
                            for seed in range(setting.copies(num_bytes))
                        ]
                        kernel = backend.paged_attention(spec)
                        calls = [functools.partial(kernel, q, kv, batch, head_dim**-0.5) for kv in layers]
                        seconds = seconds_per_call(calls, setting)
                        setting.emit(row | {"seconds": seconds, "bytes_per_second": num_bytes / seconds})
                        del layers, calls


def free_bytes(setting: Setting) -> int:
    """Memory of the GPU that is not taken; what a rehearsal needs is always there."""
    if setting.tiny:
        return 1 << 30
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(setting.place)[0])
