// Causal grouped-query attention over paged KV. A row (one token, one head) walks its visible keys in segments that start
// at multiples of kSegment positions. Within a segment: all scores, their maximum, the weights exp(score - maximum) and
// their sum, then the weighted values, key by key; segments are merged in order. So a row's arithmetic depends on its
// position and nothing else: not on the rows beside it, how the prompt was cut, or which thread took which segment.
//
// Two arrangements give these very bits. Few rows (decoding): keys are widened in registers and met by every head of
// their group, lane by lane over the dimensions; a tree adds the lanes. Many rows (prefill): a tile of keys is widened
// and transposed once, the lanes are keys, and the same chains and the same tree run over the dimensions.

// What one item keeps: rows are tokens x heads of the group, token by token. dp: head_dim in whole chunks, in slot order.
struct State {
  int rows, dp;
  float *q;           // [rows][dp]
  float *scores;      // [rows][kSegment], then the weights
  float *out;         // [rows][dp] of this segment
  float *max, *sum;   // [rows] of this segment
  float *total_out, *total_max, *total_sum;  // of the segments so far
  float *tile;        // [kTile][dp] widened rows
  float *turned;      // [dp][kTile]

  State(float* scratch, int rows_in, int d) : rows(rows_in), dp(round_chunk(d)) {
    const size_t padded = round16(rows), wide = padded * static_cast<size_t>(dp);
    q = scratch;
    scores = q + wide;
    out = scores + padded * kSegment;
    total_out = out + wide;
    max = total_out + wide;
    sum = max + padded;
    total_max = sum + padded;
    total_sum = total_max + padded;
    tile = total_sum + padded;
    turned = tile + static_cast<size_t>(kTile) * dp;
  }
};

// Row r of an item: one token has all heads of its KV heads in order, several tokens have the group of one KV head each.
inline int token_of(const AttentionItem& item, int group, int r) { return item.tokens == 1 ? 0 : r / group; }
inline size_t head_of(const Attention& a, const AttentionItem& item, int group, int r) {
  return static_cast<size_t>(item.row + token_of(item, group, r)) * a.heads + item.kv_head * group + (item.tokens == 1 ? r : r % group);
}

template <class C>
Rows rows_of(const Attention& a, const void* data, const uint8_t* scales, int sequence, int kv_head) {
  Rows r{};
  r.row_bytes = Cached<C>::row_bytes(a.head_dim);
  r.groups = a.head_dim / 16;
  r.block_size = a.block_size;
  r.head_stride = static_cast<size_t>(a.block_size) * r.row_bytes;
  r.scale_head_stride = static_cast<size_t>(a.block_size) * r.groups;
  r.block_stride = r.head_stride * a.kv_heads;
  r.scale_stride = r.scale_head_stride * a.kv_heads;
  r.base = static_cast<const uint8_t*>(data) + r.head_stride * kv_head;
  r.scales = scales ? scales + r.scale_head_stride * kv_head : nullptr;
  r.table = a.block_tables + static_cast<size_t>(sequence) * a.table_stride;
  return r;
}

// ---- both ---------------------------------------------------------------------------------------------------------

// Keys of one segment that a token sees.
struct Span {
  int first, last;
};
inline Span visible(const Attention& a, int segment, int position) {
  const int begin = segment * kSegment, end = begin + kSegment;
  const int low = a.window && position + 1 > a.window ? position + 1 - a.window : 0;
  return {low > begin ? low : begin, position + 1 < end ? position + 1 : end};
}

inline float weight_of(float max, float best) { return exp1(max - (best == -__builtin_inff() ? 0.f : best)); }

// Scores [first, last) of one row to weights; NaN is passed over by the maximum and comes back in the sum.
inline void soften(float factor, int first, int last, float* s, float& max, float& sum) {
  const V hidden = set1(-__builtin_inff());
  V best = hidden;
  for (int j = first / 16 * 16; j < last; j += 16) {
    V x = mul(load(s + j), set1(factor));
    if (first > j || last < j + 16) x = select(mask_and(below(last - j), mask_not(below(first - j))), x, hidden);
    store(s + j, x);
    best = vmax(x, best);
  }
  max = reduce_max(best);
  const V base = set1(max == -__builtin_inff() ? 0.f : max);  // nothing but -inf: every weight is 0, not NaN
  V total = zero();
  for (int j = first / 16 * 16; j < last; j += 16) {
    const V e = vexp(sub(load(s + j), base));
    store(s + j, e);
    total = add(total, e);
  }
  sum = reduce_add(total);
}

// The next segment of a row joins those before it (none yet: total_max is -inf, the rest 0).
inline void merge(const float* out, float max, float sum, int dp, float* total_out, float& total_max, float& total_sum) {
  const float best = max > total_max ? max : total_max;
  const float before = weight_of(total_max, best), now = weight_of(max, best);
  for (int i = 0; i < dp; i += 16)
    store(total_out + i, fma(load(total_out + i), set1(before), mul(load(out + i), set1(now))));
  total_sum = total_sum * before + sum * now;
  total_max = best;
}

// ---- few rows: one token, all its heads ---------------------------------------------------------------------------

// Scores of R query heads against one piece.
template <class C, int R, bool Whole>
inline void score_piece(const Rows& keys, const Piece& piece, const float* scale, int d, int dp, const float* q, float* s) {
  constexpr int kKeys = kSums / R;  // at a time
  const Cached<C> cached;
  for (int j0 = 0; j0 < piece.count; j0 += kKeys) {
    const int n = piece.count - j0 < kKeys ? piece.count - j0 : kKeys;
    V acc[kSums];
    UNROLL for (int i = 0; i < kSums; i++) acc[i] = zero();
    for (int c = 0; c < d; c += kChunk) {
      UNROLL for (int j = 0; j < kKeys; j++) {
        const int key = j < n ? j0 + j : j0;  // beyond the last: any key, its sum is not stored
        V k[4];
        cached.template widen<Whole>(piece.rows + key * keys.row_bytes + Cached<C>::row_bytes(c), scale + key * keys.groups + c / 16, d - c, k);
        UNROLL for (int t = 0; t < 4; t++)
          UNROLL for (int r = 0; r < R; r++) acc[r * kKeys + j] = fma(load(q + r * dp + c + 16 * t), k[t], acc[r * kKeys + j]);
      }
    }
    const V sums = add_lanes(acc);
    UNROLL for (int r = 0; r < R; r++) store_from(s + r * kSegment + j0, sums, r * kKeys, n);
  }
}

// out += weights x values of one piece, for R query heads.
template <class C, int R, bool Whole>
inline void mix_piece(const Rows& values, const Piece& piece, const float* scale, int d, int dp, const float* w, float* out) {
  const Cached<C> cached;
  for (int c = 0; c < d; c += kChunk) {
    V acc[R * 4];
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int t = 0; t < 4; t++) acc[r * 4 + t] = load(out + r * dp + c + 16 * t);
    for (int j = 0; j < piece.count; j++) {
      V v[4];
      cached.template widen<Whole>(piece.rows + j * values.row_bytes + Cached<C>::row_bytes(c), scale + j * values.groups + c / 16, d - c, v);
      UNROLL for (int r = 0; r < R; r++) {
        const V x = set1(w[r * kSegment + j]);
        UNROLL for (int t = 0; t < 4; t++) acc[r * 4 + t] = fma(x, v[t], acc[r * 4 + t]);
      }
    }
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int t = 0; t < 4; t++) store(out + r * dp + c + 16 * t, acc[r * 4 + t]);
  }
}

// The query heads of one KV head, four at a time.
template <class F>
inline void by_heads(int group, F&& f) {
  int g = 0;
  for (; g + 4 <= group; g += 4) f(Count<4>{}, g);
  if (group - g == 3) f(Count<3>{}, g);
  if (group - g == 2) f(Count<2>{}, g);
  if (group - g == 1) f(Count<1>{}, g);
}

// Block by block with all heads inside: they lie side by side, and memory is read in long runs.
template <class C, bool Whole>
void few_rows(const Attention& a, const AttentionItem& item, const State& st, const Rows& keys, const Rows& values, Span span) {
  const int group = a.heads / a.kv_heads, d = a.head_dim, dp = st.dp, origin = span.first / kSegment * kSegment;
  float scales[kPiece * kMaxGroups + 16];
  for (int p = span.first; p < span.last;) {
    Piece piece = piece_at(keys, p, span.last);
    Piece next = p + piece.count < span.last ? piece_at(keys, p + piece.count, span.last) : piece_at(values, span.first, span.last);
    for (int h = 0; h < item.kv_heads; h++) {
      prefetch_piece(keys, next);
      const float* scale = widen_scales(keys, piece, scales);
      by_heads(group, [&](auto count, int g) {
        const size_t row = static_cast<size_t>(h) * group + g;
        score_piece<C, decltype(count)::value, Whole>(keys, piece, scale, d, dp, st.q + row * dp, st.scores + row * kSegment + (p - origin));
      });
      next_head(keys, piece);
      next_head(keys, next);
    }
    p += piece.count;
  }
  for (int r = 0; r < st.rows; r++) {
    soften(a.scale * a.k_scale, span.first - origin, span.last - origin, st.scores + static_cast<size_t>(r) * kSegment, st.max[r], st.sum[r]);
    for (int i = 0; i < dp; i += 16) store(st.out + static_cast<size_t>(r) * dp + i, zero());
  }
  for (int p = span.first; p < span.last;) {
    Piece piece = piece_at(values, p, span.last);
    Piece next = p + piece.count < span.last ? piece_at(values, p + piece.count, span.last) : piece;
    for (int h = 0; h < item.kv_heads; h++) {
      prefetch_piece(values, next);
      const float* scale = widen_scales(values, piece, scales);
      by_heads(group, [&](auto count, int g) {
        const size_t row = static_cast<size_t>(h) * group + g;
        mix_piece<C, decltype(count)::value, Whole>(values, piece, scale, d, dp, st.scores + row * kSegment + (p - origin), st.out + row * dp);
      });
      next_head(values, piece);
      next_head(values, next);
    }
    p += piece.count;
  }
}

// ---- many rows: a tile of keys ------------------------------------------------------------------------------------

template <class C, bool Whole>
void widen_tile_as(const Rows& rows, int d, int dp, int first, int last, float* tile) {
  const Cached<C> cached;
  float scales[kPiece * kMaxGroups + 16];
  for (int p = first; p < last;) {
    const Piece piece = piece_at(rows, p, last);
    const float* scale = widen_scales(rows, piece, scales);
    if (p + kTile < rows.visible) prefetch_piece(rows, piece_at(rows, p + kTile, rows.visible));
    for (int j = 0; j < piece.count; j++, tile += dp)
      for (int c = 0; c < d; c += kChunk) {
        V x[4];
        cached.template widen<Whole>(piece.rows + j * rows.row_bytes + Cached<C>::row_bytes(c), scale + j * rows.groups + c / 16, d - c, x);
        UNROLL for (int t = 0; t < 4; t++) store(tile + c + 16 * t, x[t]);
      }
    p += piece.count;
  }
}
template <class C>
void widen_tile(const Rows& rows, int d, int dp, int first, int last, float* tile) {
  d % kChunk ? widen_tile_as<C, false>(rows, d, dp, first, last, tile) : widen_tile_as<C, true>(rows, d, dp, first, last, tile);
}
inline void turn(const float* tile, int dp, int from, int to, float* turned) {  // keys from .. to - 1 of the tile
  for (int j = from / 16 * 16; j < to; j += 16)
    for (int i = 0; i < dp; i += 16) {
      V r[16];
      UNROLL for (int k = 0; k < 16; k++) r[k] = load(tile + (j + k) * dp + i);
      transpose16(r);
      UNROLL for (int k = 0; k < 16; k++) store(turned + (i + k) * kTile + j, r[k]);
    }
}

// Lanes lane, lane + Stride, .. of R rows against J * 16 keys: the tree of reduce_add, whose leaves are chains over chunks.
template <int R, int J, int Stride>
ALWAYS_INLINE void add_dims(const float* q, int dp, const float* turned, int lane, V out[R][J]) {
  if constexpr (Stride == 16) {
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int j = 0; j < J; j++) out[r][j] = zero();
    for (int i = lane; i < dp; i += 16) {
      V k[J];
      UNROLL for (int j = 0; j < J; j++) k[j] = load(turned + i * kTile + 16 * j);
      UNROLL for (int r = 0; r < R; r++) {
        const V x = set1(q[r * dp + i]);
        UNROLL for (int j = 0; j < J; j++) out[r][j] = fma(x, k[j], out[r][j]);
      }
    }
  } else {
    V other[R][J];
    add_dims<R, J, 2 * Stride>(q, dp, turned, lane, out);
    add_dims<R, J, 2 * Stride>(q, dp, turned, lane + Stride, other);
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int j = 0; j < J; j++) out[r][j] = add(out[r][j], other[r][j]);
  }
}
template <int R>
void score_tile(const float* q, int dp, const float* turned, int from, int to, float* s) {
  for (int j = from / 16 * 16; j < to; j += 16) {
    V sums[R][1];
    add_dims<R, 1, 1>(q, dp, turned + j, 0, sums);
    UNROLL for (int r = 0; r < R; r++) store(s + r * kSegment + j, sums[r][0]);
  }
}

// out += weights x values over keys [first, last) of the tile.
template <int R>
void mix_tile(const float* weights, const float* tile, int dp, int first, int last, float* out) {
  for (int c = 0; c < dp; c += kChunk) {
    V acc[R][4];
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int t = 0; t < 4; t++) acc[r][t] = load(out + r * dp + c + 16 * t);
    for (int j = first; j < last; j++) {
      V v[4];
      UNROLL for (int t = 0; t < 4; t++) v[t] = load(tile + j * dp + c + 16 * t);
      UNROLL for (int r = 0; r < R; r++) {
        const V x = set1(weights[r * kSegment + j]);
        UNROLL for (int t = 0; t < 4; t++) acc[r][t] = fma(x, v[t], acc[r][t]);
      }
    }
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int t = 0; t < 4; t++) store(out + r * dp + c + 16 * t, acc[r][t]);
  }
}

template <class C>
void many_rows(const Attention& a, const AttentionItem& item, const State& st, Rows keys, Rows values, int segment) {
  const int d = a.head_dim, dp = st.dp, group = a.heads / a.kv_heads, origin = segment * kSegment;
  const int first = visible(a, segment, item.position).first, last = visible(a, segment, item.position + item.tokens - 1).last;
  keys.visible = values.visible = last;
  const auto row_of = [&](float* p, int row, int width) { return p + static_cast<size_t>(row) * width; };
  for (int tile = first / kTile * kTile; tile < last; tile += kTile) {
    const int from = first > tile ? first - tile : 0, to = last - tile < kTile ? last - tile : kTile;
    widen_tile<C>(keys, d, dp, tile + from, tile + to, st.tile + static_cast<size_t>(from) * dp);
    turn(st.tile, dp, from, to, st.turned);
    int r = 0;
    const auto score = [&](auto count) {
      constexpr int R = decltype(count)::value;
      score_tile<R>(row_of(st.q, r, dp), dp, st.turned, from, to, row_of(st.scores, r, kSegment) + (tile - origin));
      r += R;
    };
    while (st.rows - r >= 4) score(Count<4>{});
    if (st.rows - r == 3) score(Count<3>{});
    if (st.rows - r == 2) score(Count<2>{});
    if (st.rows - r == 1) score(Count<1>{});
  }
  for (int r = 0; r < st.rows; r++) {
    const Span span = visible(a, segment, item.position + r / group);
    if (span.first < span.last)
      soften(a.scale * a.k_scale, span.first - origin, span.last - origin, row_of(st.scores, r, kSegment), st.max[r], st.sum[r]);
    for (int i = 0; i < dp; i += 16) store(row_of(st.out, r, dp) + i, zero());
  }
  for (int tile = first / kTile * kTile; tile < last; tile += kTile) {
    const int from = first > tile ? first - tile : 0, to = last - tile < kTile ? last - tile : kTile;
    widen_tile<C>(values, d, dp, tile + from, tile + to, st.tile + static_cast<size_t>(from) * dp);
    for (int r = 0; r < st.rows;) {
      // the keys this row sees of the tile, and how many rows after it see the same ones
      int low = 0, high = 0, same = 0;
      for (; same < 4 && r + same < st.rows; same++) {
        const Span span = visible(a, segment, item.position + (r + same) / group);
        const int l = span.first > tile ? span.first - tile : 0, h = span.last - tile < kTile ? span.last - tile : kTile;
        if (same == 0) low = l, high = h;
        if (l != low || h != high) break;
      }
      const float* w = row_of(st.scores, r, kSegment) + (tile - origin);
      float* out = row_of(st.out, r, dp);
      if (low < high) {
        if (same == 4) mix_tile<4>(w, st.tile, dp, low, high, out);
        else if (same == 3) mix_tile<3>(w, st.tile, dp, low, high, out);
        else if (same == 2) mix_tile<2>(w, st.tile, dp, low, high, out);
        else mix_tile<1>(w, st.tile, dp, low, high, out);
      }
      r += same;
    }
  }
}

// The finished rows: divided by their sums, dimensions in order again, rounded to the result's type.
template <class C, class O>
void write(const Attention& a, const AttentionItem& item, const State& st) {
  const int group = a.heads / a.kv_heads, d = a.head_dim;
  for (int r = 0; r < st.rows; r++) {
    O* out = static_cast<O*>(a.out) + head_of(a, item, group, r) * d;
    const V inverse = set1(a.v_scale / st.total_sum[r]);
    for (int c = 0; c < d; c += kChunk) {
      V x[4];
      UNROLL for (int t = 0; t < 4; t++) x[t] = mul(load(st.total_out + static_cast<size_t>(r) * st.dp + c + 16 * t), inverse);
      to_dims<C>(x);
      for (int i = 0; c + 16 * i < d && i < 4; i++) store_upto(out + c + 16 * i, x[i], d - c - 16 * i);
    }
  }
}
template <class C>
void write_as(const Attention& a, const AttentionItem& item, const State& st) {
  a.out_type == Type::bf16 ? write<C, bf16>(a, item, st) : write<C, float>(a, item, st);
}
inline void nothing_yet(const State& st) {
  for (int r = 0; r < st.rows; r++) {
    st.total_max[r] = -__builtin_inff();
    st.total_sum[r] = 0.f;
  }
  for (int i = 0; i < st.rows * st.dp; i += 16) store(st.total_out + i, zero());
}

// Where a segment's results wait for the merge: maxima, sums, outputs.
inline float* partial_of(const AttentionItem& item, int rows, int dp, int segment) {
  return item.partial + (segment - item.first_segment) * attention_partial(rows, dp);
}

template <class T, class C>
void attention_as(const Attention& a, const AttentionItem& item, int begin, int end, float* scratch) {
  const int group = a.heads / a.kv_heads, d = a.head_dim;
  const State st(scratch, item.tokens * item.kv_heads * group, d);
  for (int r = 0; r < st.rows; r++) {
    const T* q = static_cast<const T*>(a.q) + head_of(a, item, group, r) * d;
    for (int c = 0; c < d; c += kChunk) {
      V x[4];
      for (int i = 0; i < 4; i++) x[i] = d > c + 16 * i ? load_upto(q + c + 16 * i, d - c - 16 * i) : zero();
      to_slots<C>(x);
      UNROLL for (int t = 0; t < 4; t++) store(st.q + static_cast<size_t>(r) * st.dp + c + 16 * t, x[t]);
    }
  }
  if (!item.partial) nothing_yet(st);
  const Rows keys = rows_of<C>(a, a.k, a.k_blocks, item.sequence, item.kv_head);
  const Rows values = rows_of<C>(a, a.v, a.v_blocks, item.sequence, item.kv_head);
  for (int segment = begin; segment < end; segment++) {
    if (item.tokens > 1) many_rows<C>(a, item, st, keys, values, segment);
    else if (d % kChunk) few_rows<C, false>(a, item, st, keys, values, visible(a, segment, item.position));
    else few_rows<C, true>(a, item, st, keys, values, visible(a, segment, item.position));
    float* partial = item.partial ? partial_of(item, st.rows, st.dp, segment) : nullptr;
    for (int r = 0; r < st.rows; r++) {
      const Span span = visible(a, segment, item.position + token_of(item, group, r));
      const float* out = st.out + static_cast<size_t>(r) * st.dp;
      if (span.first >= span.last) continue;
      if (!partial) {
        merge(out, st.max[r], st.sum[r], st.dp, st.total_out + static_cast<size_t>(r) * st.dp, st.total_max[r], st.total_sum[r]);
      } else {
        partial[2 * r] = st.max[r];
        partial[2 * r + 1] = st.sum[r];
        float* to = partial + round16(2 * st.rows) + static_cast<size_t>(r) * st.dp;
        for (int i = 0; i < st.dp; i += 16) store(to + i, load(out + i));
      }
    }
  }
  if (!item.partial) write_as<C>(a, item, st);
}

template <class C>
void merge_as(const Attention& a, const AttentionItem& item, float* scratch) {
  const int group = a.heads / a.kv_heads;
  const State st(scratch, item.tokens * item.kv_heads * group, a.head_dim);
  nothing_yet(st);
  for (int segment = item.first_segment; segment < item.end_segment; segment++) {
    const float* partial = partial_of(item, st.rows, st.dp, segment);
    for (int r = 0; r < st.rows; r++) {
      const Span span = visible(a, segment, item.position + token_of(item, group, r));
      if (span.first < span.last)
        merge(partial + round16(2 * st.rows) + static_cast<size_t>(r) * st.dp, partial[2 * r], partial[2 * r + 1], st.dp,
              st.total_out + static_cast<size_t>(r) * st.dp, st.total_max[r], st.total_sum[r]);
    }
  }
  write_as<C>(a, item, st);
}

template <class C>
void attention_from(const Attention& a, const AttentionItem& item, int begin, int end, float* scratch) {
  a.type == Type::bf16 ? attention_as<bf16, C>(a, item, begin, end, scratch) : attention_as<float, C>(a, item, begin, end, scratch);
}
void attention(const Attention& a, const AttentionItem& item, int begin, int end, float* scratch) {
  switch (a.kv_type) {
    case Type::bf16: attention_from<bf16>(a, item, begin, end, scratch); break;
    case Type::e4m3: attention_from<e4m3>(a, item, begin, end, scratch); break;
    case Type::nvfp4: attention_from<e2m1x2>(a, item, begin, end, scratch); break;
    default: attention_from<float>(a, item, begin, end, scratch); break;
  }
}
void attention_merge(const Attention& a, const AttentionItem& item, float* scratch) {
  switch (a.kv_type) {
    case Type::bf16: merge_as<bf16>(a, item, scratch); break;
    case Type::e4m3: merge_as<e4m3>(a, item, scratch); break;
    case Type::nvfp4: merge_as<e2m1x2>(a, item, scratch); break;
    default: merge_as<float>(a, item, scratch); break;
  }
}
