// Attention in FP32: cached keys and values are widened, queries and weights are FP32, and so are all products. See
// attention.h for the two arrangements that must agree.
template <class C>
struct FloatAttention {
  using Stored = C;
  static constexpr int kQuery = kChunk;      // floats a chunk of a query takes
  static constexpr int kTogether = 1;        // keys whose values meet their weights in one instruction

  template <class F>
  static void by_width(int d, F&& f) {
    d % kChunk ? f(Count<0>{}) : f(Count<1>{});
  }
  static void prefetch(const Rows& rows, const Piece& next) { prefetch_piece(rows, next); }
  struct Gathered {};
  static int count_at(const Rows& r, int p, int last) { return piece_at(r, p, last).count; }
  static Piece piece_of(const Rows& r, int p, int last, int head, Gathered&) { return piece_at(head_of_rows(r, head), p, last); }

  // 64 dimensions of a query, in order; to the slots that keys are widened to.
  static void store_query(V x[4], float* q) {
    to_slots<C>(x);
    UNROLL for (int t = 0; t < 4; t++) store(q + 16 * t, x[t]);
  }
  static void store_weights(float* s, int j, V& x) { store(s + j, x); }
  static void in_order(V x[4]) { to_dims<C>(x); }  // a chunk of a result

  // Scores of R query heads against one piece.
  template <int R, int D>
  static void score_piece(const Piece& piece, const uint8_t*, const float* scale, int d, const float* q, float* s) {
    constexpr int kKeys = kSums / R;  // at a time
    const int dp = round_chunk(d), row_bytes = Cached<C>::row_bytes(d), groups = d / 16;
    const Cached<C> cached;
    for (int j0 = 0; j0 < piece.count; j0 += kKeys) {
      const int n = piece.count - j0 < kKeys ? piece.count - j0 : kKeys;
      V acc[kSums];
      UNROLL for (int i = 0; i < kSums; i++) acc[i] = zero();
      for (int c = 0; c < d; c += kChunk) {
        UNROLL for (int j = 0; j < kKeys; j++) {
          const int key = j < n ? j0 + j : j0;  // beyond the last: any key, its sum is not stored
          V k[4];
          cached.template widen<(D > 0)>(piece.rows + key * row_bytes + Cached<C>::row_bytes(c), scale + key * groups + c / 16, d - c, k);
          UNROLL for (int t = 0; t < 4; t++)
            UNROLL for (int r = 0; r < R; r++) acc[r * kKeys + j] = fma(load(q + r * dp + c + 16 * t), k[t], acc[r * kKeys + j]);
        }
      }
      const V sums = add_lanes(acc);
      UNROLL for (int r = 0; r < R; r++) store_from(s + r * kSegment + j0, sums, r * kKeys, n);
    }
  }

  // out += weights x values of one piece, for R query heads. Weights of a row start at w; the piece's at w[at].
  template <int R, int D>
  static void mix_piece(const Piece& piece, const uint8_t*, int, const float* scale, int d, const float* w, int at, float* out) {
    const int dp = round_chunk(d), row_bytes = Cached<C>::row_bytes(d), groups = d / 16;
    const Cached<C> cached;
    w += at;
    for (int c = 0; c < d; c += kChunk) {
      V acc[R * 4];
      UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < 4; t++) acc[r * 4 + t] = load(out + r * dp + c + 16 * t);
      for (int j = 0; j < piece.count; j++) {
        V v[4];
        cached.template widen<(D > 0)>(piece.rows + j * row_bytes + Cached<C>::row_bytes(c), scale + j * groups + c / 16, d - c, v);
        UNROLL for (int r = 0; r < R; r++) {
          const V x = set1(w[r * kSegment + j]);
          UNROLL for (int t = 0; t < 4; t++) acc[r * 4 + t] = fma(x, v[t], acc[r * 4 + t]);
        }
      }
      UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < 4; t++) store(out + r * dp + c + 16 * t, acc[r * 4 + t]);
    }
  }

  // ---- many rows: keys [first, last), from place `from` of the tile on ----

  template <bool Whole>
  static void widen_as(const Rows& rows, int d, int first, int last, float* tile) {
    const int dp = round_chunk(d);
    const Cached<C> cached;
    float scales[kScales];
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
  static void value_tile(const Rows& rows, int d, int from, int first, int last, float* tile) {
    tile += static_cast<size_t>(from) * round_chunk(d);
    d % kChunk ? widen_as<false>(rows, d, first, last, tile) : widen_as<true>(rows, d, first, last, tile);
  }
  static void key_tile(const Rows& rows, int d, int from, int first, int last, float* tile, float* turned) {
    value_tile(rows, d, from, first, last, tile);
    turn(tile, round_chunk(d), from, from + last - first, turned);
  }

  // Lanes lane, lane + Stride, .. of R rows against 16 keys: the tree of reduce_add, whose leaves are chains over chunks.
  template <int R, int Stride>
  static ALWAYS_INLINE void add_dims(const float* q, int dp, const float* turned, int lane, V out[R]) {
    if constexpr (Stride == 16) {
      UNROLL for (int r = 0; r < R; r++) out[r] = zero();
      for (int i = lane; i < dp; i += 16) {
        const V k = load(turned + i * kTile);
        UNROLL for (int r = 0; r < R; r++) out[r] = fma(set1(q[r * dp + i]), k, out[r]);
      }
    } else {
      V other[R];
      add_dims<R, 2 * Stride>(q, dp, turned, lane, out);
      add_dims<R, 2 * Stride>(q, dp, turned, lane + Stride, other);
      UNROLL for (int r = 0; r < R; r++) out[r] = add(out[r], other[r]);
    }
  }
  template <int R>
  static void score_tile(const float* q, int d, const float*, const float* turned, int from, int to, float* s) {
    for (int j = from / 16 * 16; j < to; j += 16) {
      V sums[R];
      add_dims<R, 1>(q, round_chunk(d), turned + j, 0, sums);
      UNROLL for (int r = 0; r < R; r++) store(s + r * kSegment + j, sums[r]);
    }
  }

  // out += weights x values over keys [first, last) of the tile, whose weights start at w[at].
  template <int R>
  static void mix_tile(const float* w, int at, const float* tile, int d, int first, int last, float* out) {
    const int dp = round_chunk(d);
    w += at;
    for (int c = 0; c < dp; c += kChunk) {
      V acc[R][4];
      UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < 4; t++) acc[r][t] = load(out + r * dp + c + 16 * t);
      for (int j = first; j < last; j++) {
        V v[4];
        UNROLL for (int t = 0; t < 4; t++) v[t] = load(tile + j * dp + c + 16 * t);
        UNROLL for (int r = 0; r < R; r++) {
          const V x = set1(w[r * kSegment + j]);
          UNROLL for (int t = 0; t < 4; t++) acc[r][t] = fma(x, v[t], acc[r][t]);
        }
      }
      UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < 4; t++) store(out + r * dp + c + 16 * t, acc[r][t]);
    }
  }
};
