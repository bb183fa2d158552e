// y = x W^T for packed NVFP4. Every output is one fixed chain of FP32 operations over k, whatever
// M, the tile or the thread: W4A16 and W4A4 multiply exact operands, sum 16 of them, then add (sum * block scale).

// ---- activations, widened and laid out for the NVFP4 kernel -------------------------------------------------------

struct BlockScale {
  V quantised;  // values of the codes
  I codes;
  I scale_bits;
  float scale;
};

// One group of 16 by the recipe of codec.quantize_activation, operation for operation.
inline BlockScale quantize_group(V x, float global_scale, float inverse_global) {
  const V a = vabs(x);
  const float amax = any(is_nan(x)) ? __builtin_nanf("") : reduce_max(a);
  const float sixth = 1.0f / 6.0f;
  const float wanted = global_scale * (amax * sixth);
  BlockScale r;
  r.scale_bits = to_e4m3(set1(wanted));
  const V scale = from_e4m3(r.scale_bits);
  float s[16];
  store(s, scale);
  r.scale = s[0];
  const float output_scale = r.scale == 0.f ? 0.f : 1.0f / (r.scale * inverse_global);
  const V y = mul(x, set1(output_scale));
  r.quantised = round_e2m1(y);
  r.codes = encode_e2m1(y);
  return r;
}

// No 2: GCC 12 keeps two accumulators in memory, and three rows take half the time.
constexpr int kWidths[] = {1, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16};
int block_width(int rows) {
  for (int w : kWidths)
    if (w >= rows && w <= kMaxRows) return w;
  return kMaxRows;
}

#if defined(__AVX512BF16__)
constexpr bool kPairs = true;
inline V as_pairs(V x) { return to_pairs(x); }
#else
constexpr bool kPairs = false;
inline V as_pairs(V x) { return x; }
#endif

template <class T>
void pack_block(const PackX& a, int block) {
  const bool pairs = kPairs && a.type == Type::bf16;
  const int stored = pairs ? kGroup / 2 : kGroup;  // 32-bit values per group and row
  const int first = block * kMaxRows, rows = a.m - first < kMaxRows ? a.m - first : kMaxRows;
  const int width = block_width(rows), k = a.k;
  const T* x = static_cast<const T*>(a.x) + static_cast<size_t>(first) * k;
  float* out = a.packed + static_cast<size_t>(first) * k;
  float* scales = a.scales ? a.scales + static_cast<size_t>(first) * (k / kGroup) : nullptr;
  const float global_scale = 1.0f / a.input_scale, inverse_global = 1.0f / global_scale;
  for (int r0 = 0; r0 < width; r0 += 16) {
    const int n = width - r0 < 16 ? width - r0 : 16;
    for (int g = 0; g < k / kGroup; g++) {
      V r[16];
      for (int i = 0; i < 16; i++) {
        const bool real = r0 + i < rows;
        r[i] = real ? load(x + static_cast<size_t>(r0 + i) * k + g * kGroup) : zero();
        if (scales && i < n) {
          float s = 0.f;
          if (real) {
            const BlockScale q = quantize_group(r[i], global_scale, inverse_global);
            r[i] = q.quantised;
            s = q.scale;
          }
          scales[g * width + r0 + i] = s;
        }
      }
      if (pairs)
        for (int i = 0; i < n; i++) r[i] = as_pairs(r[i]);
      float* o = out + static_cast<size_t>(g) * stored * width + r0;
      if (width == 1) {
        store(o, r[0], stored);
        continue;
      }
      transpose16(r);
      for (int i = 0; i < stored; i++) store(o + static_cast<size_t>(i) * width, r[i], n);
    }
  }
}

void pack_x(const PackX& a, int begin, int end) {
  for (int b = begin; b < end; b++) a.type == Type::bf16 ? pack_block<bf16>(a, b) : pack_block<float>(a, b);
}

template <class T>
void quantize_rows(const PackX& a, uint8_t* codes, uint8_t* scales) {
  const float global_scale = 1.0f / a.input_scale, inverse_global = 1.0f / global_scale;
  for (size_t g = 0; g < static_cast<size_t>(a.m) * a.k / kGroup; g++) {
    const BlockScale q = quantize_group(load(static_cast<const T*>(a.x) + g * kGroup), global_scale, inverse_global);
    store_bytes(codes + g * kGroup, q.codes, 16);
    store_bytes(scales + g, q.scale_bits, 1);
  }
}
void quantize(const PackX& a, uint8_t* codes, uint8_t* scales) {
  a.type == Type::bf16 ? quantize_rows<bf16>(a, codes, scales) : quantize_rows<float>(a, codes, scales);
}

// ---- NVFP4 ---------------------------------------------------------------------------------------------------------

// Eight k of one group: decode each k once for the panel's 16 rows, use it for M activation rows. The fixed order of k
// is that of the code's place in its lane: 0 1 2 3 and then 4 5 6 7 (low nibbles, then high).
template <int M, int k>
inline void step(I codes, V table, const float* x, V* acc) {
  constexpr int shift = k < 4 ? 8 * k : 8 * (k - 4) + 4;
  const V w = decode<shift>(codes, table);
  UNROLL for (int m = 0; m < M; m++) acc[m] = fma(w, set1(x[k * M + m]), acc[m]);
}
template <int M>
inline void eight(I codes, V table, const float* x, V* acc) {
  step<M, 0>(codes, table, x, acc);
  step<M, 1>(codes, table, x, acc);
  step<M, 2>(codes, table, x, acc);
  step<M, 3>(codes, table, x, acc);
  step<M, 4>(codes, table, x, acc);
  step<M, 5>(codes, table, x, acc);
  step<M, 6>(codes, table, x, acc);
  step<M, 7>(codes, table, x, acc);
}

#if defined(__AVX512BF16__)
template <int M, int j>
inline void pair_step(I codes, Pairs table, const float* x, V* acc) {
  const Pairs w = decode_pair<4 * j>(codes, table);
  UNROLL for (int m = 0; m < M; m++) acc[m] = dot(acc[m], w, set1_pair(x + j * M + m));
}
template <int M>
inline void eight_pairs(I codes, Pairs table, const float* x, V* acc) {
  pair_step<M, 0>(codes, table, x, acc);
  pair_step<M, 1>(codes, table, x, acc);
  pair_step<M, 2>(codes, table, x, acc);
  pair_step<M, 3>(codes, table, x, acc);
}
#endif

// One group of 16 k of a panel times M rows.
template <int M, bool pairs>
inline void group_sums(const uint8_t* codes, const float* x, V* acc) {
#if defined(__AVX512BF16__)
  if constexpr (pairs) {
    const Pairs table = pair_table();
    eight_pairs<M>(load_codes(codes), table, x, acc);
    eight_pairs<M>(load_codes(codes + 64), table, x + 4 * M, acc);
    return;
  }
#endif
  const V table = e2m1_table();
  eight<M>(load_codes(codes), table, x, acc);
  eight<M>(load_codes(codes + 64), table, x + 8 * M, acc);
}

constexpr int kPrefetchBytes = 8 * kBlockBytes;

template <int M, bool quantised, bool pairs>
void nvfp4_panel(const uint8_t* w, const float* x, const float* scales, int groups, V* total) {
  V sum[M];
  UNROLL for (int m = 0; m < M; m++) sum[m] = zero();
  for (int g = 0; g < groups; g++) {
    const uint8_t* block = w + static_cast<size_t>(g / 4) * kBlockBytes;
    const uint8_t* codes = block + 64 + 128 * (g % 4);
    __builtin_prefetch(codes + kPrefetchBytes);
    __builtin_prefetch(codes + kPrefetchBytes + 64);
    if (g % 4 == 0) __builtin_prefetch(block + kPrefetchBytes);
    V acc[M];
    UNROLL for (int m = 0; m < M; m++) acc[m] = zero();
    group_sums<M, pairs>(codes, x, acc);
    const V s = load_scales(block + 16 * (g % 4));
    UNROLL for (int m = 0; m < M; m++)
      sum[m] = fma(acc[m], quantised ? mul(s, set1(scales[g * M + m])) : s, sum[m]);
    x += pairs ? kGroup / 2 * M : kGroup * M;
  }
  UNROLL for (int m = 0; m < M; m++) total[m] = sum[m];
}

template <bool quantised, bool pairs>
void nvfp4_dispatch(int width, const uint8_t* w, const float* x, const float* scales, int groups, V* total) {
#define NVFP4_WIDTH(M) \
  case M:              \
    if constexpr (M <= kMaxRows) nvfp4_panel<M, quantised, pairs>(w, x, scales, groups, total); \
    break;
  switch (width) {
    NVFP4_WIDTH(1)
    NVFP4_WIDTH(3)
    NVFP4_WIDTH(4)
    NVFP4_WIDTH(5)
    NVFP4_WIDTH(6)
    NVFP4_WIDTH(7)
    NVFP4_WIDTH(8)
    NVFP4_WIDTH(10)
    NVFP4_WIDTH(12)
    NVFP4_WIDTH(14)
    NVFP4_WIDTH(16)
  }
#undef NVFP4_WIDTH
}

template <class O>
void linear_nvfp4_as(const LinearNVFP4& a, int begin, int end) {
  const int groups = a.k / kGroup;
  for (int first = 0; first < a.m; first += kMaxRows) {
    const int rows = a.m - first < kMaxRows ? a.m - first : kMaxRows, width = block_width(rows);
    const float* x = a.x + static_cast<size_t>(first) * a.k;
    const float* scales = a.scales ? a.scales + static_cast<size_t>(first) * groups : nullptr;
    for (int p = begin; p < end; p++) {
      const uint8_t* w = a.weights + p * panel_bytes(a.k);
      V total[kMaxRows];
      if (kPairs && a.pairs)
        scales ? nvfp4_dispatch<true, kPairs>(width, w, x, scales, groups, total)
               : nvfp4_dispatch<false, kPairs>(width, w, x, scales, groups, total);
      else
        scales ? nvfp4_dispatch<true, false>(width, w, x, scales, groups, total)
               : nvfp4_dispatch<false, false>(width, w, x, scales, groups, total);
      const int column = p * kPanel, n = a.n - column < kPanel ? a.n - column : kPanel;
      const V row_scale = load(a.row_scale + column);
      for (int m = 0; m < rows; m++) {
        V y = mul(total[m], row_scale);
        if (a.bias) y = add(y, load(a.bias + column));
        store(static_cast<O*>(a.out) + static_cast<size_t>(first + m) * a.n + column, y, n);
      }
    }
  }
}

void linear_nvfp4(const LinearNVFP4& a, int begin, int end) {
  a.out_type == Type::bf16 ? linear_nvfp4_as<bf16>(a, begin, end) : linear_nvfp4_as<float>(a, begin, end);
}
