// y = x W^T for plain weights (float32, bfloat16, float16) and FP8, read where they lie. Every output is one chain whatever
// M, tile or thread: lane l of an accumulator multiplies and adds every 16th (or, in pairs, every 16th pair) product of
// its row in the order of k, then one fixed tree joins the lanes. FP8 weights with a scale per block of K keep one such
// chain per block, whose lanes are multiplied by the block's scale and added up before the tree.
//
// Up to kDenseFirst rows of x meet each weight as it comes from memory: row after row, one stream, which the hardware
// prefetches (on Zen 4 two rows side by side run at 40 % of that; without pairs some rows go together, a stream each: see
// rows_side_by_side). More rows meet 16 rows of weights that were decoded once, in tiles of kDenseN x kDenseM. A vector (64
// bytes) is 16 floats or 32 bfloat16; kPlainChunk k make whole vectors.

#if defined(__AVX512BF16__)
template <bool pairs>
struct VectorOf {
  using type = V;
};
template <>
struct VectorOf<true> {
  using type = Pairs;
};
#else
template <bool pairs>
struct VectorOf {
  using type = V;
};
#endif

// ---- one vector, or 64 k of one row --------------------------------------------------------------------------------

inline void load_vector(const char* p, V& v) { v = load(reinterpret_cast<const float*>(p)); }
inline V times(V c, V a, V b) { return fma(a, b, c); }
template <class T>
inline void load_chunk(const T* p, int n, V* out) {
  for (int i = 0; i < 4; i++) out[i] = n >= 16 * i + 16 ? load(p + 16 * i) : n > 16 * i ? load(p + 16 * i, n - 16 * i) : zero();
}
template <class W>
inline void decode_chunk(const W* p, int n, V* out) { load_chunk(p, n, out); }
// The order in which decode_chunk gives bfloat16, and back from it, so that the tree that joins the lanes is one for all.
#if defined(NVFP4_EVENS_AND_ODDS)
inline V as_bf16_weights(V x) { return evens_and_odds(x); }
template <class W>
inline V in_order(V x) { return x; }
template <>
inline V in_order<bf16>(V x) { return from_evens_and_odds(x); }
inline void decode_chunk(const bf16* p, int n, V* out) {
  for (int i = 0; i < 4; i++)
    out[i] = n >= 16 * i + 16 ? load_evens_and_odds(p + 16 * i) : n > 16 * i ? evens_and_odds(load(p + 16 * i, n - 16 * i)) : zero();
}
#else
inline V as_bf16_weights(V x) { return x; }
template <class W>
inline V in_order(V x) { return x; }
#endif
inline void decode_chunk(const e4m3* p, int n, V* out) { decode_fp8(p, n, out); }
inline void store_vector(char* p, V v) { store(reinterpret_cast<float*>(p), v); }

#if defined(__AVX512BF16__)
inline void load_vector(const char* p, Pairs& v) { v = load_pairs(reinterpret_cast<const bf16*>(p)); }
inline V times(V c, Pairs a, Pairs b) { return dot(c, a, b); }
inline void decode_chunk(const bf16* p, int n, Pairs* out) {
  for (int i = 0; i < 2; i++) {
    const int left = n - 32 * i;
    out[i] = left >= 32 ? load_pairs(p + 32 * i) : load_pairs(p + 32 * i, left > 0 ? left : 0);
  }
}
inline void decode_chunk(const e4m3* p, int n, Pairs* out) { decode_fp8(p, n, out); }
inline void store_vector(char* p, Pairs v) { store_pairs(reinterpret_cast<bf16*>(p), v); }
template <class W>
constexpr bool kPairable = false;
template <>
constexpr bool kPairable<bf16> = true;
template <>
constexpr bool kPairable<e4m3> = true;
#endif

// ---- activations ---------------------------------------------------------------------------------------------------

template <class T>
void pack_panel(const PackPlain& a, bool pairs, int panel) {
  const int first = panel * a.width, rows = a.m - first < a.width ? a.m - first : a.width;
  const int chunks = (a.k + kPlainChunk - 1) / kPlainChunk, vectors = pairs ? 2 : 4;
  char* out = static_cast<char*>(a.packed) + static_cast<size_t>(first) * plain_vectors(a.k, pairs) * 64;
  for (int r = 0; r < rows; r++) {
    const T* x = static_cast<const T*>(a.x) + static_cast<size_t>(first + r) * a.k;
    for (int c = 0; c < chunks; c++) {
      const int left = a.k - c * kPlainChunk;
      char* to = out + (static_cast<size_t>(c) * vectors * rows + r) * 64;
#if defined(__AVX512BF16__)
      if constexpr (kPairable<T>)
        if (pairs) {
          Pairs v[2];
          decode_chunk(x + c * kPlainChunk, left, v);
          if (a.weight_type == Type::e4m3) {
            const __m512i p = v[0].v, q = v[1].v;  // 128-bit lanes 0 2 4 6 and 1 3 5 7, as fp8_words has them
            v[0].v = _mm512_shuffle_i32x4(p, q, 0x88);
            v[1].v = _mm512_shuffle_i32x4(p, q, 0xdd);
          }
          for (int i = 0; i < 2; i++) store_vector(to + static_cast<size_t>(i) * rows * 64, v[i]);
          continue;
        }
#endif
      V v[4];
      load_chunk(x + c * kPlainChunk, left, v);
      if (a.weight_type == Type::bf16) {
        for (int i = 0; i < 4; i++) v[i] = as_bf16_weights(v[i]);
      } else if (a.weight_type == Type::e4m3) {
        float natural[kPlainChunk], placed[kPlainChunk];
        for (int i = 0; i < 4; i++) store(natural + 16 * i, v[i]);
        for (int i = 0; i < kPlainChunk; i++) placed[fp8_place(i)] = natural[i];
        for (int i = 0; i < 4; i++) v[i] = load(placed + 16 * i);
      }
      for (int i = 0; i < 4; i++) store_vector(to + static_cast<size_t>(i) * rows * 64, v[i]);
    }
  }
}

void pack_plain(const PackPlain& a, int begin, int end) {
  const bool pairs = kPairs && a.type == Type::bf16 && (a.weight_type == Type::bf16 || a.weight_type == Type::e4m3);
  for (int p = begin; p < end; p++) a.type == Type::bf16 ? pack_panel<bf16>(a, pairs, p) : pack_panel<float>(a, pairs, p);
}

// ---- tiles ---------------------------------------------------------------------------------------------------------

// sums[m][n]: the lanes of each output, over the blocks of K so far
using Sums = V (*)[16];

template <int N, int M>
inline void add_up(V (*acc)[M], const float* scale, Sums sums) {
  UNROLL for (int n = 0; n < N; n++)
    UNROLL for (int m = 0; m < M; m++) sums[m][n] = scale ? fma(acc[n][m], set1(scale[n]), sums[m][n]) : acc[n][m];
}

constexpr int kAskedBytes = 1728;  // how far ahead rows side by side are asked for; both levels, as for NVFP4, give no more

// `left` of 64 k of N rows of weights, `stride` elements from one to the next, times M rows of x.
template <class W, bool pairs, int N, int M>
ALWAYS_INLINE void stream_chunk(const W* w, size_t stride, int left, const char* x, V (*acc)[M]) {
  using Vec = typename VectorOf<pairs>::type;
  constexpr int vectors = pairs ? 2 : 4, bytes = static_cast<int>(sizeof(W)) * kPlainChunk;
  UNROLL for (int n = 0; n < N; n++) {
    const W* row = w + n * stride;
    if constexpr (N > 1)
      UNROLL for (int line = 0; line < bytes; line += 64) __builtin_prefetch(reinterpret_cast<const char*>(row) + kAskedBytes + line);
    Vec v[vectors];
    decode_chunk(row, left, v);
    UNROLL for (int j = 0; j < vectors; j++)
      UNROLL for (int m = 0; m < M; m++) {
        Vec u;
        load_vector(x + (j * M + m) * 64, u);
        acc[n][m] = times(acc[n][m], v[j], u);
      }
  }
}

// The same over all k. Several rows have a chain each, so that one chain's latency is another's work, and are a stream each, asked
// for ahead. The last, shorter chunk is code of its own: its branches would keep vectors in memory.
template <class W, bool pairs, int N, int M>
inline void stream_rows(const W* w, size_t stride, int k, const char* x, V (*acc)[M]) {
  constexpr int vectors = pairs ? 2 : 4;
  UNROLL for (int n = 0; n < N; n++)
    UNROLL for (int m = 0; m < M; m++) acc[n][m] = zero();
  int i = 0;
  for (; i + kPlainChunk <= k; i += kPlainChunk, x += vectors * M * 64)
    stream_chunk<W, pairs, N, M>(w + i, stride, kPlainChunk, x, acc);
  if (i < k) stream_chunk<W, pairs, N, M>(w + i, stride, k - i, x, acc);
}

// Weights that will be wanted next: N rows `stride` bytes apart, of which a vector's worth is `bytes`. Null: none.
struct Ahead {
  const char* at;
  size_t stride;
  int bytes;
};

// N decoded rows of weights, [vector][N], times M rows of x. `more`: go on with the sums of the vectors before.
template <class Vec, int N, int M>
inline void tile(const char* w, const char* x, int vectors, bool more, const float* scale, Ahead ahead, Sums sums) {
  V acc[N][M];
  UNROLL for (int n = 0; n < N; n++)
    UNROLL for (int m = 0; m < M; m++) acc[n][m] = more ? sums[m][n] : zero();
  for (int i = 0; i < vectors; i++) {
    if (ahead.at) {
      UNROLL for (int n = 0; n < N; n++) __builtin_prefetch(ahead.at + n * ahead.stride, 0, 2);
      ahead.at += ahead.bytes;
    }
    Vec v[N];
    UNROLL for (int n = 0; n < N; n++) load_vector(w + n * 64, v[n]);
    UNROLL for (int m = 0; m < M; m++) {
      Vec u;
      load_vector(x + m * 64, u);
      UNROLL for (int n = 0; n < N; n++) acc[n][m] = times(acc[n][m], v[n], u);
    }
    w += N * 64;
    x += M * 64;
  }
  add_up<N, M>(acc, scale, sums);
}

// ---- sixteen outputs -----------------------------------------------------------------------------------------------

// What one group of 16 output features needs to know.
template <class W>
struct Group {
  const LinearPlain& a;
  int column, count;  // first feature, features
  bool by_row;        // a row of weights has one scale, or none
  int block;          // k of one block
  float row_scale[16];

  Group(const LinearPlain& args, int group) : a(args) {
    column = 16 * group;
    count = a.n - column < 16 ? a.n - column : 16;
    by_row = !a.scale || a.scale_k >= a.k;
    block = by_row ? a.k : a.scale_k;
    scales_at(0, row_scale);
  }
  const W* row(int n) const { return static_cast<const W*>(a.weights) + static_cast<size_t>(column + n) * a.k; }
  void scales_at(int b, float* to) const {  // of block b of K, one per row
    const int across = a.scale && !by_row ? (a.k + block - 1) / block : 1;
    for (int n = 0; n < 16; n++) to[n] = 1.f;
    if (!a.scale) return;
    if (a.scale_rows == 1) {  // no divisions where they would count
      for (int n = 0; n < count; n++) to[n] = a.scale[static_cast<size_t>(column + n) * across + b];
      return;
    }
    int row = column / a.scale_rows, left = a.scale_rows - column % a.scale_rows;
    for (int n = 0; n < count; n++, left--) {
      if (left == 0) {
        row++;
        left = a.scale_rows;
      }
      to[n] = a.scale[static_cast<size_t>(row) * across + b];
    }
  }
  template <class O, int M>
  void finish(Sums sums, int row) const {
    for (int m = 0; m < M; m++) {
      for (int n = 0; n < 16; n++) sums[m][n] = in_order<W>(sums[m][n]);
      V y = reduce16(sums[m]);
      if (a.scale && by_row) y = mul(y, load(row_scale));
      if (a.bias) y = add(y, load_upto(a.bias + column, count));
      store_upto(static_cast<O*>(a.out) + static_cast<size_t>(row + m) * a.n + column, y, count);
    }
  }
};

template <class W, class O, bool pairs, int M>
void stream_group(const LinearPlain& a, int group) {
  const Group<W> g(a, group);
  const int vectors_per_chunk = pairs ? 2 : 4;
  const size_t stride = static_cast<size_t>(a.k);
  V sums[M][16];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < 16; n++) sums[m][n] = zero();
  const char* x = static_cast<const char*>(a.x);
  constexpr int N = rows_side_by_side(M), each = 16 / N;
  if (N > 1 && g.by_row && g.count == 16) {
    for (int n = 0; n < each; n++) {
      V acc[N][M];
      stream_rows<W, pairs, N, M>(g.row(n), each * stride, a.k, x, acc);
      UNROLL for (int i = 0; i < N; i++)
        UNROLL for (int m = 0; m < M; m++) sums[m][i * each + n] = acc[i][m];
    }
  } else if (g.by_row) {
    for (int n = 0; n < g.count; n++) {
      V acc[1][M];
      stream_rows<W, pairs, 1, M>(g.row(n), stride, a.k, x, acc);
      add_up<1, M>(acc, nullptr, reinterpret_cast<Sums>(&sums[0][n]));
    }
  } else {
    const int blocks = (a.k + g.block - 1) / g.block;
    for (int n = 0; n < g.count; n++) {
      const float* scale = a.scale + static_cast<size_t>((g.column + n) / a.scale_rows) * blocks;
      for (int b = 0; b < blocks; b++) {
        const int k = b * g.block, left = a.k - k < g.block ? a.k - k : g.block;
        V acc[1][M];
        stream_rows<W, pairs, 1, M>(g.row(n) + k, stride, left,
                                    x + static_cast<size_t>(k / kPlainChunk) * vectors_per_chunk * M * 64, acc);
        add_up<1, M>(acc, scale + b, reinterpret_cast<Sums>(&sums[0][n]));
      }
    }
  }
  g.template finish<O, M>(sums, 0);
}

// N whole groups, `apart` groups from one to the next, whose rows go side by side: N streams.
template <class W, class O, bool pairs, int N, int M>
void stream_groups(const LinearPlain& a, int group, int apart) {
  V sums[N][M][16];
  const W* w = static_cast<const W*>(a.weights) + static_cast<size_t>(16 * group) * a.k;
  const size_t stride = static_cast<size_t>(16 * apart) * a.k;
  for (int n = 0; n < 16; n++, w += a.k) {
    V acc[N][M];
    stream_rows<W, pairs, N, M>(w, stride, a.k, static_cast<const char*>(a.x), acc);
    UNROLL for (int i = 0; i < N; i++)
      UNROLL for (int m = 0; m < M; m++) sums[i][m][n] = acc[i][m];
  }
  for (int i = 0; i < N; i++) Group<W>(a, group + i * apart).template finish<O, M>(sums[i], 0);
}

template <class W, class O, bool pairs, int M>
void few_rows(const LinearPlain& a, int begin, int end) {
  constexpr int N = rows_side_by_side(M);
  const int whole = end < a.n / 16 ? end : a.n / 16;  // before a group of fewer than 16
  const bool by_row = !a.scale || a.scale_k >= a.k;
  const int apart = N > 1 && by_row && whole > begin ? (whole - begin) / N : 0;
  if constexpr (N > 1)
    for (int group = begin; group < begin + apart; group++) stream_groups<W, O, pairs, N, M>(a, group, apart);
  for (int group = begin + N * apart; group < end; group++) stream_group<W, O, pairs, M>(a, group);
}

constexpr int kCacheVectors = 32;  // vectors of K a tile walks before the next tile has its turn: they stay in L1

// `more`: another group follows, and the panels of x share in asking for it: each some of its rows, so that memory is busy all
// the while the tiles are computed.
template <class W, class O, bool pairs, int M>
void tile_panel(const LinearPlain& a, const Group<W>& g, const char* decoded, int row, int panels, bool more) {
  using Vec = typename VectorOf<pairs>::type;
  const int total = plain_vectors(a.k, pairs), per_chunk = pairs ? 2 : 4;
  const int step = g.by_row ? kCacheVectors : g.block / kPlainChunk * per_chunk;
  const char* x = static_cast<const char*>(a.x) + static_cast<size_t>(row) * total * 64;
  V sums[M][16];
  if (!g.by_row)
    for (int m = 0; m < M; m++)
      for (int n = 0; n < 16; n++) sums[m][n] = zero();
  const size_t stride = static_cast<size_t>(a.k) * sizeof(W);
  const int bytes = static_cast<int>(kPlainChunk * sizeof(W)) / per_chunk;
  float scales[16];
  for (int i = 0, b = 0; i < total; i += step, b++) {
    const int vectors = total - i < step ? total - i : step;
    if (!g.by_row) g.scales_at(b, scales);
    for (int n = 0; n < 16; n += kDenseN) {
      const char* next = reinterpret_cast<const char*>(g.row(16 + n)) + static_cast<size_t>(i) * bytes;
      const bool prefetch = more && n / kDenseN % panels == row / a.width;
      tile<Vec, kDenseN, M>(decoded + (static_cast<size_t>(n) * total + static_cast<size_t>(i) * kDenseN) * 64,
                            x + static_cast<size_t>(i) * M * 64, vectors, g.by_row && i > 0, g.by_row ? nullptr : scales + n,
                            Ahead{prefetch ? next : nullptr, stride, bytes}, reinterpret_cast<Sums>(&sums[0][n]));
    }
  }
  g.template finish<O, M>(sums, row);
}

// Sixteen rows of weights as vectors, [16 / kDenseN][vector][kDenseN]; rows beyond the last are zero.
template <class W, bool pairs>
void decode_group(const Group<W>& g, char* out) {
  using Vec = typename VectorOf<pairs>::type;
  constexpr int vectors = pairs ? 2 : 4;
  const int k = g.a.k, total = plain_vectors(k, pairs);
  for (int n = 0; n < 16; n++) {
    char* to = out + (static_cast<size_t>(n / kDenseN) * total * kDenseN + n % kDenseN) * 64;
    for (int i = 0; i < k; i += kPlainChunk) {
      if (n < g.count) {
        Vec v[vectors];
        decode_chunk(g.row(n) + i, k - i, v);
        for (int j = 0; j < vectors; j++) store_vector(to + j * kDenseN * 64, v[j]);
      } else {
        for (int j = 0; j < vectors; j++) store(reinterpret_cast<float*>(to + j * kDenseN * 64), zero());
      }
      to += vectors * kDenseN * 64;
    }
  }
}

#define NVFP4_EACH_M(DO) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8)

template <class W, class O, bool pairs>
void plain_groups(const LinearPlain& a, int begin, int end, char* scratch) {
  if (a.m <= kDenseFirst) {
#define NVFP4_ROWS(M) \
  case M:             \
    if constexpr (M <= kDenseFirst) few_rows<W, O, pairs, M>(a, begin, end); \
    break;
    switch (a.m) { NVFP4_EACH_M(NVFP4_ROWS) }
#undef NVFP4_ROWS
    return;
  }
  for (int group = begin; group < end; group++) {
    const Group<W> g(a, group);
    decode_group<W, pairs>(g, scratch);
    const int panels = (a.m + a.width - 1) / a.width;
    for (int row = 0; row < a.m; row += a.width) {
#define NVFP4_ROWS(M) \
  case M:             \
    if constexpr (M <= kDenseM) tile_panel<W, O, pairs, M>(a, g, scratch, row, panels, group + 1 < end); \
    break;
      switch (a.m - row < a.width ? a.m - row : a.width) { NVFP4_EACH_M(NVFP4_ROWS) }
#undef NVFP4_ROWS
    }
  }
}
#undef NVFP4_EACH_M

template <class W>
void linear_plain_from(const LinearPlain& a, int begin, int end, char* scratch) {
#if defined(__AVX512BF16__)
  if constexpr (kPairable<W>)
    if (a.pairs)
      return a.out_type == Type::bf16 ? plain_groups<W, bf16, true>(a, begin, end, scratch)
                                      : plain_groups<W, float, true>(a, begin, end, scratch);
#endif
  a.out_type == Type::bf16 ? plain_groups<W, bf16, false>(a, begin, end, scratch)
                           : plain_groups<W, float, false>(a, begin, end, scratch);
}

void linear_plain(const LinearPlain& a, int begin, int end, void* scratch) {
  char* s = static_cast<char*>(scratch);
  switch (a.weight_type) {
    case Type::bf16: linear_plain_from<bf16>(a, begin, end, s); break;
    case Type::fp16: linear_plain_from<fp16>(a, begin, end, s); break;
    case Type::e4m3: linear_plain_from<e4m3>(a, begin, end, s); break;
    default: linear_plain_from<float>(a, begin, end, s); break;
  }
}
