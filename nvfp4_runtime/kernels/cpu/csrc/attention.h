// Causal grouped-query attention over paged KV, online softmax in FP32. A query row walks its visible keys in tiles that
// start at multiples of kTile positions, so its arithmetic depends on its position and nothing else: not on the rows beside
// it, how the prompt was cut, or the thread. The rows of an item share each tile, which is widened and transposed once.

struct Tile {
  int start, count;  // positions start .. start + count - 1 are staged
  int end;           // positions of the whole item
  float* keys;       // [d][kTile]
  float* values;     // [kTile][d16]
};

template <class C>
void stage(const Attention& a, int sequence, int kv_head, Tile& tile) {
  const int d = a.head_dim, d16 = round16(d);
  const int32_t* table = a.block_tables + static_cast<size_t>(sequence) * a.table_stride;
  const C* keys[kTile];
  const size_t head = static_cast<size_t>(a.block_size) * d, block = head * a.kv_heads;
  for (int j = 0; j < tile.count;) {  // block by block
    const int p = tile.start + j, offset = p % a.block_size;
    const int left = a.block_size - offset, run = left < tile.count - j ? left : tile.count - j;
    const size_t at = static_cast<size_t>(table[p / a.block_size]) * block + kv_head * head + static_cast<size_t>(offset) * d;
    const C* key = static_cast<const C*>(a.k) + at;
    const C* value = static_cast<const C*>(a.v) + at;
    for (int i = 0; i < run; i++, j++, key += d, value += d) {
      keys[j] = key;
      for (int c = 0; c < d; c += 16) store(tile.values + j * d16 + c, load_upto(value + c, d - c));
    }
  }
  // the next tile's blocks lie anywhere: ask for them now, they arrive while this one is worked on
  for (int p = tile.start + kTile; p < tile.end && p < tile.start + 2 * kTile;) {
    const int offset = p % a.block_size, left = a.block_size - offset, room = tile.start + 2 * kTile - p;
    const size_t at = static_cast<size_t>(table[p / a.block_size]) * block + kv_head * head + static_cast<size_t>(offset) * d;
    const size_t bytes = static_cast<size_t>(left < room ? left : room) * d * sizeof(C);
    for (size_t i = 0; i < bytes; i += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(static_cast<const C*>(a.k) + at) + i);
      __builtin_prefetch(reinterpret_cast<const char*>(static_cast<const C*>(a.v) + at) + i);
    }
    p += left;
  }
  for (int j0 = 0; j0 < tile.count; j0 += 16)
    for (int i = 0; i < d; i += 16) {
      V r[16];
      if (j0 + 16 <= tile.count && i + 16 <= d)
        UNROLL for (int j = 0; j < 16; j++) r[j] = load(keys[j0 + j] + i);
      else
        for (int j = 0; j < 16; j++) r[j] = j0 + j < tile.count ? load_upto(keys[j0 + j] + i, d - i) : zero();
      transpose16(r);
      const int n = d - i < 16 ? d - i : 16;
      for (int j = 0; j < n; j++) store(tile.keys + (i + j) * kTile + j0, r[j]);
    }
}

// Scores of R query rows against J * 16 keys: one chain over d per (row, key).
template <int R, int J>
inline void score(const float* const* q, const Tile& tile, int d, V s[][4]) {
  V acc[R][J];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int j = 0; j < J; j++) acc[r][j] = zero();
  for (int i = 0; i < d; i++) {
    V k[J];
    UNROLL for (int j = 0; j < J; j++) k[j] = load(tile.keys + i * kTile + 16 * j);
    UNROLL for (int r = 0; r < R; r++) {
      const V x = set1(q[r][i]);
      UNROLL for (int j = 0; j < J; j++) acc[r][j] = fma(x, k[j], acc[r][j]);
    }
  }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int j = 0; j < J; j++) s[r][j] = acc[r][j];
}

// out = out * alpha + p V over keys [first, last), C * 16 columns of R rows.
template <int R, int C>
inline void mix_columns(const float* const* p, const float* alpha, const Tile& tile, int d16, int column, int first,
                        int last, float* const* out) {
  V acc[R][C];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int c = 0; c < C; c++) acc[r][c] = mul(load(out[r] + column + 16 * c), set1(alpha[r]));
  for (int j = first; j < last; j++) {
    V v[C];
    UNROLL for (int c = 0; c < C; c++) v[c] = load(tile.values + j * d16 + column + 16 * c);
    UNROLL for (int r = 0; r < R; r++) {
      const V w = set1(p[r][j]);
      UNROLL for (int c = 0; c < C; c++) acc[r][c] = fma(w, v[c], acc[r][c]);
    }
  }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int c = 0; c < C; c++) store(out[r] + column + 16 * c, acc[r][c]);
}
template <int R>
void mix(const float* const* p, const float* alpha, const Tile& tile, int d16, int first, int last, float* const* out) {
  int column = 0;
  for (; column + 64 <= d16; column += 64) mix_columns<R, 4>(p, alpha, tile, d16, column, first, last, out);
  for (; column < d16; column += 16) mix_columns<R, 1>(p, alpha, tile, d16, column, first, last, out);
}

// State of one query row: running maximum, running sum, output not yet divided.
struct Rows {
  float *q, *out, *p, *max, *sum;
};

// One step of online softmax for R rows that see keys [first, last) of the tile.
template <int R>
void advance(const Attention& a, const Rows& rows, int row, const Tile& tile, int first, int last) {
  const int d16 = round16(a.head_dim);
  const float *q[R], *p[R];
  float* out[R];
  float alpha[R];
  V s[R][4];
  for (int r = 0; r < R; r++) {
    q[r] = rows.q + static_cast<size_t>(row + r) * d16;
    p[r] = rows.p + static_cast<size_t>(row + r) * kTile;
    out[r] = rows.out + static_cast<size_t>(row + r) * d16;
  }
  const int vectors = (last + 15) / 16;
  switch (vectors) {
    case 1: score<R, 1>(q, tile, a.head_dim, s); break;
    case 2: score<R, 2>(q, tile, a.head_dim, s); break;
    case 3: score<R, 3>(q, tile, a.head_dim, s); break;
    default: score<R, 4>(q, tile, a.head_dim, s); break;
  }
  const V factor = set1(a.scale * a.k_scale), hidden = set1(-__builtin_inff());
  for (int r = 0; r < R; r++) {
    V best = hidden;
    for (int j = 0; j < vectors; j++) {
      s[r][j] = mul(s[r][j], factor);
      if (first > 16 * j || last < 16 * (j + 1))
        s[r][j] = select(mask_and(below(last - 16 * j), mask_not(below(first - 16 * j))), s[r][j], hidden);
      best = vmax(s[r][j], best);
    }
    const float old = rows.max[row + r], m = reduce_max(best), now = m > old ? m : old;
    V total = zero();
    for (int j = 0; j < vectors; j++) {
      const V e = vexp(sub(s[r][j], set1(now)));
      store(rows.p + static_cast<size_t>(row + r) * kTile + 16 * j, e);
      total = add(total, e);
    }
    float change[16];
    store(change, vexp(set1(old - now)));
    alpha[r] = change[0];
    rows.max[row + r] = now;
    rows.sum[row + r] = rows.sum[row + r] * alpha[r] + reduce_add(total);
  }
  mix<R>(p, alpha, tile, d16, first, last, out);
}

// The finished rows: divided by their sums, rounded to the result's type.
template <class O>
void write(const Attention& a, const AttentionItem& item, const Rows& rows) {
  const int group = a.heads / a.kv_heads, d = a.head_dim, d16 = round16(d);
  for (int r = 0; r < item.tokens * group; r++) {
    const int g = r / item.tokens, t = r % item.tokens;
    O* out = static_cast<O*>(a.out) + (static_cast<size_t>(item.row + t) * a.heads + item.kv_head * group + g) * d;
    const V inverse = set1(a.v_scale / rows.sum[r]);
    for (int i = 0; i < d; i += 16) store_upto(out + i, mul(load(rows.out + static_cast<size_t>(r) * d16 + i), inverse), d - i);
  }
}

template <class T, class C>
void attention_as(const Attention& a, int index, float* scratch) {
  const AttentionItem item = a.items[index];
  const int group = a.heads / a.kv_heads, count = item.tokens * group, d = a.head_dim, d16 = round16(d);
  Rows rows;
  rows.q = scratch;
  rows.out = rows.q + static_cast<size_t>(count) * d16;
  rows.p = rows.out + static_cast<size_t>(count) * d16;
  rows.max = rows.p + static_cast<size_t>(count) * kTile;
  rows.sum = rows.max + round16(count);
  Tile tile;
  tile.keys = rows.sum + round16(count);
  tile.values = tile.keys + static_cast<size_t>(d16) * kTile;

  // Row order: head by head, tokens inside, so that neighbouring rows see nearly the same keys.
  for (int g = 0; g < group; g++)
    for (int t = 0; t < item.tokens; t++) {
      const int r = g * item.tokens + t;
      const T* q = static_cast<const T*>(a.q) +
                   (static_cast<size_t>(item.row + t) * a.heads + item.kv_head * group + g) * d;
      for (int i = 0; i < d16; i += 16) {
        store(rows.q + static_cast<size_t>(r) * d16 + i, load_upto(q + i, d - i));
        store(rows.out + static_cast<size_t>(r) * d16 + i, zero());
      }
      rows.max[r] = -__builtin_inff();
      rows.sum[r] = 0.f;
    }

  const int end = item.position + item.tokens;  // positions visible to the last token
  int begin = a.window && item.position + 1 > a.window ? item.position + 1 - a.window : 0;
  tile.end = end;
  for (tile.start = begin / kTile * kTile; tile.start < end; tile.start += kTile) {
    tile.count = end - tile.start < kTile ? end - tile.start : kTile;
    stage<C>(a, item.sequence, item.kv_head, tile);
    for (int r = 0; r < count;) {
      // the keys of this row within the tile, and how many rows after it see the same ones
      int first[4] = {}, last[4] = {}, same = 0;
      for (; same < 4 && r + same < count; same++) {
        const int p = item.position + (r + same) % item.tokens;
        const int low = a.window && p + 1 > a.window ? p + 1 - a.window - tile.start : 0, high = p + 1 - tile.start;
        first[same] = low < 0 ? 0 : low;
        last[same] = high > kTile ? kTile : high;
        if (first[same] != first[0] || last[same] != last[0]) break;
      }
      if (first[0] < last[0]) {
        if (same == 4) advance<4>(a, rows, r, tile, first[0], last[0]);
        else if (same == 3) advance<3>(a, rows, r, tile, first[0], last[0]);
        else if (same == 2) advance<2>(a, rows, r, tile, first[0], last[0]);
        else advance<1>(a, rows, r, tile, first[0], last[0]);
      }
      r += same;
    }
  }

  a.out_type == Type::bf16 ? write<bf16>(a, item, rows) : write<float>(a, item, rows);
}

template <class T>
void attention_from(const Attention& a, int item, float* scratch) {
  switch (a.kv_type) {
    case Type::bf16: attention_as<T, bf16>(a, item, scratch); break;
    case Type::e4m3: attention_as<T, e4m3>(a, item, scratch); break;
    default: attention_as<T, float>(a, item, scratch); break;
  }
}
void attention(const Attention& a, int item, float* scratch) {
  a.type == Type::bf16 ? attention_from<bf16>(a, item, scratch) : attention_from<float>(a, item, scratch);
}
