// y = x W^T for weights in panels. Every output is one fixed chain of operations over k, whatever M, the tile or the
// thread: 16 products are summed (exactly where they are integers), multiplied by their scales and added to the total.
// Activation rows run inside, so decoded weights stay in registers; `kTogether` rows' chains interleave to hide latency.

// No 2 for floats: GCC 12 keeps two accumulators in memory, and three rows take half the time.
constexpr int kFloatWidths[] = {1, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16};
constexpr int kWidths[] = {1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24};
int block_width(Operand operand, int rows) {
  const int most = max_rows(operand);
  if (operand == Operand::floats) {
    for (int w : kFloatWidths)
      if (w >= rows && w <= most) return w;
  } else {
    for (int w : kWidths)
      if (w >= rows && w <= most) return w;
  }
  return most;
}

inline V scales_of(const LinearNVFP4& a, const uint8_t* p) { return a.e8m0 ? load_e8m0(p) : load_scales(p); }

// With several rows of x the hardware's prefetcher does not run far enough ahead: asking for codes 6 blocks ahead gives 1.2 to
// 1.5 times the speed. One row reads as fast as memory gives on Zen 4, and prefetch instructions only slow it.
constexpr int kPrefetchBytes = 6 * kBlockBytes;
inline void prefetch_group(const uint8_t* block, const uint8_t* codes, int g) {
  __builtin_prefetch(codes + kPrefetchBytes);
  __builtin_prefetch(codes + kPrefetchBytes + 64);
  if (g % 4 == 0) __builtin_prefetch(block + kPrefetchBytes);
}

// On Intel and on Zen 3 one row of x alone takes memory's time plus its own, so weights are asked for ahead: kNearBytes into the
// first level of cache and, where that is not 0, kFarBytes into the second. Zen 3 wants 3 blocks and one place at a time. Intel
// reads kStreams places side by side 1.2 times as fast as one; from 5 blocks ahead the first level gives less, presumably because
// it has no room for so many outstanding lines, but the second has: 1 block and 7 are 1.08 times as fast as 3 and none
// (docs/kernel-log.md).
#if defined(__AVX512F__)
constexpr int kNearBytes = kBlockBytes, kFarBytes = 7 * kBlockBytes;
#else
constexpr int kNearBytes = 3 * kBlockBytes, kFarBytes = 0;
#endif
// Zen 5 reads one row's weights 1.2 times as fast when it is asked 12 to 20 blocks ahead (LinearNVFP4::ask); Zen 4, asked
// 6 blocks ahead, slower.
constexpr int kZen5Bytes = 16 * kBlockBytes;

template <int near, int far>
ALWAYS_INLINE void ask_for_block(const uint8_t* block) {
  UNROLL for (int line = 0; line < kBlockBytes; line += 64) {
    __builtin_prefetch(block + near + line);
    if constexpr (far > 0) __builtin_prefetch(block + far + line, 0, 2);
  }
}

// ---- FP32 activations ------------------------------------------------------------------------------------------------

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

template <int M>
struct Floats {
  static void group(const uint8_t* codes, V scales, const uint32_t* packed, V* total) {
    const float* x = reinterpret_cast<const float*>(packed);
    const V table = e2m1_table();
    V acc[M];
    UNROLL for (int m = 0; m < M; m++) acc[m] = zero();
    eight<M>(load_codes(codes), table, x, acc);
    eight<M>(load_codes(codes + 64), table, x + 8 * M, acc);
    UNROLL for (int m = 0; m < M; m++) total[m] = fma(acc[m], scales, total[m]);
  }
};

// ---- integers: W4A4, W4A8, and W4A16 as two digits ---------------------------------------------------------------------

inline I word(const uint32_t* p) { return iset1(static_cast<int32_t>(*p)); }
inline V float_word(const uint32_t* p) {
  float f;
  __builtin_memcpy(&f, p, 4);
  return set1(f);
}

// 1 + j / 8, found by the lowest byte of a block's base.
alignas(64) constexpr float kMantissas[8] = {1.f, 1.125f, 1.25f, 1.375f, 1.5f, 1.625f, 1.75f, 1.875f};
inline int mantissa_of(const uint32_t* base) { return *reinterpret_cast<const uint8_t*>(base) >> 3; }

#if defined(NVFP4_SIXTEEN_BIT_SUMS)
constexpr bool kSixteenBitSums = true;
#else
constexpr bool kSixteenBitSums = false;
// acc and `factor` (1 or 256) times the sums of a group's products, whose words of x lie `stride` apart.
template <int factor>
inline I dot_group(I acc, const Bytes* w, const uint32_t* x, int stride) {
  I sum = factor == 1 ? acc : iset1(0);
  UNROLL for (int i = 0; i < 4; i++) sum = dot(sum, w[i], word(x + i * stride));
  return factor == 1 ? sum : iadd(acc, shl<8>(sum));
}
#endif

// A group's integer sum times the power of two in its row's scale (see types.h), times mantissa and weight scale.
template <int M>
struct Blocks {
  static inline __attribute__((always_inline)) void group(const uint8_t* codes, V scales, const uint32_t* x, V* total) {
    const I first = load_codes(codes), second = load_codes(codes + 64);
    const Bytes table = code_table();
    const Bytes w[4] = {low_codes(first, table), high_codes(first, table), low_codes(second, table), high_codes(second, table)};
    constexpr int together = kSixteenBitSums ? 1 : 2;
    UNROLL for (int m0 = 0; m0 < M; m0 += together) {
      I acc[together];
      UNROLL for (int j = 0; j < together; j++)
        if (m0 + j < M) acc[j] = word(x + 4 * M + m0 + j);
      if constexpr (kSixteenBitSums)
        acc[0] = dot_group<1>(acc[0], w, x + m0, M);
      else
        UNROLL for (int i = 0; i < 4; i++)
          UNROLL for (int j = 0; j < together; j++)
            if (m0 + j < M) acc[j] = dot(acc[j], w[i], word(x + i * M + m0 + j));
      UNROLL for (int j = 0; j < together; j++)
        if (m0 + j < M) {
          const uint32_t* base = x + 5 * M + m0 + j;
          const V product = mul(scales, set1(kMantissas[mantissa_of(base)]));
          total[m0 + j] = fma(sub(from_bits(acc[j]), float_word(base)), product, total[m0 + j]);
        }
    }
  }
};

// The same bits with one multiplication less a row: the eight products of a weight scale and a mantissa, which are exact, are
// made once for all rows. Pays where multiplications wait for their pipes while additions and loads do not (Zen 4), and for
// rows enough.
#if defined(__AVX512BF16__)
constexpr int kTableFrom = 8;  // rows
template <int M>
struct BlocksByTable {
  static inline __attribute__((always_inline)) void group(const uint8_t* codes, V scales, const uint32_t* x, V* total) {
    constexpr int together = 4;
    alignas(64) float products[8][16];
    scale_products(scales, products);
    const I first = load_codes(codes), second = load_codes(codes + 64);
    const Bytes table = code_table();
    const Bytes w[4] = {low_codes(first, table), high_codes(first, table), low_codes(second, table), high_codes(second, table)};
    UNROLL for (int m0 = 0; m0 < M; m0 += together) {
      I acc[together];
      UNROLL for (int j = 0; j < together; j++)
        if (m0 + j < M) acc[j] = word(x + 4 * M + m0 + j);
      UNROLL for (int i = 0; i < 4; i++)
        UNROLL for (int j = 0; j < together; j++)
          if (m0 + j < M) acc[j] = dot_word(acc[j], w[i], x + i * M + m0 + j);
      UNROLL for (int j = 0; j < together; j++)
        if (m0 + j < M) {
          const uint32_t* base = x + 5 * M + m0 + j;
          total[m0 + j] = fma(sub_word(from_bits(acc[j]), base), load(products[mantissa_of(base)]), total[m0 + j]);
        }
    }
  }
  static inline __attribute__((always_inline)) void scale_products(V scales, float (*products)[16]) {
    const V one = mul(scales, set1(.125f)), two = add(one, one), four = add(two, two);
    const V of[8] = {scales,           add(scales, one),           add(scales, two),           add(add(scales, two), one),
                     add(scales, four), add(add(scales, four), one), add(add(scales, four), two), add(add(add(scales, four), two), one)};
    UNROLL for (int j = 0; j < 8; j++) store(products[j], of[j]);
  }
};
#else
constexpr int kTableFrom = kMostRows + 1;
template <int M>
using BlocksByTable = Blocks<M>;
#endif
template <int M>
struct Integers8 {
  static inline __attribute__((always_inline)) void group(const uint8_t* codes, V scales, const uint32_t* x, V* total) {
    if constexpr (M >= kTableFrom)
      BlocksByTable<M>::group(codes, scales, x, total);
    else
      Blocks<M>::group(codes, scales, x, total);
  }
};

// The high digits' sum, times 256, joins the low digits': one exact integer below 2^24.
template <int M>
struct Digits {
  static inline __attribute__((always_inline)) void group(const uint8_t* codes, V scales, const uint32_t* x, V* total) {
    const I first = load_codes(codes), second = load_codes(codes + 64);
    const Bytes table = code_table();
    const Bytes w[4] = {low_codes(first, table), high_codes(first, table), low_codes(second, table), high_codes(second, table)};
    UNROLL for (int m = 0; m < M; m++) {
      const I high = dot_group<256>(iset1(0), w, x + m, M), low = dot_group<1>(word(x + 8 * M + m), w, x + (4 * M + m), M);
      total[m] = fma(to_float(iadd(high, low)), mul(scales, float_word(x + 9 * M + m)), total[m]);
    }
  }
};

// ---- pairs of bfloat16 -------------------------------------------------------------------------------------------------

#if defined(__AVX512BF16__)
template <int M>
struct PairsOf {
  static inline __attribute__((always_inline)) void group(const uint8_t* codes, V scales, const uint32_t* x, V* total) {
    constexpr int together = M >= 4 ? 4 : M;
    const Pairs table = pair_table(e2m1_table());
    Pairs w[8];
    UNROLL for (int h = 0; h < 2; h++) {
      const I line = load_codes(codes + 64 * h);
      w[4 * h] = decode_pair<0>(line, table);
      w[4 * h + 1] = decode_pair<4>(line, table);
      w[4 * h + 2] = decode_pair<8>(line, table);
      w[4 * h + 3] = decode_pair<12>(line, table);
    }
    UNROLL for (int m0 = 0; m0 < M; m0 += together) {
      V acc[together];
      UNROLL for (int j = 0; j < together; j++) acc[j] = zero();
      UNROLL for (int i = 0; i < 8; i++)
        UNROLL for (int j = 0; j < together; j++)
          if (m0 + j < M) acc[j] = dot(acc[j], w[i], {word(x + i * M + m0 + j).v});
      UNROLL for (int j = 0; j < together; j++)
        if (m0 + j < M) total[m0 + j] = fma(acc[j], scales, total[m0 + j]);
    }
  }
};
#endif

// ---- panels ----------------------------------------------------------------------------------------------------------

template <class Group, int M, int words>
void panel(const LinearNVFP4& a, const uint8_t* w, const uint32_t* x, V* out) {
  const int groups = a.k / kGroup;
  V total[M];
  UNROLL for (int m = 0; m < M; m++) total[m] = zero();
  for (int g = 0; g < groups; g++) {
    const uint8_t* block = w + static_cast<size_t>(g / 4) * kBlockBytes;
    const uint8_t* codes = block + 64 + 128 * (g % 4);
    if (M > 1) prefetch_group(block, codes, g);
    Group::group(codes, scales_of(a, block + 16 * (g % 4)), x, total);
    x += words * M;
  }
  UNROLL for (int m = 0; m < M; m++) out[m] = total[m];
}

// P panels side by side, `apart` panels from one to the next: out[p][m].
template <class Group, int M, int words, int P, int near = kNearBytes, int far = kFarBytes>
void streamed_panels(const LinearNVFP4& a, const uint8_t* w, int apart, const uint32_t* x, V* out) {
  const int groups = a.k / kGroup;
  const size_t stride = static_cast<size_t>(apart) * panel_bytes(a.k);
  V total[P][M];
  UNROLL for (int p = 0; p < P; p++)
    UNROLL for (int m = 0; m < M; m++) total[p][m] = zero();
  int g = 0;
  for (; g + 4 <= groups; g += 4, w += kBlockBytes, x += 4 * words * M)
    UNROLL for (int p = 0; p < P; p++) {
      const uint8_t* block = w + p * stride;
      ask_for_block<near, far>(block);
      UNROLL for (int i = 0; i < 4; i++)
        Group::group(block + 64 + 128 * i, scales_of(a, block + 16 * i), x + i * words * M, total[p]);
    }
  for (int i = 0; g < groups; g++, i++, x += words * M)
    UNROLL for (int p = 0; p < P; p++)
      Group::group(w + p * stride + 64 + 128 * i, scales_of(a, w + p * stride + 16 * i), x, total[p]);
  UNROLL for (int p = 0; p < P; p++)
    UNROLL for (int m = 0; m < M; m++) out[p * M + m] = total[p][m];
}

// `apart` > 0: kStreams panels so far apart, else one; out[panel][row].
template <template <int> class Group, Operand operand>
void panel_of_width(const LinearNVFP4& a, int width, const uint8_t* w, int apart, const uint32_t* x, V* out) {
  constexpr int most = max_rows(operand), words = words_per_group(operand);
#define NVFP4_WIDTH(M)                                                                 \
  case M:                                                                              \
    if constexpr (M <= most && !(M == 2 && operand == Operand::floats)) {              \
      if constexpr (M <= kStreamedRows)                                                \
        apart ? streamed_panels<Group<M>, M, words, kStreams>(a, w, apart, x, out)     \
              : streamed_panels<Group<M>, M, words, 1>(a, w, 0, x, out);               \
      else if constexpr (M == 1)                                                       \
        a.ask ? streamed_panels<Group<M>, M, words, 1, kZen5Bytes, 0>(a, w, 0, x, out) \
              : panel<Group<M>, M, words>(a, w, x, out);                               \
      else                                                                             \
        panel<Group<M>, M, words>(a, w, x, out);                                       \
    }                                                                                  \
    break;
  switch (width) {
    NVFP4_WIDTH(1)
    NVFP4_WIDTH(2)
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
    NVFP4_WIDTH(20)
    NVFP4_WIDTH(24)
  }
#undef NVFP4_WIDTH
}

// What finish_panel reads: nobody else would ask for it before the finished sums wait for it.
inline void ask_for_row(const LinearNVFP4& a, int p) {
  __builtin_prefetch(a.row_scale + p * kPanel);
  if (a.bias) __builtin_prefetch(a.bias + p * kPanel);
}

template <class O>
void finish_panel(const LinearNVFP4& a, int p, int first, int rows, const V* total) {
  const int column = p * kPanel, n = a.n - column < kPanel ? a.n - column : kPanel;
  const V row_scale = load(a.row_scale + column);
  for (int m = 0; m < rows; m++) {
    V y = mul(total[m], row_scale);
    if (a.bias) y = add(y, load(a.bias + column));
    store_upto(static_cast<O*>(a.out) + static_cast<size_t>(first + m) * a.n + column, y, n);
  }
}

// Where streams begin nothing has been asked for yet; more blocks than these gave no more.
inline void ask_for_beginnings(const LinearNVFP4& a, int first, int apart) {
  const size_t stride = static_cast<size_t>(apart) * panel_bytes(a.k);
  const uint8_t* w = a.weights + first * panel_bytes(a.k);
  for (int line = 0; line < 3 * kBlockBytes; line += 64)
    for (int i = 0; i < kStreams; i++) __builtin_prefetch(w + i * stride + line, 0, 2);
}

template <class O>
void linear_nvfp4_as(const LinearNVFP4& a, int begin, int end) {
  const int most = max_rows(a.operand);
  for (int first = 0; first < a.m; first += most) {
    const int rows = a.m - first < most ? a.m - first : most, width = block_width(a.operand, rows);
    const uint32_t* x = a.x + static_cast<size_t>(first) * (a.k / kGroup) * words_per_group(a.operand);
    const auto panels_at = [&](int p, int apart) {
      const uint8_t* w = a.weights + p * panel_bytes(a.k);
      V total[kMostRows];
      for (int i = 0; i == 0 || (apart && i < kStreams); i++) ask_for_row(a, p + i * apart);
      switch (a.operand) {
#if defined(__AVX512BF16__)
        case Operand::pairs: panel_of_width<PairsOf, Operand::pairs>(a, width, w, apart, x, total); break;
#endif
        case Operand::digits: panel_of_width<Digits, Operand::digits>(a, width, w, apart, x, total); break;
        case Operand::int8:
        case Operand::nvfp4: panel_of_width<Integers8, Operand::int8>(a, width, w, apart, x, total); break;
        default: panel_of_width<Floats, Operand::floats>(a, width, w, apart, x, total); break;
      }
      finish_panel<O>(a, p, first, rows, total);
      for (int i = 1; apart && i < kStreams; i++) finish_panel<O>(a, p + i * apart, first, rows, total + i * width);
    };
    const int apart = width <= kStreamedRows ? (end - begin) / kStreams : 0;
    if (kFarBytes > 0 && apart) ask_for_beginnings(a, begin, apart);
    for (int p = begin; p < begin + apart; p++) panels_at(p, apart);
    for (int p = begin + kStreams * apart; p < end; p++) panels_at(p, 0);
  }
}

void linear_nvfp4(const LinearNVFP4& a, int begin, int end) {
  a.out_type == Type::bf16 ? linear_nvfp4_as<bf16>(a, begin, end) : linear_nvfp4_as<float>(a, begin, end);
}
