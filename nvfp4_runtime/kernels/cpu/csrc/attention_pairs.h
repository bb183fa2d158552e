// Attention by pairs of bfloat16 (vdpbf16ps), for BF16 activations over a cache that bfloat16 holds exactly: each
// instruction adds two exact products to an FP32 lane. A query is rounded to bfloat16 once, a weight (NVFP4: a weight times
// its block scale) likewise. Scores pair dimensions; weighted values pair positions 2 i and 2 i + 1, and where a row sees one
// of them the other counts as zeros. See attention.h for the two arrangements that must agree.
inline Pairs pairs_at(const float* p) { return {_mm512_loadu_si512(p)}; }
inline void store_pairs(float* p, Pairs x) { _mm512_storeu_si512(p, x.v); }
inline __m512i words_of(V x) {  // nearest even (subnormals become zero), in the low half of each lane
  return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v)));
}
inline Pairs only(Pairs x, uint32_t mask) { return {_mm512_and_si512(x.v, _mm512_set1_epi32(static_cast<int32_t>(mask)))}; }
// Which halves of the pair of positions p, p + 1 lie in [first, last), as a mask of its lanes.
inline uint32_t halves(int p, int first, int last) { return (p >= first ? 0xffffu : 0u) | (p + 1 < last ? 0xffff0000u : 0u); }

// Four block scales of each of two keys, a block's over two of its key's eight lanes.
template <int D>
inline V scales_of_two(const float* one, const float* other, int n) {
  const __m256 eight = D == 64 ? _mm256_loadu_ps(one)  // the other's follow
                               : _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(one)), _mm_loadu_ps(other), 1);
  const __m512i at = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  if (D) return {_mm512_permutexvar_ps(at, _mm512_castps256_ps512(eight))};
  const __mmask16 used = static_cast<__mmask16>((n >= 64 ? 0xff : lanes(n / 8)) * 0x101);
  return {_mm512_maskz_permutexvar_ps(used, at, _mm512_castps256_ps512(eight))};
}

// Weights of 16 keys times four block scales of each, rounded to pairs: [8 pairs of keys][4 blocks], zero but for keys
// from .. to - 1.
inline void weigh_blocks(const float* w, const float* scale, int groups, int from, int to, float* out) {
  const __m512 x = _mm512_loadu_ps(w);
  const __m512i four = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  const __m512i order = _mm512_setr_epi32(0x040000, 0x050001, 0x060002, 0x070003, 0x0c0008, 0x0d0009, 0x0e000a, 0x0f000b, 0x140010,
                                          0x150011, 0x160012, 0x170013, 0x1c0018, 0x1d0019, 0x1e001a, 0x1f001b);
  V y[4];  // of four keys each
  UNROLL for (int u = 0; u < 4; u++) {
    const float* s = scale + 4 * u * groups;
    V by;
    if (groups == 4) {
      by = load(s);
    } else {
      by.v = _mm512_castps128_ps512(_mm_loadu_ps(s));
      by.v = _mm512_insertf32x4(by.v, _mm_loadu_ps(s + groups), 1);
      by.v = _mm512_insertf32x4(by.v, _mm_loadu_ps(s + 2 * groups), 2);
      by.v = _mm512_insertf32x4(by.v, _mm_loadu_ps(s + 3 * groups), 3);
    }
    y[u] = mul({_mm512_permutexvar_ps(_mm512_add_epi32(four, _mm512_set1_epi32(4 * u)), x)}, by);
  }
  if (from > 0 || to < 16)
    UNROLL for (int u = 0; u < 4; u++) y[u] = select(mask_and(below(4 * (to - 4 * u)), mask_not(below(4 * (from - 4 * u)))), y[u], zero());
  UNROLL for (int h = 0; h < 2; h++) {
    const __m512i words = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(y[2 * h + 1].v, y[2 * h].v));
    _mm512_storeu_si512(out + 16 * h, _mm512_permutexvar_epi16(order, words));
  }
}
inline Pairs spread_blocks(const float* four) {  // of one pair of keys: lane i of a chunk of values has block i % 4
  return {_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(four)))};
}

// Positions p .. of one head, at most kPiece, none of whose pairs is cut: where blocks have an odd size, copied to `rows`.
struct PairRows {
  alignas(64) uint8_t rows[kPiece * 2 * kMaxHeadDim], scales[kPiece * kMaxGroups];
};
inline Piece even_piece(const Rows& all, int p, int last, int head, PairRows& to) {
  const Rows r = head_of_rows(all, head);
  if (r.block_size % 2 == 0) return piece_at(r, p, last);
  const int count = last - p < kPiece ? last - p : kPiece;
  for (int j = 0; j < count; j++) {
    const Piece one = piece_at(r, p + j, p + j + 1);
    __builtin_memcpy(to.rows + j * r.row_bytes, one.rows, static_cast<size_t>(r.row_bytes));
    if (one.scales) __builtin_memcpy(to.scales + j * r.groups, one.scales, static_cast<size_t>(r.groups));
  }
  return {to.rows, r.scales ? to.scales : nullptr, count};
}

// Where reduce8_halves leaves the sums of key k and row r, if vector r * kTwos + k / 2 holds keys k and k + 1.
template <int kTwos>
struct TwoKeysOrder {
  alignas(64) int32_t at[16] = {};
  constexpr TwoKeysOrder() {
    for (int i = 0; i < 8 / kTwos * 2 * kTwos; i++) at[i] = i % 2 * 8 + i / (2 * kTwos) * kTwos + i % (2 * kTwos) / 2;
  }
};

// The first n of kKeys sums of each row, which lie row after row.
template <int R, int kKeys>
inline void store_sums(float* s, V sums, int n) {
  if (n == kKeys && R == 1) {
    store(s, sums);
  } else if (n == kKeys && R == 2) {
    _mm256_storeu_ps(s, _mm512_castps512_ps256(sums.v));
    _mm256_storeu_ps(s + kSegment, _mm512_extractf32x8_ps(sums.v, 1));
  } else if (n == kKeys && R == 4) {
    _mm_storeu_ps(s, _mm512_castps512_ps128(sums.v));
    _mm_storeu_ps(s + kSegment, _mm512_extractf32x4_ps(sums.v, 1));
    _mm_storeu_ps(s + 2 * kSegment, _mm512_extractf32x4_ps(sums.v, 2));
    _mm_storeu_ps(s + 3 * kSegment, _mm512_extractf32x4_ps(sums.v, 3));
  } else {
    UNROLL for (int r = 0; r < R; r++) store_from(s + r * kSegment, sums, r * kKeys, n);
  }
}

template <class C>
struct PairAttention {
  using Stored = C;
  using Decode = Paired<C>;
  static constexpr bool kScaled = Decode::kLanes == 8;  // NVFP4
  static constexpr int kQuery = 16 * Decode::kDots;     // 32-bit lanes a chunk of a query takes
  static constexpr int kTogether = 2;
  template <class F>
  static void by_width(int d, F&& f) {
    d == 64 ? f(Count<64>{}) : d == 128 ? f(Count<128>{}) : d % kChunk ? f(Count<0>{}) : f(Count<1>{});
  }
  // The rows to come: BF16 is bound by memory and asks for a piece at once; narrower types ask row by row as they work, for
  // many requests at a time hold up the loads that are waited for.
  static constexpr bool kAsksAhead = Cached<C>::row_bytes(kChunk) >= 128;
  static void prefetch(const Rows& rows, const Piece& next) {
    if (kAsksAhead) return prefetch_piece(rows, next);
    if (next.scales)
      for (int i = 0; i < next.count * rows.groups; i += 64) __builtin_prefetch(next.scales + i, 0, 2);
  }
  static void prefetch_row(const uint8_t* p) {  // a chunk of it, or a pair's two
    if (!kAsksAhead) __builtin_prefetch(p, 0, 2);
  }
  using Gathered = PairRows;
  static int count_at(const Rows& r, int p, int last) {
    return r.block_size % 2 == 0 ? piece_at(r, p, last).count : last - p < kPiece ? last - p : kPiece;
  }
  static Piece piece_of(const Rows& r, int p, int last, int head, Gathered& to) { return even_piece(r, p, last, head, to); }
  static int query_width(int d) { return round_chunk(d) / kChunk * kQuery; }

  static constexpr Order key_order() {
    Order o{};
    for (int s = 0; s < kChunk; s++) o.at[s] = Decode::key_dim(s / 32 * 16 + s % 16, s / 16 % 2);
    return o;
  }
  static constexpr Order value_order() {
    Order o{};
    for (int s = 0; s < kChunk; s++) o.at[Decode::value_dim(s)] = s;
    return o;
  }
  static void store_query(V x[4], float* q) {
    static constexpr Order order = key_order();
    permute64(x, order);
    UNROLL for (int i = 0; i < 2; i++) {
      const __m512i pairs = _mm512_or_si512(words_of(x[2 * i]), _mm512_slli_epi32(words_of(x[2 * i + 1]), 16));
      if constexpr (kScaled) {  // for two keys at once
        store_pairs(q + 32 * i, {_mm512_shuffle_i64x2(pairs, pairs, 0x44)});
        store_pairs(q + 32 * i + 16, {_mm512_shuffle_i64x2(pairs, pairs, 0xee)});
      } else {
        store_pairs(q + 16 * i, {pairs});
      }
    }
  }
  // Sixteen weights of a row. Rounded, side by side from the row's start (behind what is still to be read as FP32), unless
  // they meet a block scale first.
  static void store_weights(float* s, int j, V& x) {
    if constexpr (kScaled) {
      store(s + j, x);
    } else {
      const __m256i words = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(reinterpret_cast<bf16*>(s) + j), words);
      x = widen_bf16(words);
    }
  }
  static void in_order(V x[4]) {
    static constexpr Order order = value_order();
    permute64(x, order);
  }

  // ---- few rows ----

  template <int R, int D>
  static void score_piece(const Piece& piece, const uint8_t* ahead, const float* scale, int d, const float* q, float* s) {
    constexpr int kKeys = kScaled ? 8 / R * 2 : kSums / R;  // at a time
    int j = 0;
    for (; j + kKeys <= piece.count; j += kKeys) store_sums<R, kKeys>(s + j, sums_of<R, D, true>(piece, ahead, scale, d, j, kKeys, q), kKeys);
    if (j < piece.count) store_sums<R, kKeys>(s + j, sums_of<R, D, false>(piece, ahead, scale, d, j, piece.count - j, q), piece.count - j);
  }
  // Of n keys from j on, which are all there is room for if All.
  template <int R, int D, bool All>
  static ALWAYS_INLINE V sums_of(const Piece& piece, const uint8_t* ahead, const float* scale, int any_width, int j, int n, const float* q) {
    const int d = width_of<D>(any_width), width = query_width(d), bytes = Cached<C>::row_bytes(d);
    const uint8_t* rows = piece.rows + j * bytes;
    ahead += j * bytes;
    const Decode decode;
    if constexpr (kScaled) {
      constexpr int kTwos = 8 / R;
      static constexpr TwoKeysOrder<kTwos> order{};
      const int groups = d / 16;
      const float* by_key = scale + j * groups;
      V acc[8];
      UNROLL for (int i = 0; i < 8; i++) acc[i] = zero();
      for (int c = 0, at = 0; c < d; c += kChunk, at += kQuery) {
        UNROLL for (int i = 0; i < kTwos; i++) {
          const int one = All || 2 * i < n ? 2 * i : 0, other = All || 2 * i + 1 < n ? one + 1 : one;  // beyond the last: any
          prefetch_row(ahead + 2 * i * bytes + c / 2);
          Pairs k[4];
          constexpr int kTogetherD = All ? D : D != 0;  // what follows the last key may not be there to be read
          decode.template keys<kTogetherD>(rows + one * bytes + c / 2, rows + other * bytes + c / 2, d - c, k);
          const V by = scales_of_two<kTogetherD>(by_key + one * groups + c / 16, by_key + other * groups + c / 16, d - c);
          UNROLL for (int r = 0; r < R; r++) {
            V part = zero();
            UNROLL for (int t = 0; t < 4; t++) part = dot(part, k[t], pairs_at(q + r * width + at + 16 * t));
            acc[r * kTwos + i] = fma(part, by, acc[r * kTwos + i]);
          }
        }
      }
      return {_mm512_permutexvar_ps(_mm512_load_si512(order.at), reduce8_halves(acc).v)};
    } else {
      constexpr int kKeys = kSums / R;
      V acc[kSums];
      UNROLL for (int i = 0; i < kSums; i++) acc[i] = zero();
      for (int c = 0, at = 0; c < d; c += kChunk, at += kQuery) {
        UNROLL for (int i = 0; i < kKeys; i++) {
          prefetch_row(ahead + i * bytes + Cached<C>::row_bytes(c));
          Pairs k[2];
          decode.template key<D>(rows + (All || i < n ? i : 0) * bytes + Cached<C>::row_bytes(c), d - c, k);
          UNROLL for (int t = 0; t < 2; t++)
            UNROLL for (int r = 0; r < R; r++) acc[r * kKeys + i] = dot(acc[r * kKeys + i], k[t], pairs_at(q + r * width + at + 16 * t));
        }
      }
      return add_lanes(acc);
    }
  }

  template <int R, int D>
  static void mix_piece(const Piece& piece, const uint8_t* ahead, int from, const float* scale, int any_width, const float* w, int at, float* out) {
    const int d = width_of<D>(any_width), dp = round_chunk(d), count = piece.count, row_bytes = Cached<C>::row_bytes(d);
    const Decode decode;
    alignas(64) float scaled[R][32];
    for (int c = 0; c < d; c += kChunk) {
      if constexpr (kScaled)
        UNROLL for (int r = 0; r < R; r++) weigh_blocks(w + r * kSegment + at, scale + c / 16, d / 16, from, count, scaled[r]);
      V acc[R * 4];
      UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < 4; t++) acc[r * 4 + t] = load(out + r * dp + c + 16 * t);
      const uint8_t* bytes = piece.rows + Cached<C>::row_bytes(c);
      for (int j = 0; j < count; j += 2, bytes += 2 * row_bytes) {
        const uint32_t seen = halves(j, from, count);
        prefetch_row(ahead + j * row_bytes + Cached<C>::row_bytes(c));
        if (!kScaled) prefetch_row(ahead + (j + 1) * row_bytes + Cached<C>::row_bytes(c));
        Pairs v[4];
        decode.template values<D>(bytes, bytes + (seen >> 16 ? row_bytes : 0), d - c, v);
        if (seen != 0xffffffffu) UNROLL for (int t = 0; t < 4; t++) v[t] = only(v[t], seen);
        UNROLL for (int r = 0; r < R; r++) {
          Pairs x;
          if constexpr (kScaled) x = spread_blocks(scaled[r] + 2 * j);
          else x = set1_pair(w + r * kSegment + (at + j) / 2);
          UNROLL for (int t = 0; t < 4; t++) acc[r * 4 + t] = dot(acc[r * 4 + t], v[t], x);
        }
      }
      UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < 4; t++) store(out + r * dp + c + 16 * t, acc[r * 4 + t]);
    }
  }

  // ---- many rows: keys [first, last), from place `from` of the tile on ----
  // Keys: [kTile][dp / 2] pairs, then turned. Values: [kTile / 2][dp] pairs. Block scales lie behind them.

  template <int D>
  static void key_tile_as(const Rows& rows, int d, int from, int first, int last, float* tile, float* turned) {
    const int half = round_chunk(d) / 2, groups = half / 8;
    const Decode decode;
    float scales[kScales];
    float* by = tile + kTile * half;  // [groups][kTile]
    float* to = tile + static_cast<size_t>(from) * half;
    int at = from;
    for (int p = first; p < last;) {
      const Piece piece = piece_at(rows, p, last);
      const float* scale = widen_scales(rows, piece, scales);
      if (p + kTile < rows.visible) prefetch_piece(rows, piece_at(rows, p + kTile, rows.visible));
      for (int j = 0; j < piece.count; j += 1 + kScaled) {
        const int one = j * rows.row_bytes, other = j + 1 < piece.count ? one + rows.row_bytes : one;
        for (int c = 0; c < d; c += kChunk) {
          const uint8_t* bytes = piece.rows + Cached<C>::row_bytes(c);
          float* const chunk = to + j * half + c / 2;
          if constexpr (kScaled) {
            Pairs k[4];
            decode.template keys<D>(bytes + one, bytes + other, d - c, k);
            UNROLL for (int t = 0; t < 4; t++) {
              _mm256_storeu_si256(reinterpret_cast<__m256i*>(chunk + 8 * t), _mm512_castsi512_si256(k[t].v));
              if (one != other) _mm256_storeu_si256(reinterpret_cast<__m256i*>(chunk + half + 8 * t), _mm512_extracti64x4_epi64(k[t].v, 1));
            }
          } else {
            Pairs k[2];
            decode.template key<D>(bytes + one, d - c, k);
            UNROLL for (int t = 0; t < 2; t++) store_pairs(chunk + 16 * t, k[t]);
          }
        }
      }
      if constexpr (kScaled)
        for (int g = 0; g < groups; g++)
          for (int j = 0; j < piece.count; j++) by[g * kTile + at + j] = g < rows.groups ? scale[j * rows.groups + g] : 0.f;
      to += piece.count * half;
      at += piece.count;
      p += piece.count;
    }
    turn(tile, half, from, at, turned);
  }
  static void key_tile(const Rows& rows, int d, int from, int first, int last, float* tile, float* turned) {
    d % kChunk ? key_tile_as<0>(rows, d, from, first, last, tile, turned) : key_tile_as<1>(rows, d, from, first, last, tile, turned);
  }

  // Lanes lane, lane + Stride, .. of R rows against 16 keys, as add_lanes (or reduce8_halves) adds them.
  template <int R, int Stride>
  static ALWAYS_INLINE void add_dims(const float* q, int d, const float* by, const float* turned, int lane, V out[R]) {
    if constexpr (Stride == Decode::kLanes) {
      const int width = query_width(d);
      UNROLL for (int r = 0; r < R; r++) out[r] = zero();
      for (int c = 0, at = lane; c < d; c += kChunk, at += kQuery) {
        V part[R];
        if constexpr (kScaled) UNROLL for (int r = 0; r < R; r++) part[r] = zero();
        UNROLL for (int t = 0; t < Decode::kDots; t++) {
          const Pairs k = pairs_at(turned + (c / 2 + t * Decode::kLanes + lane) * kTile);
          UNROLL for (int r = 0; r < R; r++) {
            V& sum = kScaled ? part[r] : out[r];
            sum = dot(sum, k, set1_pair(q + r * width + at + 16 * t));
          }
        }
        if constexpr (kScaled) UNROLL for (int r = 0; r < R; r++) out[r] = fma(part[r], load(by + (c / 16 + lane / 2) * kTile), out[r]);
      }
    } else {
      V other[R];
      add_dims<R, 2 * Stride>(q, d, by, turned, lane, out);
      add_dims<R, 2 * Stride>(q, d, by, turned, lane + Stride, other);
      UNROLL for (int r = 0; r < R; r++) out[r] = add(out[r], other[r]);
    }
  }
  template <int R>
  static void score_tile(const float* q, int d, const float* tile, const float* turned, int from, int to, float* s) {
    for (int j = from / 16 * 16; j < to; j += 16) {
      V sums[R];
      add_dims<R, 1>(q, d, tile + kTile / 2 * round_chunk(d) + j, turned + j, 0, sums);
      UNROLL for (int r = 0; r < R; r++) store(s + r * kSegment + j, sums[r]);
    }
  }

  template <int D>
  static void value_tile_as(const Rows& rows, int d, int from, int first, int last, float* tile) {
    const int dp = round_chunk(d), even = first % 2;  // even: by how much a whole pair begins before `first`
    const Decode decode;
    float scales[kScales];
    float* by = tile + kTile / 2 * dp;  // [kTile][groups]
      PairRows gathered;
    int at = from - even;
    for (int p = first - even; p < last;) {
      const Piece piece = even_piece(rows, p, last, 0, gathered);
      const float* scale = widen_scales(rows, piece, scales);
      if (p + kTile < rows.visible) prefetch_piece(rows, piece_at(rows, p + kTile, rows.visible));
      for (int j = 0; j < piece.count; j += 2) {
        const uint8_t* bytes = piece.rows + j * rows.row_bytes;
        const uint8_t* odd = j + 1 < piece.count ? bytes + rows.row_bytes : bytes;
        for (int c = 0; c < d; c += kChunk) {
          Pairs v[4];
          decode.template values<D>(bytes + Cached<C>::row_bytes(c), odd + Cached<C>::row_bytes(c), d - c, v);
          UNROLL for (int t = 0; t < 4; t++) store_pairs(tile + (at + j) / 2 * dp + c + 16 * t, v[t]);
        }
      }
      if constexpr (kScaled)
        for (int i = 0; i < piece.count * rows.groups; i++) by[at * rows.groups + i] = scale[i];
      at += piece.count;
      p += piece.count;
    }
  }
  static void value_tile(const Rows& rows, int d, int from, int first, int last, float* tile) {
    d % kChunk ? value_tile_as<0>(rows, d, from, first, last, tile) : value_tile_as<1>(rows, d, from, first, last, tile);
  }

  template <int R>
  static void mix_tile(const float* w, int at, const float* tile, int d, int first, int last, float* out) {
    const int dp = round_chunk(d);
    alignas(64) float scaled[R][32 * kTile / kPiece];
    for (int c = 0; c < dp; c += kChunk) {
      if constexpr (kScaled)
        for (int j = first / kPiece * kPiece; j < last; j += kPiece)
          UNROLL for (int r = 0; r < R; r++)
            weigh_blocks(w + r * kSegment + at + j, tile + kTile / 2 * dp + j * (d / 16) + c / 16, d / 16, first - j, last - j, scaled[r] + 2 * j);
      V acc[R][4];
      UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < 4; t++) acc[r][t] = load(out + r * dp + c + 16 * t);
      for (int j = first / 2 * 2; j < last; j += 2) {
        const uint32_t seen = halves(j, first, last);
        Pairs v[4];
        UNROLL for (int t = 0; t < 4; t++) v[t] = pairs_at(tile + j / 2 * dp + c + 16 * t);
        if (seen != 0xffffffffu) UNROLL for (int t = 0; t < 4; t++) v[t] = only(v[t], seen);
        UNROLL for (int r = 0; r < R; r++) {
          Pairs x;
          if constexpr (kScaled) x = spread_blocks(scaled[r] + 2 * j);
          else x = set1_pair(w + r * kSegment + (at + j) / 2);
          UNROLL for (int t = 0; t < 4; t++) acc[r][t] = dot(acc[r][t], v[t], x);
        }
      }
      UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < 4; t++) store(out + r * dp + c + 16 * t, acc[r][t]);
    }
  }
};
