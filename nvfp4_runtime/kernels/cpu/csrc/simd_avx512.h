// Sixteen lanes as one AVX-512 register. Included inside the anonymous namespace of kernels.cpp.
struct V {
  __m512 v;
};
struct I {
  __m512i v;
};
using Mask = __mmask16;
inline I to_bf16_bits(I x);  // simd_math.h

inline __mmask16 lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }

inline V zero() { return {_mm512_setzero_ps()}; }
inline V set1(float x) { return {_mm512_set1_ps(x)}; }
inline V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline V add(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
inline V sub(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline V mul(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline V div(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
inline V vmax(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where either is NaN
inline V vmin(V a, V b) { return {_mm512_min_ps(a.v, b.v)}; }

inline I bits(V a) { return {_mm512_castps_si512(a.v)}; }
inline V from_bits(I a) { return {_mm512_castsi512_ps(a.v)}; }
inline I iset1(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline I iadd(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I isub(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline I iand(I a, I b) { return {_mm512_and_si512(a.v, b.v)}; }
inline I ior(I a, I b) { return {_mm512_or_si512(a.v, b.v)}; }
template <int n>
inline I shl(I a) { return {_mm512_slli_epi32(a.v, n)}; }
template <int n>
inline I shr(I a) { return {_mm512_srli_epi32(a.v, n)}; }
template <int n>
inline I sar(I a) { return {_mm512_srai_epi32(a.v, n)}; }
inline Mask less(V a, V b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
inline Mask is_nan(V a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q); }
inline Mask below(int n) { return lanes(n < 0 ? 0 : n > 16 ? 16 : n); }
inline Mask mask_and(Mask a, Mask b) { return a & b; }
inline Mask mask_not(Mask a) { return static_cast<Mask>(~a); }
inline bool any(Mask m) { return m != 0; }
inline V select(Mask m, V a, V b) { return {_mm512_mask_blend_ps(m, b.v, a.v)}; }
inline I select(Mask m, I a, I b) { return {_mm512_mask_blend_epi32(m, b.v, a.v)}; }

inline V load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline V load(const float* p, int n) { return {_mm512_maskz_loadu_ps(lanes(n), p)}; }
inline void store(float* p, V a) { _mm512_storeu_ps(p, a.v); }
inline void store(float* p, V a, int n) { _mm512_mask_storeu_ps(p, lanes(n), a.v); }

inline V widen_bf16(__m256i h) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))}; }
inline V load(const bf16* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline V load(const bf16* p, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(lanes(n), p)); }
inline V load(const fp16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline V load(const fp16* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(n), p))}; }

inline void store(bf16* p, V a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(to_bf16_bits(bits(a)).v));
}
inline void store(bf16* p, V a, int n) {
  _mm256_mask_storeu_epi16(p, lanes(n), _mm512_cvtepi32_epi16(to_bf16_bits(bits(a)).v));
}

inline I load_bytes(const uint8_t* p, int n) { return {_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes(n), p))}; }
inline void store_bytes(uint8_t* p, I a, int n) { _mm_mask_storeu_epi8(p, lanes(n), _mm512_cvtepi32_epi8(a.v)); }

inline float reduce_add(V a) {
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
// reduce_add of sixteen vectors at once, the same tree: 50 operations for 16 sums, 15 of them shuffles (blends are cheap).
// Each step adds the halves of two vectors, one half of the result for each.
// Halves: the lower halves of eight vectors, then their upper halves.
ALWAYS_INLINE V reduce8_halves(const V* a) {
  __m512 h[8], q[4], p[2];  // q[i]: 4 lanes of each half of vectors i and i + 4; ..
  UNROLL for (int i = 0; i < 8; i++) h[i] = a[i].v;
  UNROLL for (int i = 0; i < 4; i++) {
    const __m512 other = _mm512_mask_blend_ps(0xf0f0, h[i + 4], h[i]);
    q[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xf0f0, h[i], h[i + 4]), _mm512_shuffle_f32x4(other, other, 0xb1));
  }
  UNROLL for (int i = 0; i < 2; i++)
    p[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, q[i], q[i + 2]), _mm512_shuffle_ps(q[i], q[i + 2], 0x4e));
  const __m512 other = _mm512_mask_blend_ps(0xaaaa, p[1], p[0]);
  return {_mm512_add_ps(_mm512_mask_blend_ps(0xaaaa, p[0], p[1]), _mm512_permute_ps(other, 0xb1))};
}
ALWAYS_INLINE V reduce16(const V* a) {
  V h[8];  // eight lanes of vectors i and i + 8
  UNROLL for (int i = 0; i < 8; i++) {
    const __m512 x = a[i].v, y = a[i + 8].v;
    h[i] = {_mm512_add_ps(_mm512_mask_blend_ps(0xff00, x, y), _mm512_shuffle_f32x4(x, y, 0x4e))};
  }
  return reduce8_halves(h);
}
inline float reduce_max(V a) { return _mm512_reduce_max_ps(a.v); }

// Codes: one 32-bit lane per row holds 8 codes; vpermps looks at the low 4 bits of each lane only.
inline I load_codes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline V e2m1_table() {
  return {_mm512_setr_ps(0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f, -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f)};
}
template <int shift>
inline V decode(I codes, V table) {
  return {_mm512_permutexvar_ps(_mm512_srli_epi32(codes.v, shift), table.v)};
}
// Non-negative E4M3 block scales of 16 rows, times 2^-8: the byte, shifted into an FP16's place, is that value.
inline V load_scales(const uint8_t* p) {
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(b), 7))};
}

inline V load_e8m0(const uint8_t* p) {  // 2^(byte - 127); byte 0 is the subnormal 2^-127
  const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm512_castsi512_ps(_mm512_max_epi32(_mm512_slli_epi32(b, 23), _mm512_set1_epi32(0x00400000)))};
}

// Codes as unsigned bytes 2 * value + 12. The table stands four times in its register, so vpermb does not mind what the
// index bits above a nibble are.
struct Bytes {
  __m512i v;
};
inline Bytes code_table() {
  const __m128i t = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
  return {_mm512_broadcast_i32x4(t)};
}
inline Bytes low_codes(I codes, Bytes table) { return {_mm512_permutexvar_epi8(codes.v, table.v)}; }
inline Bytes high_codes(I codes, Bytes table) {
  return {_mm512_permutexvar_epi8(_mm512_srli_epi16(codes.v, 4), table.v)};
}
// Four products of unsigned and signed bytes, added to each 32-bit lane.
inline I dot(I acc, Bytes w, I x) { return {_mm512_dpbusd_epi32(acc.v, w.v, x.v)}; }
// Operations with one word for all lanes, straight from memory. Written out because compilers load the word into a register
// first, and of such loads one a cycle is possible, where as operands they come beside the multiplications.
inline I dot_word(I acc, Bytes w, const uint32_t* x) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc.v) : "v"(w.v), "m"(*x));
  return acc;
}
inline V sub_word(V a, const uint32_t* x) {
  __m512 difference;
  asm("vsubps %2%{1to16%}, %1, %0" : "=v"(difference) : "v"(a.v), "m"(*x));
  return {difference};
}
inline V to_float(I x) { return {_mm512_cvtepi32_ps(x.v)}; }
inline I to_int(V x) { return {_mm512_cvtps_epi32(x.v)}; }  // nearest even

#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
// Pairs of bfloat16, multiplied and added to an FP32 lane by vdpbf16ps or in tiles (which take subnormals for zero). A 32-bit
// lane of codes gives pairs (k0, k2) (k4, k6) (k1, k3) (k5, k7) by shifts of 0, 4, 8, 12 in its two 16-bit halves; vpermw looks
// at 5 bits of each, so the table holds the sixteen values twice.
struct Pairs {
  __m512i v;
};
inline Pairs pair_table(V values) {
  return {_mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(_mm512_srli_epi32(bits(values).v, 16)))};
}
template <int shift>
inline Pairs decode_pair(I codes, Pairs table) {
  return {_mm512_permutexvar_epi16(_mm512_srli_epi16(codes.v, shift), table.v)};
}
// Sixteen values that bfloat16 holds exactly, as eight pairs in the order decode_pair gives them (upper lanes zero).
inline V to_pairs(V x) {
  const __m256i words = _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits(x).v, 16));
  const __m256i order = _mm256_setr_epi16(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  return {_mm512_castsi512_ps(_mm512_zextsi256_si512(_mm256_permutexvar_epi16(order, words)))};
}
#endif
#if defined(__AVX512BF16__)
inline Pairs load_pairs(const bf16* p) { return {_mm512_loadu_si512(p)}; }
inline Pairs load_pairs(const bf16* p, int n) { return {_mm512_maskz_loadu_epi16((uint32_t{1} << n) - 1, p)}; }
inline Pairs set1_pair(const float* p) { return {_mm512_castps_si512(_mm512_set1_ps(*p))}; }
inline V dot(V c, Pairs a, Pairs b) {
  return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}
#endif

inline void transpose16(V r[16]) {
  __m512 t[16], u[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 2; j++) {
      const __m512d a = _mm512_castps_pd(t[4 * i + j]), b = _mm512_castps_pd(t[4 * i + 2 + j]);
      u[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      u[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  for (int i = 0; i < 4; i++) {  // u[4 b + i]: 4x4 blocks, lane l holds column 4 l + i of rows 4 b .. 4 b + 3
    const __m512 a = _mm512_shuffle_f32x4(u[i], u[4 + i], 0x88), b = _mm512_shuffle_f32x4(u[i], u[4 + i], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0x88), d = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0xdd);
    r[i].v = _mm512_shuffle_f32x4(a, c, 0x88);
    r[8 + i].v = _mm512_shuffle_f32x4(a, c, 0xdd);
    r[4 + i].v = _mm512_shuffle_f32x4(b, d, 0x88);
    r[12 + i].v = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

// E4M3 weights, 64 at a time: two table look-ups give the bytes of their BF16 values, interleaving makes them words.
// fp8_place(i) is where weight i of 64 comes to lie; NaN codes are refused at load.
struct FP8Tables {
  alignas(64) uint8_t low[128] = {}, high[128] = {};
  constexpr FP8Tables() {
    for (int b = 0; b < 127; b++) {
      int exponent = 120 + (b >> 3), mantissa = (b & 7) << 4;  // BF16: value = 1.mantissa * 2^(exponent - 127)
      if (b == 0) {
        exponent = mantissa = 0;
      } else if (b < 8) {  // b * 2^-9
        const int top = b >= 4 ? 2 : b >= 2 ? 1 : 0;
        exponent = 127 - 9 + top;
        mantissa = (b << (7 - top)) & 0x7f;
      }
      const int word = exponent << 7 | mantissa;
      low[b] = static_cast<uint8_t>(word & 0xff);
      high[b] = static_cast<uint8_t>(word >> 8);
    }
  }
};
static constexpr FP8Tables kFP8;
struct FP8Words {
  __m512i low, high;  // BF16 of k = 16 j + (0..7) and 16 j + 8 + (0..7) in 128-bit lane j
};
inline FP8Words fp8_words(const e4m3* p, __mmask64 mask) {
  const __m512i b = mask == ~__mmask64{0} ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(mask, p);
  const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(kFP8.low), b, _mm512_load_si512(kFP8.low + 64));
  __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(kFP8.high), b, _mm512_load_si512(kFP8.high + 64));
  high = _mm512_ternarylogic_epi32(high, b, _mm512_set1_epi8(static_cast<char>(0x80)), 0xf8);  // high | (b & 0x80)
  return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
}
inline __mmask64 first64(int n) { return n >= 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1; }
inline void decode_fp8(const e4m3* p, int n, V* out) {
  const FP8Words w = fp8_words(p, first64(n));
  const __m512i odd = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  out[0] = {_mm512_castsi512_ps(_mm512_slli_epi32(w.low, 16))};
  out[1] = {_mm512_castsi512_ps(_mm512_and_si512(w.low, odd))};
  out[2] = {_mm512_castsi512_ps(_mm512_slli_epi32(w.high, 16))};
  out[3] = {_mm512_castsi512_ps(_mm512_and_si512(w.high, odd))};
}
inline int fp8_place(int i) { return (2 * (i / 8 % 2) + i % 2) * 16 + i / 16 * 4 + i % 8 / 2; }
#if defined(__AVX512BF16__)
inline void decode_fp8(const e4m3* p, int n, Pairs* out) {
  const FP8Words w = fp8_words(p, first64(n));
  out[0] = {w.low};
  out[1] = {w.high};
}
inline int fp8_pair_place(int i) { return i / 8 % 2 * 32 + i / 16 * 8 + i % 8; }
inline void store_pairs(bf16* p, Pairs a) { _mm512_storeu_si512(p, a.v); }
#endif
