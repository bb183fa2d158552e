"""Paged attention as Triton kernels: one tile of queries against a run of keys, and the sum over runs.

Softmax is kept in powers of two: the scale that comes in is already multiplied by log2(e).
"""

from __future__ import annotations

import triton
import triton.language as tl

from nvfp4_runtime.kernels.compilation import Compilation
from nvfp4_runtime.kernels.triton.common import dot, round_to
from nvfp4_runtime.kernels.triton.kv_format import load_nvfp4_rows, load_rows


@triton.jit
def _sequence_of(tile, cu_seqlens_q, num_seqs, TOKENS: tl.constexpr, SEQS: tl.constexpr):
    """Which sequence query tile `tile` belongs to, and which of its tiles it is.

    Sequence b owns the tiles from cu_seqlens_q[b] // TOKENS + b on: at least enough, and in all T // TOKENS + B, which
    the host knows from shapes.
    """
    b = tl.arange(0, SEQS)
    first = tl.load(cu_seqlens_q + b, mask=b < num_seqs, other=0) // TOKENS + b
    seq = tl.sum(((first <= tile) & (b < num_seqs)).to(tl.int32), axis=0) - 1
    return seq, tile - (tl.load(cu_seqlens_q + seq) // TOKENS + seq)


@triton.jit
def _weigh(s, m, total, visible, MASKED: tl.constexpr):
    """Online softmax: scores [ROWS, KEYS] as weights, the new maximum and sum, and what the old ones are worth."""
    if MASKED:
        s = tl.where(visible, s, float("-inf"))
    new = tl.maximum(m, tl.max(s, axis=1))
    base = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen nothing yet
    weights = tl.exp2(s - base[:, None])
    old = tl.exp2(m - base)
    return weights, new, total * old + tl.sum(weights, axis=1), old


@triton.jit
def _largest_power(x):
    """The largest power of two up to x >= 0, in float32's range: dividing by it is exact and leaves no more than 2."""
    return tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, 0x00800000).to(tl.float32, bitcast=True)


@triton.jit
def _hide(v, visible, total):
    """Zero what is not finite in values [KEYS, WIDTH], and make total NaN for the rows that see it.

    A weight of 0 does not hide NaN or Inf: one that a later query has to see would reach all queries of the tile.
    """
    broken = ~(tl.abs(v.to(tl.float32)) <= 3.4028234663852886e38)
    broken_key = tl.max(broken.to(tl.int32), axis=1)
    seen = tl.max((visible & (broken_key[None, :] != 0)).to(tl.int32), axis=1)
    return tl.where(broken, tl.zeros_like(v), v), tl.where(seen != 0, float("nan"), total)


@triton.jit
def _attend(
    q,
    q_odd,
    acc,
    acc_odd,
    m,
    total,
    key,
    p,
    low,
    stop,
    k_cache,
    v_cache,
    k_blocks,
    v_blocks,
    table,
    kv_head,
    scale,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    DECODE: tl.constexpr,
    MASKED: tl.constexpr,
    KV: tl.constexpr,
    OPERAND: tl.constexpr,
    HARDWARE_E4M3: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """One tile of keys at positions `key` [KEYS], of which those in [low, stop) are read."""
    read = (key < stop) & (key >= low)
    block = tl.load(table + key // BLOCK_SIZE, mask=read, other=0).to(tl.int64)
    rows = (block * KV_HEADS + kv_head) * BLOCK_SIZE + key % BLOCK_SIZE
    visible = read[None, :] & (key[None, :] <= p[:, None])
    if WINDOW > 0:
        visible = visible & (key[None, :] > p[:, None] - WINDOW)
    zero = tl.zeros([q.shape[0], key.shape[0]], tl.float32)
    if KV == 2:
        k, k_odd = load_nvfp4_rows(k_cache, k_blocks, rows, read, D, WIDTH, OPERAND, HARDWARE_E4M3, EMULATED)
        s = dot(q_odd, tl.trans(k_odd), dot(q, tl.trans(k), zero, EMULATED), EMULATED)
        weights, m, total, old = _weigh(s * scale, m, total, visible, MASKED)
        v, v_odd = load_nvfp4_rows(v_cache, v_blocks, rows, read, D, WIDTH, OPERAND, HARDWARE_E4M3, EMULATED)
        if MASKED and not DECODE:
            v, total = _hide(v, visible, total)
            v_odd, total = _hide(v_odd, visible, total)
        weights = round_to(weights, OPERAND, EMULATED)
        acc = dot(weights, v, acc * old[:, None], EMULATED)
        acc_odd = dot(weights, v_odd, acc_odd * old[:, None], EMULATED)
    else:
        k = load_rows(k_cache, rows, read, D, WIDTH, KV, OPERAND, HARDWARE_E4M3, EMULATED)
        weights, m, total, old = _weigh(dot(q, tl.trans(k), zero, EMULATED) * scale, m, total, visible, MASKED)
        v = load_rows(v_cache, rows, read, D, WIDTH, KV, OPERAND, HARDWARE_E4M3, EMULATED)
        if MASKED and not DECODE:
            v, total = _hide(v, visible, total)
        acc = dot(round_to(weights, OPERAND, EMULATED), v, acc * old[:, None], EMULATED)
    return acc, acc_odd, m, total


@triton.jit(do_not_specialize=["num_seqs", "table_width"])
def paged_attention_kernel(
    q,
    k_cache,
    v_cache,
    k_blocks,
    v_blocks,
    out,
    partial,
    partial_m,
    partial_l,
    block_tables,
    seq_lens,
    cu_seqlens_q,
    num_seqs,
    table_width,
    scale,
    v_scale,
    sinks,
    SINKS: tl.constexpr,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SEQS: tl.constexpr,
    SPLIT: tl.constexpr,
    DECODE: tl.constexpr,
    KV: tl.constexpr,
    OPERAND: tl.constexpr,
    HARDWARE_E4M3: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Program (tile, h, s): a tile of queries of one sequence and the heads of KV group h, against run s of its keys.

    Row r of a tile is query r // G of the tile, head r % G of the group: keys and values are read once for the group.
    SPLIT: the keys a tile sees are cut into runs of whole key tiles, as many runs as the grid has programs there (S),
    by the device's own seq_lens.

    scale          softmax scale * k_scale * log2(e), times NVFP4_UNIT for an NVFP4 cache; so is v_scale
    out            [T, Q_HEADS * D], unless SPLIT
    partial        fp32 [T, Q_HEADS, S, D] unnormalised sums; partial_m, partial_l [T, Q_HEADS, S] their
                   maxima and weights
    TOKENS, ROWS   queries of a tile; TOKENS * G padded to a power of two, at least 16
    SINKS          sinks [Q_HEADS] are one more score of each head, without a value; with SPLIT combine_kernel adds it
    DECODE         every sequence has at most one new token: tile b is sequence b
    WINDOW         0: none
    OPERAND        what is multiplied: bfloat16, float32, or for FP8 and NVFP4 caches float16, which holds both exactly
                   and converts from FP8 in one instruction; queries enter its range by a power of two per row
    """
    GROUP: tl.constexpr = Q_HEADS // KV_HEADS
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    if DECODE:
        seq = tl.program_id(0)
        index = 0
    else:
        seq, index = _sequence_of(tl.program_id(0), cu_seqlens_q, num_seqs, TOKENS, SEQS)
    start = tl.load(cu_seqlens_q + seq)
    count = tl.load(cu_seqlens_q + seq + 1) - start
    first = index * TOKENS
    if first >= count:
        return
    seq_len = tl.load(seq_lens + seq)
    position = seq_len - count + first  # of the tile's first query
    end = tl.minimum(position + TOKENS, seq_len)
    low = 0
    if WINDOW > 0:
        low = tl.maximum(position - WINDOW + 1, 0)
    begin = low // KEYS * KEYS
    stop = end
    if SPLIT:
        tiles = (end - begin + KEYS - 1) // KEYS
        splits = tl.num_programs(2)
        length = (tiles + splits - 1) // splits * KEYS
        begin += split * length
        stop = tl.minimum(begin + length, end)

    r = tl.arange(0, ROWS)
    token = r // GROUP
    inside = (r < TOKENS * GROUP) & (first + token < count)
    p = position + token
    row = (start + first + token).to(tl.int64) * Q_HEADS + kv_head * GROUP + r % GROUP  # of [T * Q_HEADS]
    table = block_tables + seq.to(tl.int64) * table_width

    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if KV == 2:
        cols = 2 * tl.arange(0, WIDTH // 2)[None, :]
        mask = inside[:, None] & (cols < D)
        queries = tl.load(q + row[:, None] * D + cols, mask=mask, other=0.0).to(tl.float32)
        queries_odd = tl.load(q + row[:, None] * D + cols + 1, mask=mask, other=0.0).to(tl.float32)
        acc = tl.zeros([ROWS, WIDTH // 2], tl.float32)
        acc_odd = tl.zeros([ROWS, WIDTH // 2], tl.float32)
    else:
        cols = tl.arange(0, WIDTH)[None, :]
        mask = inside[:, None] & (cols < D)
        queries = tl.load(q + row[:, None] * D + cols, mask=mask, other=0.0).to(tl.float32)
        queries_odd = queries
        acc = tl.zeros([ROWS, WIDTH], tl.float32)
        acc_odd = total  # nothing
    if OPERAND == tl.float16:  # noqa: SIM300 - a comparison, not a constant
        unit = _largest_power(tl.maximum(tl.max(tl.abs(queries), axis=1), tl.max(tl.abs(queries_odd), axis=1)))
        queries = queries / unit[:, None]
        queries_odd = queries_odd / unit[:, None]
        scale = (scale * unit)[:, None]
    queries = round_to(queries, OPERAND, EMULATED)
    queries_odd = round_to(queries_odd, OPERAND, EMULATED)

    keys = tl.arange(0, KEYS)
    middle = begin  # key tiles before it are seen whole by every query
    if WINDOW == 0:
        middle = tl.minimum(tl.maximum((position + 1) // KEYS * KEYS, begin), tl.maximum(stop, begin))
        for key in range(begin, middle, KEYS):
            acc, acc_odd, m, total = _attend(
                queries, queries_odd, acc, acc_odd, m, total, key + keys, p, low, stop, k_cache, v_cache, k_blocks,
                v_blocks, table, kv_head, scale, KV_HEADS, D, WIDTH, BLOCK_SIZE, WINDOW, DECODE, False, KV, OPERAND,
                HARDWARE_E4M3, EMULATED,
            )  # fmt: skip
    for key in range(middle, stop, KEYS):
        acc, acc_odd, m, total = _attend(
            queries, queries_odd, acc, acc_odd, m, total, key + keys, p, low, stop, k_cache, v_cache, k_blocks,
            v_blocks, table, kv_head, scale, KV_HEADS, D, WIDTH, BLOCK_SIZE, WINDOW, DECODE, True, KV, OPERAND,
            HARDWARE_E4M3, EMULATED,
        )  # fmt: skip

    if KV == 2:
        acc = tl.interleave(acc, acc_odd)
    cols = tl.arange(0, WIDTH)[None, :]
    mask = inside[:, None] & (cols < D)
    if not SPLIT:
        if SINKS:
            total += tl.exp2(tl.load(sinks + kv_head * GROUP + r % GROUP) * 1.4426950408889634 - m)
        result = acc * v_scale / total[:, None]
        tl.store(out + row[:, None] * D + cols, round_to(result, out.dtype.element_ty, EMULATED), mask=mask)
    else:
        at = row * tl.num_programs(2) + split
        tl.store(partial_m + at, m, mask=inside)
        tl.store(partial_l + at, total, mask=inside)
        if begin < stop:  # an empty run's sums are never read
            tl.store(partial + at[:, None] * D + cols, acc, mask=mask)


@triton.jit
def combine_kernel(
    partial,
    partial_m,
    partial_l,
    out,
    v_scale,
    sinks,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Program r adds up the runs of row r of [T * Q_HEADS], always in the same order; see paged_attention_kernel.

    HEADS  0, or how many there are: sinks [HEADS] then join the sums
    """
    row = tl.program_id(0).to(tl.int64)
    all_runs = row * SPLITS + tl.arange(0, SPLITS)
    largest = tl.max(tl.load(partial_m + all_runs), axis=0)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    cols = tl.arange(0, WIDTH)[None, :]
    acc = tl.zeros([WIDTH], tl.float32)
    total = 0.0
    for s in tl.static_range(0, SPLITS, CHUNK):
        runs = row * SPLITS + s + tl.arange(0, CHUNK)
        m = tl.load(partial_m + runs)
        weights = tl.exp2(m - base)
        total += tl.sum(weights * tl.load(partial_l + runs), axis=0)
        mask = (m != float("-inf"))[:, None] & (cols < D)
        sums = tl.load(partial + runs[:, None] * D + cols, mask=mask, other=0.0)
        acc += tl.sum(weights[:, None] * sums, axis=0)
    if HEADS > 0:
        total += tl.exp2(tl.load(sinks + row % HEADS) * 1.4426950408889634 - base)
    cols = tl.arange(0, WIDTH)
    result = round_to(acc * v_scale / total, out.dtype.element_ty, EMULATED)
    tl.store(out + row * D + cols, result, mask=cols < D)


def compilations() -> list[Compilation]:
    """The sum over runs; paged_attention.py and mla.py list the rest."""
    signature = dict.fromkeys(("partial", "partial_m", "partial_l"), "*fp32") | {
        "out": "*bf16",
        "v_scale": "fp32",
        "sinks": "*fp32",
    }
    return [
        Compilation(
            name=f"combine_{width}",
            kernel=combine_kernel,
            signature=signature,
            constexprs={
                "HEADS": 0,
                "D": width,
                "WIDTH": width,
                "SPLITS": 64,
                "CHUNK": 4096 // width,
                "EMULATED": False,
            },
        )
        for width in (128, 512)
    ]
