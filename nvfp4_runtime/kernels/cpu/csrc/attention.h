// Causal grouped-query attention over paged KV. A row (one token, one head) walks its visible keys in segments that start
// at multiples of kSegment positions. Within a segment: all scores, their maximum, the weights exp(score - maximum) and
// their sum, then the weighted values, key by key; segments are merged in order. So a row's arithmetic depends on its
// position and nothing else: not on the rows beside it, how the prompt was cut, or which thread took which segment.
//
// Two arrangements give these very bits. Few rows (decoding): keys are decoded in registers and met by every head of
// their group, lane by lane over the dimensions; a tree adds the lanes. Many rows (prefill): a tile of keys is decoded
// and transposed once, the lanes are keys, and the same chains and the same tree run over the dimensions.
//
// There are two arithmetics, each with both arrangements: FloatAttention, and PairAttention where the ISA multiplies pairs of
// bfloat16. This file is what they share; it calls them P.

// What one item keeps: rows are tokens x heads of the group, token by token. dp: head_dim in whole chunks, in slot order.
struct State {
  int rows, dp, query;  // query: lanes a query takes
  float *q;           // [rows][query]
  float *scores;      // [rows][kSegment], then the weights
  float *out;         // [rows][dp] of this segment
  float *max, *sum;   // [rows] of this segment
  float *total_out, *total_max, *total_sum;  // of the segments so far
  float *tile;        // [kTile][dp] decoded rows
  float *turned;      // [dp][kTile]

  State(float* scratch, int rows_in, int d, int query_chunk) : rows(rows_in), dp(round_chunk(d)), query(dp / kChunk * query_chunk) {
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
// The sum is that of the weights as P stores them.
template <class P>
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
    V e = vexp(sub(load(s + j), base));
    P::store_weights(s, j, e);
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

inline void turn(const float* tile, int dp, int from, int to, float* turned) {  // keys from .. to - 1 of the tile
  for (int j = from / 16 * 16; j < to; j += 16)
    for (int i = 0; i < dp; i += 16) {
      V r[16];
      UNROLL for (int k = 0; k < 16; k++) r[k] = load(tile + (j + k) * dp + i);
      transpose16(r);
      UNROLL for (int k = 0; k < 16; k++) store(turned + (i + k) * kTile + j, r[k]);
    }
}

#include "attention_floats.h"
#if defined(__AVX512BF16__)
#include "attention_pairs.h"
#endif

// ---- few rows: one token, all its heads ---------------------------------------------------------------------------

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
template <class P, int D>
void few_rows(const Attention& a, const AttentionItem& item, const State& st, const Rows& keys, const Rows& values, Span span) {
  const int group = a.heads / a.kv_heads, d = a.head_dim, dp = st.dp, origin = span.first / kSegment * kSegment;
  float scales[kScales];
  typename P::Gathered gathered;
  for (int p = span.first; p < span.last;) {
    Piece piece = piece_at(keys, p, span.last);
    Piece next = p + piece.count < span.last ? piece_at(keys, p + piece.count, span.last) : piece_at(values, span.first, span.last);
    for (int h = 0; h < item.kv_heads; h++) {
      P::prefetch(keys, next);
      const float* scale = widen_scales(keys, piece, scales);
      by_heads(group, [&](auto count, int g) {
        const size_t row = static_cast<size_t>(h) * group + g;
        P::template score_piece<decltype(count)::value, D>(piece, g ? piece.rows : next.rows, scale, d, st.q + row * st.query, st.scores + row * kSegment + (p - origin));
      });
      next_head(keys, piece);
      next_head(keys, next);
    }
    p += piece.count;
  }
  for (int r = 0; r < st.rows; r++) {
    soften<P>(a.scale * a.k_scale, span.first - origin, span.last - origin, st.scores + static_cast<size_t>(r) * kSegment, st.max[r], st.sum[r]);
    for (int i = 0; i < dp; i += 16) store(st.out + static_cast<size_t>(r) * dp + i, zero());
  }
  for (int p = span.first / P::kTogether * P::kTogether; p < span.last;) {
    const int count = P::count_at(values, p, span.last), from = span.first > p ? span.first - p : 0;
    // after the last values come the next segment's keys, which mostly fall to the same thread; if there are none, any
    Piece next = p + count < span.last ? piece_at(values, p + count, span.last)
                                       : piece_at(keys, span.last <= item.position ? span.last : p, item.position + 1);
    for (int h = 0; h < item.kv_heads; h++) {
      P::prefetch(values, next);
      const Piece piece = P::piece_of(values, p, span.last, h, gathered);
      const float* scale = widen_scales(values, piece, scales);
      by_heads(group, [&](auto count_of, int g) {
        const size_t row = static_cast<size_t>(h) * group + g;
        P::template mix_piece<decltype(count_of)::value, D>(piece, g ? piece.rows : next.rows, from, scale, d, st.scores + row * kSegment, p - origin, st.out + row * dp);
      });
      next_head(values, next);
    }
    p += count;
  }
}

// ---- many rows: a tile of keys ------------------------------------------------------------------------------------

template <class P>
void many_rows(const Attention& a, const AttentionItem& item, const State& st, Rows keys, Rows values, int segment) {
  const int d = a.head_dim, dp = st.dp, group = a.heads / a.kv_heads, origin = segment * kSegment;
  const int first = visible(a, segment, item.position).first, last = visible(a, segment, item.position + item.tokens - 1).last;
  keys.visible = values.visible = last;
  const auto row_of = [&](float* p, int row, int width) { return p + static_cast<size_t>(row) * width; };
  for (int tile = first / kTile * kTile; tile < last; tile += kTile) {
    const int from = first > tile ? first - tile : 0, to = last - tile < kTile ? last - tile : kTile;
    P::key_tile(keys, d, from, tile + from, tile + to, st.tile, st.turned);
    int r = 0;
    const auto score = [&](auto count) {
      constexpr int R = decltype(count)::value;
      P::template score_tile<R>(row_of(st.q, r, st.query), d, st.tile, st.turned, from, to, row_of(st.scores, r, kSegment) + (tile - origin));
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
      soften<P>(a.scale * a.k_scale, span.first - origin, span.last - origin, row_of(st.scores, r, kSegment), st.max[r], st.sum[r]);
    for (int i = 0; i < dp; i += 16) store(row_of(st.out, r, dp) + i, zero());
  }
  for (int tile = first / kTile * kTile; tile < last; tile += kTile) {
    const int from = first > tile ? first - tile : 0, to = last - tile < kTile ? last - tile : kTile;
    P::value_tile(values, d, from, tile + from, tile + to, st.tile);
    for (int r = 0; r < st.rows;) {
      // the keys this row sees of the tile, and how many rows after it see the same ones
      int low = 0, high = 0, same = 0;
      for (; same < 4 && r + same < st.rows; same++) {
        const Span span = visible(a, segment, item.position + (r + same) / group);
        const int l = span.first > tile ? span.first - tile : 0, h = span.last - tile < kTile ? span.last - tile : kTile;
        if (same == 0) low = l, high = h;
        if (l != low || h != high) break;
      }
      const float* w = row_of(st.scores, r, kSegment);
      float* out = row_of(st.out, r, dp);
      if (low < high) {
        if (same == 4) P::template mix_tile<4>(w, tile - origin, st.tile, d, low, high, out);
        else if (same == 3) P::template mix_tile<3>(w, tile - origin, st.tile, d, low, high, out);
        else if (same == 2) P::template mix_tile<2>(w, tile - origin, st.tile, d, low, high, out);
        else P::template mix_tile<1>(w, tile - origin, st.tile, d, low, high, out);
      }
      r += same;
    }
  }
}

// The finished rows: divided by their sums, dimensions in order again, rounded to the result's type.
template <class P, class O>
void write(const Attention& a, const AttentionItem& item, const State& st) {
  const int group = a.heads / a.kv_heads, d = a.head_dim;
  for (int r = 0; r < st.rows; r++) {
    O* out = static_cast<O*>(a.out) + head_of(a, item, group, r) * d;
    float sum = st.total_sum[r];
    if (a.sinks) sum += exp1(a.sinks[head_of(a, item, group, r) % static_cast<size_t>(a.heads)] - st.total_max[r]);
    const V inverse = set1(a.v_scale / sum);
    for (int c = 0; c < d; c += kChunk) {
      V x[4];
      UNROLL for (int t = 0; t < 4; t++) x[t] = mul(load(st.total_out + static_cast<size_t>(r) * st.dp + c + 16 * t), inverse);
      P::in_order(x);
      for (int i = 0; c + 16 * i < d && i < 4; i++) store_upto(out + c + 16 * i, x[i], d - c - 16 * i);
    }
  }
}
template <class P>
void write_as(const Attention& a, const AttentionItem& item, const State& st) {
  a.out_type == Type::bf16 ? write<P, bf16>(a, item, st) : write<P, float>(a, item, st);
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

template <class T, class P>
void attention_as(const Attention& a, const AttentionItem& item, int begin, int end, float* scratch) {
  const int group = a.heads / a.kv_heads, d = a.head_dim;
  const State st(scratch, item.tokens * item.kv_heads * group, d, P::kQuery);
  for (int r = 0; r < st.rows; r++) {
    const T* q = static_cast<const T*>(a.q) + head_of(a, item, group, r) * d;
    for (int c = 0; c < d; c += kChunk) {
      V x[4];
      for (int i = 0; i < 4; i++) x[i] = d > c + 16 * i ? load_upto(q + c + 16 * i, d - c - 16 * i) : zero();
      P::store_query(x, st.q + static_cast<size_t>(r) * st.query + c / kChunk * P::kQuery);
    }
  }
  if (!item.partial) nothing_yet(st);
  const Rows keys = rows_of<typename P::Stored>(a, a.k, a.k_blocks, item.sequence, item.kv_head);
  const Rows values = rows_of<typename P::Stored>(a, a.v, a.v_blocks, item.sequence, item.kv_head);
  for (int segment = begin; segment < end; segment++) {
    if (item.tokens > 1) many_rows<P>(a, item, st, keys, values, segment);
    else P::by_width(d, [&](auto width) { few_rows<P, decltype(width)::value>(a, item, st, keys, values, visible(a, segment, item.position)); });
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
  if (!item.partial) write_as<P>(a, item, st);
}

template <class P>
void merge_as(const Attention& a, const AttentionItem& item, float* scratch) {
  const int group = a.heads / a.kv_heads;
  const State st(scratch, item.tokens * item.kv_heads * group, a.head_dim, P::kQuery);
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
  write_as<P>(a, item, st);
}

// All that depends on P, behind one type.
template <class P>
struct Attend {
  static void segments(const Attention& a, const AttentionItem& item, int begin, int end, float* scratch) {
    a.type == Type::bf16 ? attention_as<bf16, P>(a, item, begin, end, scratch) : attention_as<float, P>(a, item, begin, end, scratch);
  }
  static void merge(const Attention& a, const AttentionItem& item, float* scratch) { merge_as<P>(a, item, scratch); }
};
// Calls f with the arithmetic of a call: pairs where the ISA has them and activations are BF16 (queries may come in FP32).
template <class F>
void by_arithmetic(const Attention& a, F&& f) {
#if defined(__AVX512BF16__)
  if (a.type == Type::bf16 || a.out_type == Type::bf16) switch (a.kv_type) {
      case Type::bf16: return f(Attend<PairAttention<bf16>>{});
      case Type::e4m3: return f(Attend<PairAttention<e4m3>>{});
      case Type::nvfp4: return f(Attend<PairAttention<e2m1x2>>{});
      default: break;
    }
#endif
  switch (a.kv_type) {
    case Type::bf16: return f(Attend<FloatAttention<bf16>>{});
    case Type::e4m3: return f(Attend<FloatAttention<e4m3>>{});
    case Type::nvfp4: return f(Attend<FloatAttention<e2m1x2>>{});
    default: return f(Attend<FloatAttention<float>>{});
  }
}
void attention(const Attention& a, const AttentionItem& item, int begin, int end, float* scratch) {
  by_arithmetic(a, [&](auto how) { how.segments(a, item, begin, end, scratch); });
}
void attention_merge(const Attention& a, const AttentionItem& item, float* scratch) {
  by_arithmetic(a, [&](auto how) { how.merge(a, item, scratch); });
}
