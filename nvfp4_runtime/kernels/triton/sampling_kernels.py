"""Choosing tokens, as Triton kernels: exact selection by thresholds, without sorting.

"The first tokens in order of (logit descending, id ascending) whose weights reach a target" ends at some logit t and
takes all above it and the first few that equal it. t is found by cutting the range of float32 keys (integers that sort
as the logits do) into four again and again; a pass over the row weighs what lies above each of three cuts. Tiles of the
row whose largest logit is below the cuts are skipped, so passes are short once t is roughly known.

Probabilities are integers, in units of 2^-44 of the likeliest token's. Their sums are exact, whatever the order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nvfp4_runtime.kernels.compilation import Compilation

TILE = 2048
UNIT_BITS = 44
MOST_TOKENS = (1 << 19) - 1  # sums stay below 2^63


@triton.jit
def _key(x):
    """float32 as int32 that sort alike; -0 and 0 are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _value(key):
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _probability(x, largest, inverse_temperature, min_p):
    """Probability over the likeliest token's, in units of 2^-44; see draw.py."""
    distance = tl.minimum((largest - x) * inverse_temperature, 104.0)
    p = tl.exp(-distance)
    p = tl.where(p < min_p, 0.0, p)
    return (p * 17592186044416.0).to(tl.int64)


@triton.jit
def row_tiles_kernel(
    logits,
    edited,
    bias,
    bias_row,
    allowed,
    allowed_row,
    tile_largest,
    tile_best,
    tile_state,
    VOCAB: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    BIAS: tl.constexpr,
    ALLOWED: tl.constexpr,
):
    """Program (r, i): edit tile i of row r, and what is to be known of it.

    tile_largest  fp32  [R, TILES]   of the edited logits
    tile_best     int32 [R, TILES]   the first token that has it
    tile_state    int32 [R, TILES]   1: NaN or +Inf among the raw logits; 2: some raw logit is above -Inf
    """
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    token = tile * TILE + tl.arange(0, TILE)
    mask = token < VOCAB
    x = tl.load(logits + row * VOCAB + token, mask=mask, other=float("-inf")).to(tl.float32)
    broken = tl.max(((x != x) | (x == float("inf"))).to(tl.int32), axis=0)
    alive = tl.max((x > float("-inf")).to(tl.int32), axis=0)
    x = tl.where(x == x, x, float("-inf"))
    if BIAS:
        which = tl.load(bias_row + row)
        x += tl.load(bias + which.to(tl.int64) * VOCAB + token, mask=token < tl.where(which >= 0, VOCAB, 0), other=0.0)
    if ALLOWED:
        which = tl.load(allowed_row + row)
        WORDS: tl.constexpr = (VOCAB + 31) // 32
        listed = token < tl.where(which >= 0, VOCAB, 0)
        word = tl.load(allowed + which.to(tl.int64) * WORDS + token // 32, mask=listed, other=-1)
        x = tl.where((word >> (token % 32)) & 1 != 0, x, float("-inf"))
    if BIAS or ALLOWED:
        tl.store(edited + row * VOCAB + token, x, mask=mask)
    largest = tl.max(x, axis=0)
    at = row * TILES + tile
    tl.store(tile_largest + at, largest)
    tl.store(tile_best + at, tl.min(tl.where((x == largest) & mask, token, VOCAB), axis=0))
    tl.store(tile_state + at, broken + 2 * alive)


@triton.jit
def _weight(x, largest, inverse_temperature, min_p, BY_COUNT: tl.constexpr):
    if BY_COUNT:
        return tl.full(x.shape, 1, tl.int64)
    else:
        return _probability(x, largest, inverse_temperature, min_p)


@triton.jit
def _mass_from(
    row, tiles, cut, largest, inverse_temperature, min_p, VOCAB: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr
):
    """Mass of all tokens with a key of at least `cut` (int64)."""
    mass = tl.zeros([TILE], tl.int64)
    for tile in range(0, TILES):
        if _key(tl.load(tiles + tile)).to(tl.int64) >= cut:
            token = tile * TILE + tl.arange(0, TILE)
            x = tl.load(row + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
            p = _probability(x, largest, inverse_temperature, min_p)
            mass += tl.where((_key(x).to(tl.int64) >= cut) & (token < VOCAB), p, 0)
    return tl.sum(mass, axis=0)


@triton.jit
def _select(
    row,
    tiles,
    target,
    largest,
    inverse_temperature,
    min_p,
    VOCAB: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    BY_COUNT: tl.constexpr,
):
    """The key at which the weight of the tokens so far, in order, first exceeds `target`, and the weight above it.

    BY_COUNT: each token weighs 1; else its probability. All tokens together must weigh more than `target`.
    """
    low = tl.full([], -2147483648, tl.int64)  # below every key: the weight from `low` on exceeds the target,
    high = _key(largest).to(tl.int64) + 1  # that from `high` on does not
    above = tl.zeros([], tl.int64)  # the latter
    while high - low > 1:
        step = (high - low + 3) // 4
        a = low + step
        b = tl.minimum(a + step, high)
        c = tl.minimum(b + step, high)
        from_a = tl.zeros([TILE], tl.int64)
        from_b = tl.zeros([TILE], tl.int64)
        from_c = tl.zeros([TILE], tl.int64)
        for tile in range(0, TILES):
            if _key(tl.load(tiles + tile)).to(tl.int64) >= a:
                token = tile * TILE + tl.arange(0, TILE)
                x = tl.load(row + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
                weight = tl.where(token < VOCAB, _weight(x, largest, inverse_temperature, min_p, BY_COUNT), 0)
                key = _key(x).to(tl.int64)
                from_a += tl.where(key >= a, weight, 0)
                from_b += tl.where(key >= b, weight, 0)
                from_c += tl.where(key >= c, weight, 0)
        total_a = tl.sum(from_a, axis=0)
        total_b = tl.sum(from_b, axis=0)
        total_c = tl.sum(from_c, axis=0)
        past_a = total_a > target
        past_b = total_b > target
        past_c = total_c > target
        high = tl.where(past_c, high, tl.where(past_b, c, tl.where(past_a, b, a)))
        above = tl.where(past_c, above, tl.where(past_b, total_c, tl.where(past_a, total_b, total_a)))
        low = tl.where(past_c, c, tl.where(past_b, b, tl.where(past_a, a, low)))
    return low, above


@triton.jit
def _token_at(row, tiles, key, index, VOCAB: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr):
    """The token number `index`, by ascending id, of those whose logit has `key`."""
    seen = tl.zeros([], tl.int64)
    found = tl.full([], -1, tl.int32)
    for tile in range(0, TILES):
        if (found < 0) & (_key(tl.load(tiles + tile)).to(tl.int64) >= key):
            token = tile * TILE + tl.arange(0, TILE)
            x = tl.load(row + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
            equal = ((_key(x).to(tl.int64) == key) & (token < VOCAB)).to(tl.int64)
            rank = seen + tl.cumsum(equal, axis=0) - 1
            found = tl.max(tl.where((equal != 0) & (rank == index), token, -1), axis=0)
            seen += tl.sum(equal, axis=0)
    return found


@triton.jit
def choose_kernel(
    logits,
    tile_largest,
    tile_best,
    tile_state,
    uniform,
    temperature,
    top_p,
    min_p,
    top_k,
    tokens,
    VOCAB: tl.constexpr,
    TILES: tl.constexpr,
    TILES_WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    GREEDY: tl.constexpr,
):
    """Program r chooses row r's token from the (edited) logits; see TritonSampler for the arguments, [R] each."""
    r = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES_WIDTH)
    mask = tile < TILES
    maxima = tl.load(tile_largest + r * TILES + tile, mask=mask, other=float("-inf"))
    state = tl.load(tile_state + r * TILES + tile, mask=mask, other=0)
    largest = tl.max(maxima, axis=0)
    candidates = tl.load(tile_best + r * TILES + tile, mask=mask, other=VOCAB)
    best = tl.min(tl.where(maxima == largest, candidates, VOCAB), axis=0)
    broken = tl.max(state & 1, axis=0)
    alive = tl.max(state & 2, axis=0)
    if (broken != 0) | (alive == 0) | (largest == float("-inf")):
        tl.store(tokens + r, -1)
        return
    if GREEDY:
        tl.store(tokens + r, best)
        return
    warmth = tl.load(temperature + r).to(tl.float64)
    if warmth == 0.0:
        tl.store(tokens + r, best)
        return
    inverse = tl.minimum(1.0 / warmth, 3.4028234663852886e38).to(tl.float32)
    least = tl.load(min_p + r).to(tl.float32)
    row = logits + r * VOCAB
    tiles = tile_largest + r * TILES

    k = tl.load(top_k + r).to(tl.int64)
    if (k > 0) & (k < VOCAB):
        key, above = _select(row, tiles, k - 1, largest, inverse, least, VOCAB, TILES, TILE, True)
        mass = _mass_from(row, tiles, key + 1, largest, inverse, least, VOCAB, TILES, TILE)
        mass += (k - above) * _probability(_value(key.to(tl.int32)), largest, inverse, least)
    else:
        mass = _mass_from(row, tiles, tl.full([], -2147483648, tl.int64), largest, inverse, least, VOCAB, TILES, TILE)
    share = tl.load(top_p + r).to(tl.float64)
    if share < 1.0:
        wanted = share * mass.to(tl.float64)
        whole = wanted.to(tl.int64)
        reached = whole + (whole.to(tl.float64) < wanted).to(tl.int64)  # the least integer mass that is enough
        target = tl.minimum(tl.maximum(reached - 1, 0), mass - 1)
        key, above = _select(row, tiles, target, largest, inverse, least, VOCAB, TILES, TILE, False)
        each = _probability(_value(key.to(tl.int32)), largest, inverse, least)
        mass = above + ((target - above) // each + 1) * each
    target = tl.minimum((tl.load(uniform + r) * mass.to(tl.float64)).to(tl.int64), mass - 1)
    key, above = _select(row, tiles, target, largest, inverse, least, VOCAB, TILES, TILE, False)
    each = _probability(_value(key.to(tl.int32)), largest, inverse, least)
    tl.store(tokens + r, _token_at(row, tiles, key, (target - above) // each, VOCAB, TILES, TILE))


@triton.jit
def token_rank_kernel(
    logits,
    tokens,
    tile_largest,
    totals,
    ranks,
    VOCAB: tl.constexpr,
    TILES: tl.constexpr,
    TILES_WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """Program r: how many of row r's tokens come before tokens[r]; sum of exp(logit - largest) in units of 2^-44."""
    r = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES_WIDTH)
    largest = tl.max(tl.load(tile_largest + r * TILES + tile, mask=tile < TILES, other=float("-inf")), axis=0)
    chosen = tl.load(tokens + r)
    value = tl.load(logits + r * VOCAB + tl.maximum(chosen, 0)).to(tl.float32)
    total = tl.zeros([TILE], tl.int64)
    before = tl.zeros([TILE], tl.int32)
    for i in range(0, TILES):
        token = i * TILE + tl.arange(0, TILE)
        x = tl.load(logits + r * VOCAB + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
        total += tl.where(token < VOCAB, _probability(x, largest, 1.0, 0.0), 0)
        before += (((x > value) | ((x == value) & (token < chosen))) & (token < VOCAB)).to(tl.int32)
    tl.store(totals + r, tl.sum(total, axis=0))
    tl.store(ranks + r, tl.sum(before, axis=0))


def compilations() -> list[Compilation]:
    vocab = 128256
    tiles = -(-vocab // TILE)
    facts = {"tile_largest": "*fp32", "tile_best": "*i32", "tile_state": "*i32"}
    shape = {"VOCAB": vocab, "TILES": tiles, "TILE": TILE}
    edits = {"bias": "*fp32", "bias_row": "*i32", "allowed": "*i32", "allowed_row": "*i32"}
    controls = {"uniform": "*fp64", "temperature": "*fp32", "top_p": "*fp32", "min_p": "*fp32", "top_k": "*i32"}
    rows = {"logits": "*fp32", "tokens": "*i64"}
    wide = shape | {"TILES_WIDTH": triton.next_power_of_2(tiles)}
    return [
        Compilation(
            "row_tiles",
            row_tiles_kernel,
            {"logits": "*fp32", "edited": "*fp32"} | edits | facts,
            shape | {"BIAS": True, "ALLOWED": True},
        ),
        *(
            Compilation(name, choose_kernel, rows | facts | controls, wide | {"GREEDY": greedy}, num_warps=8)
            for name, greedy in (("greedy", True), ("draw", False))
        ),
        Compilation(
            "token_rank",
            token_rank_kernel,
            rows | {"tile_largest": "*fp32", "totals": "*i64", "ranks": "*i64"},
            wide,
            num_warps=8,
        ),
    ]
