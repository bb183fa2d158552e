// y = x W^T for plain weights, read where they lie.

template <class T>
void widen_as(const Widen& a, int begin, int end) {
  for (int r = begin; r < end; r++) {
    const T* x = static_cast<const T*>(a.x) + static_cast<size_t>(r) * a.k;
    float* o = a.out + static_cast<size_t>(r) * a.stride;
    int k = 0;
    for (; k + 16 <= a.k; k += 16) store(o + k, load(x + k));
    if (k < a.k) store(o + k, load(x + k, a.k - k));
  }
}
void widen(const Widen& a, int begin, int end) {
  a.type == Type::bf16 ? widen_as<bf16>(a, begin, end) : widen_as<float>(a, begin, end);
}

constexpr bool is_bf16(const bf16*) { return true; }
constexpr bool is_bf16(const void*) { return false; }

// Sixteen k of N weight rows times M activation rows.
template <class W, int N, int M>
inline void dense_step(const W* w, const float* x, int stride, int k, V (*acc)[M]) {
  V v[N];
  UNROLL for (int n = 0; n < N; n++) v[n] = load(w + static_cast<size_t>(n) * k);
  UNROLL for (int m = 0; m < M; m++) {
    const V u = load(x + static_cast<size_t>(m) * stride);
    UNROLL for (int n = 0; n < N; n++) acc[n][m] = fma(v[n], u, acc[n][m]);
  }
}

// N weight rows by M activation rows: lane l of an accumulator sums k = l, l + 16, ...
template <class W, int N, int M>
inline void dense_tile(const W* w, const float* x, int stride, int k, V (*sums)[16]) {
  V acc[N][M];
  UNROLL for (int n = 0; n < N; n++)
    UNROLL for (int m = 0; m < M; m++) acc[n][m] = zero();
  int i = 0;
  for (; i + 16 <= k; i += 16) dense_step<W, N, M>(w + i, x + i, stride, k, acc);
  if (i < k)
    UNROLL for (int n = 0; n < N; n++) {
      const V v = load(w + static_cast<size_t>(n) * k + i, k - i);
      UNROLL for (int m = 0; m < M; m++) acc[n][m] = fma(v, load(x + static_cast<size_t>(m) * stride + i), acc[n][m]);
    }
  UNROLL for (int n = 0; n < N; n++)
    UNROLL for (int m = 0; m < M; m++) sums[m][n] = acc[n][m];
}

#if defined(__AVX512BF16__)
// The same with bfloat16 on both sides: lane l sums the pairs k = 2 l, 2 l + 1, then 32 further on.
template <int N, int M>
inline void pair_tile(const bf16* w, const bf16* x, int k, V (*sums)[16]) {
  V acc[N][M];
  UNROLL for (int n = 0; n < N; n++)
    UNROLL for (int m = 0; m < M; m++) acc[n][m] = zero();
  for (int i = 0; i < k; i += 32) {
    const bool whole = i + 32 <= k;
    Pairs v[N];
    UNROLL for (int n = 0; n < N; n++) {
      const bf16* p = w + static_cast<size_t>(n) * k + i;
      v[n] = whole ? load_pairs(p) : load_pairs(p, k - i);
    }
    UNROLL for (int m = 0; m < M; m++) {
      const bf16* p = x + static_cast<size_t>(m) * k + i;
      const Pairs u = whole ? load_pairs(p) : load_pairs(p, k - i);
      UNROLL for (int n = 0; n < N; n++) acc[n][m] = dot(acc[n][m], v[n], u);
    }
  }
  UNROLL for (int n = 0; n < N; n++)
    UNROLL for (int m = 0; m < M; m++) sums[m][n] = acc[n][m];
}
#endif

template <class W, int N, int M>
inline void any_tile(const LinearDense& a, const W* w, int row, V (*sums)[16]) {
#if defined(__AVX512BF16__)
  if constexpr (is_bf16(static_cast<const W*>(nullptr)))
    if (a.pairs) return pair_tile<N, M>(w, a.pairs + static_cast<size_t>(row) * a.k, a.k, sums);
#endif
  dense_tile<W, N, M>(w, a.x + static_cast<size_t>(row) * a.stride, a.stride, a.k, sums);
}

// Sixteen outputs at a time: tiles fill their lane sums, then one fixed tree over lanes gives each output.
// The first rows of x meet a weight that comes from memory: row after row, one stream, which the hardware prefetches
// (two rows side by side run at 40 % of that, with or without prefetch instructions). Later rows find it in L2.
template <class W, class O, int M>
void dense_rows(const LinearDense& a, int row, int begin, int end) {
  constexpr int N = M > kDenseM ? 1 : kDenseN;
  for (int column = begin; column < end; column += 16) {
    const W* w = static_cast<const W*>(a.weights) + static_cast<size_t>(column) * a.k;
    const int count = end - column < 16 ? end - column : 16;
    V sums[M][16];
    int n = 0;
    if (row > 0)
      for (; n + N <= count; n += N)
        any_tile<W, N, M>(a, w + static_cast<size_t>(n) * a.k, row, reinterpret_cast<V(*)[16]>(&sums[0][n]));
    for (; n < count; n++)
      any_tile<W, 1, M>(a, w + static_cast<size_t>(n) * a.k, row, reinterpret_cast<V(*)[16]>(&sums[0][n]));
    for (; n < 16; n++)
      for (int m = 0; m < M; m++) sums[m][n] = zero();
    for (int m = 0; m < M; m++) {
      V y = reduce16(sums[m]);
      if (a.bias) y = add(y, load_upto(a.bias + column, count));
      store_upto(static_cast<O*>(a.out) + static_cast<size_t>(row + m) * a.n + column, y, count);
    }
  }
}

template <class W, class O>
void linear_dense_as(const LinearDense& a, int begin, int end) {
  for (int m = 0; m < a.m;) {
    const int most = m == 0 ? kDenseFirst : kDenseM, rows = a.m - m < most ? a.m - m : most;
#define NVFP4_ROWS(M) \
  case M:             \
    if constexpr (M <= kDenseFirst) dense_rows<W, O, M>(a, m, begin, end); \
    break;
    switch (rows) {
      NVFP4_ROWS(1)
      NVFP4_ROWS(2)
      NVFP4_ROWS(3)
      NVFP4_ROWS(4)
      NVFP4_ROWS(5)
      NVFP4_ROWS(6)
      NVFP4_ROWS(7)
      NVFP4_ROWS(8)
    }
#undef NVFP4_ROWS
    m += rows;
  }
}

template <class W>
void linear_dense_from(const LinearDense& a, int begin, int end) {
  a.out_type == Type::bf16 ? linear_dense_as<W, bf16>(a, begin, end) : linear_dense_as<W, float>(a, begin, end);
}

void linear_dense(const LinearDense& a, int begin, int end) {
  switch (a.weight_type) {
    case Type::bf16: linear_dense_from<bf16>(a, begin, end); break;
    case Type::fp16: linear_dense_from<fp16>(a, begin, end); break;
    default: linear_dense_from<float>(a, begin, end); break;
  }
}
