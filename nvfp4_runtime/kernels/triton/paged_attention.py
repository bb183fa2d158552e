"""Causal grouped-query attention over paged keys and values: one launch for decoding, prompts and both together.

A long sequence is cut into runs of keys, which as many programs take, where the batch alone would not fill the GPU. How
many depends on shapes (sequences, new tokens, width of the block tables), never on what the tensors hold: the launch
can be captured in a CUDA graph, and a row's bits depend on its own keys and on those shapes.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvfp4_runtime.batch import ForwardBatch, KVLayer
from nvfp4_runtime.config import KVDtype
from nvfp4_runtime.errors import KernelError
from nvfp4_runtime.kernels.compilation import Compilation
from nvfp4_runtime.kernels.ops import PagedAttentionSpec
from nvfp4_runtime.kernels.triton.attention_kernels import combine_kernel, paged_attention_kernel
from nvfp4_runtime.kernels.triton.common import emulated
from nvfp4_runtime.kernels.triton.kv_format import KV_CODES, NVFP4_UNIT, cache_arguments
from nvfp4_runtime.kernels.triton.numbers import has_e4m3

LOG2_E = math.log2(math.e)
MOST_SPLITS = 64
_DECODE_WAVES = 4  # programs a multiprocessor should see
_PREFILL_WAVES = 2  # fewer: partial sums cost memory where rows are many


@dataclass(frozen=True)
class GPUFacts:
    """What a launch depends on.

    processors  multiprocessors
    rows        of a prompt's tile: 128 where matrix instructions take their operands from shared memory (9.0, 10.x);
                elsewhere twice 64, or the registers spill
    stages      of the key pipeline: what fits shared memory, 99 KiB a block on 8.6, 8.9 and 12.x, else 163 and more
    e4m3        converts E4M3 itself
    """

    processors: int
    rows: int = 128
    stages: int = 3
    e4m3: bool = False


@functools.cache
def gpu_facts(device: torch.device) -> GPUFacts:
    """The interpreter, which has no multiprocessors, is given a few so that sequences are cut as on a GPU."""
    if device.type == "cpu":
        return GPUFacts(8)
    capability = torch.cuda.get_device_capability(device)
    return GPUFacts(
        torch.cuda.get_device_properties(device).multi_processor_count,
        128 if capability[0] in (9, 10) else 64,
        3 if capability[0] in (9, 10) or capability == (8, 0) else 2,
        has_e4m3(device),
    )


@dataclass(frozen=True)
class Tile:
    """How one launch is cut.

    tokens, rows  queries of a tile; tokens * group padded to a power of two
    keys          of one key tile
    decode        every sequence has at most one new token
    tiles         query tiles
    splits        runs of keys
    warps         of a program
    """

    tokens: int
    rows: int
    keys: int
    decode: bool
    tiles: int
    splits: int
    warps: int


class TritonPagedAttention:
    """See `AttentionKernel`. Lengths and block tables are not checked: on a device nobody could be told in time.

    A query that sees a NaN or an infinity among its values gives a row of NaN; one that does not see it is untouched,
    whatever lies in slots nobody may see. A row no sequence owns keeps what was in memory.
    """

    def __init__(self, spec: PagedAttentionSpec) -> None:
        if spec.num_heads % spec.num_kv_heads:
            raise KernelError(f"{spec.num_heads} query heads do not divide over {spec.num_kv_heads} KV heads")
        self.spec = spec
        self.group = spec.num_heads // spec.num_kv_heads
        self.out_dtype: torch.dtype = getattr(torch, spec.out_dtype)
        self._width = padded_width(spec)
        self._operand = operand_type(spec)

    def __call__(
        self, q: Tensor, kv: KVLayer, batch: ForwardBatch, scale: float, sinks: Tensor | None = None
    ) -> Tensor:
        spec = self.spec
        if (sinks is not None) != spec.sinks:
            raise KernelError(f"this layer was built with sinks={spec.sinks}; the call must agree with it")
        if q.shape[1:] != (spec.num_heads, spec.head_dim) or not q.is_contiguous():
            raise KernelError(f"q is {list(q.shape)}, expected contiguous [T, {spec.num_heads}, {spec.head_dim}]")
        num_tokens, num_seqs = q.shape[0], batch.seq_lens.shape[0]
        out = torch.empty((num_tokens, spec.num_heads * spec.head_dim), dtype=self.out_dtype, device=q.device)
        if num_tokens == 0:
            return out
        most_keys = batch.block_tables.shape[1] * kv.block_size
        if batch.max_seq_len is not None:
            most_keys = min(most_keys, batch.max_seq_len)
        gpu = gpu_facts(q.device)
        tile = self.tile(num_tokens, num_seqs, batch.max_query_len == 1, most_keys, gpu)
        partials = partial_sums(num_tokens * spec.num_heads, tile.splits, spec.head_dim, out)
        k, v, k_blocks, v_blocks = cache_arguments(kv, spec)
        unit = NVFP4_UNIT if spec.kv_dtype == "nvfp4" else 1.0
        paged_attention_kernel[(tile.tiles, spec.num_kv_heads, tile.splits)](
            q,
            k,
            v,
            k_blocks,
            v_blocks,
            out,
            *partials,
            batch.block_tables,
            batch.seq_lens,
            batch.cu_seqlens_q,
            num_seqs,
            batch.block_tables.shape[1],
            scale * kv.k_scale * unit * LOG2_E,
            kv.v_scale * unit,
            partials[1] if sinks is None else sinks,
            **self.constants(tile, kv.block_size, num_seqs, gpu.e4m3),
            num_warps=tile.warps,
            num_stages=gpu.stages,
        )
        if tile.splits > 1:
            combine(partials, out, kv.v_scale * unit, spec.head_dim, tile.splits, sinks)
        return out

    def tile(self, num_tokens: int, num_seqs: int, decode: bool, most_keys: int, gpu: GPUFacts) -> Tile:
        """The cut of a launch, from shapes alone; `most_keys` bounds what any query sees."""
        spec = self.spec
        rows = max(16, triton.next_power_of_2(self.group))
        tokens, tiles = 1, num_seqs
        if not decode:
            mean = -(-num_tokens // num_seqs)
            largest = 32 if self._operand == tl.float32 else (gpu.rows if self._width <= 128 else 64)
            rows = max(rows, min(largest, triton.next_power_of_2(mean * self.group)))
            tokens = rows // self.group
            tiles = num_tokens // tokens + num_seqs
        keys = 64 if self._width <= 128 and self._operand != tl.float32 else 32
        if spec.window is not None:
            most_keys = min(most_keys, spec.window + tokens + keys)
        programs = tiles * spec.num_kv_heads
        waves = _DECODE_WAVES if decode else _PREFILL_WAVES
        wanted = triton.next_power_of_2(triton.cdiv(waves * gpu.processors, programs))
        useful = triton.next_power_of_2(triton.cdiv(most_keys, keys))
        return Tile(tokens, rows, keys, decode, tiles, min(wanted, useful, MOST_SPLITS), 8 if rows >= 64 else 4)

    def constants(self, tile: Tile, block_size: int, num_seqs: int, hardware_e4m3: bool) -> dict[str, Any]:
        """What the kernel is compiled for."""
        spec = self.spec
        return {
            "SINKS": spec.sinks,
            "Q_HEADS": spec.num_heads,
            "KV_HEADS": spec.num_kv_heads,
            "D": spec.head_dim,
            "WIDTH": self._width,
            "BLOCK_SIZE": block_size,
            "WINDOW": spec.window or 0,
            "TOKENS": tile.tokens,
            "ROWS": tile.rows,
            "KEYS": tile.keys,
            "SEQS": max(256, triton.next_power_of_2(num_seqs)),  # few values: each is a compilation
            "SPLIT": tile.splits > 1,
            "DECODE": tile.decode,
            "KV": KV_CODES[spec.kv_dtype],
            "OPERAND": self._operand,
            "HARDWARE_E4M3": hardware_e4m3,
            "EMULATED": emulated(),
        }


def padded_width(spec: PagedAttentionSpec) -> int:
    """head_dim as a kernel holds it; halves of NVFP4 rows must still fill a matrix instruction."""
    return max(32 if spec.kv_dtype == "nvfp4" else 16, int(triton.next_power_of_2(spec.head_dim)))


def operand_type(spec: PagedAttentionSpec) -> Any:
    """What is multiplied: 16 bits where the spec allows it, else float32."""
    if spec.kv_dtype == "float32" or (spec.dtype == "float32" and spec.out_dtype == "float32"):
        return tl.float32
    return tl.bfloat16 if spec.kv_dtype == "bfloat16" else tl.float16


def partial_sums(rows: int, splits: int, width: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for sums of runs, their maxima and weights (see paged_attention_kernel); `like` where there is one run."""
    if splits == 1:
        return like, like, like
    sums = torch.empty((rows, splits, width), dtype=torch.float32, device=like.device)
    maxima, weights = torch.empty((2, rows, splits), dtype=torch.float32, device=like.device).unbind()
    return sums, maxima, weights


def combine(
    partials: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    v_scale: float,
    width: int,
    splits: int,
    sinks: Tensor | None = None,
) -> None:
    """Add up the runs of every row into `out`, rows of `width`; `sinks` of the heads that rows go through in turn."""
    padded = triton.next_power_of_2(width)
    combine_kernel[(partials[0].shape[0],)](
        *partials,
        out,
        v_scale,
        partials[1] if sinks is None else sinks,
        HEADS=0 if sinks is None else sinks.shape[0],
        D=width,
        WIDTH=padded,
        SPLITS=splits,
        CHUNK=min(splits, max(2, 4096 // padded)),
        EMULATED=emulated(),
        num_warps=4,
    )


def compilations() -> list[Compilation]:
    """Decoding and prompts of every cache, on GPUs that differ in instructions and shared memory."""
    ampere, hopper, small = GPUFacts(108, 64, 3), GPUFacts(132, 128, 3, True), GPUFacts(128, 64, 2, True)
    return [
        _compilation("bfloat16", 128, None, True, ampere, (80,)),
        _compilation("bfloat16", 128, None, True, hopper, (90, 100, 103)),
        _compilation("bfloat16", 128, None, False, ampere, (80,)),
        _compilation("bfloat16", 128, None, False, hopper, (90, 100, 103)),
        _compilation("bfloat16", 64, 128, False, small, (89, 120)),
        _compilation("fp8", 128, None, True, ampere, (80,)),
        _compilation("fp8", 128, None, True, hopper, (90, 100)),
        _compilation("fp8", 128, None, False, small, (89, 120, 121)),
        _compilation("nvfp4", 128, None, True, small, (89, 120)),
        _compilation("nvfp4", 128, 1024, False, hopper, (90, 100)),
    ]


def _compilation(
    kv: KVDtype,
    head_dim: int,
    window: int | None,
    decode: bool,
    gpu: GPUFacts,
    targets: tuple[int, ...],
) -> Compilation:
    kernel = TritonPagedAttention(PagedAttentionSpec(32, 8, head_dim, window, kv, "bfloat16", "bfloat16"))
    seqs, tokens = (64, 64) if decode else (8, 2048)
    tile = kernel.tile(tokens, seqs, decode, 8192, gpu)
    signature = dict.fromkeys(("q", "out"), "*bf16")
    cache = "*bf16" if kv == "bfloat16" else "*u8"
    signature |= dict.fromkeys(("k_cache", "v_cache", "k_blocks", "v_blocks"), cache)
    signature |= dict.fromkeys(("partial", "partial_m", "partial_l"), "*fp32")
    signature |= dict.fromkeys(("block_tables", "seq_lens", "cu_seqlens_q"), "*i32")
    signature |= {"sinks": "*fp32"}
    signature |= dict.fromkeys(("num_seqs", "table_width"), "i32") | dict.fromkeys(("scale", "v_scale"), "fp32")
    return Compilation(
        name=f"{kv}_{head_dim}_{'decode' if decode else 'prompts'}_{targets[0]}",
        kernel=paged_attention_kernel,
        signature=signature,
        constexprs=kernel.constants(tile, 16, seqs, gpu.e4m3),
        num_warps=tile.warps,
        num_stages=gpu.stages,
        expect=("mma", "cp.async", *(("cvt.rn.f16x2.e4m3x2",) if gpu.e4m3 and kv == "fp8" else ())),
        targets=targets,
        max_stack=32,
        unaligned=("num_seqs", "table_width"),
    )
