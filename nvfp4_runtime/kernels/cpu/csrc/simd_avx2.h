// Sixteen lanes as two AVX2 registers (with FMA and F16C). Included inside the anonymous namespace of kernels.cpp.
struct V {
  __m256 a, b;
};
struct I {
  __m256i a, b;
};
struct Mask {
  __m256 a, b;
};
inline I to_bf16_bits(I x);  // simd_math.h

inline V zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline V set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline V fma(V x, V y, V z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline V add(V x, V y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline V sub(V x, V y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline V mul(V x, V y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline V div(V x, V y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline V vmax(V x, V y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }  // y where either is NaN
inline V vmin(V x, V y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }

inline I bits(V x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
inline V from_bits(I x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
inline I iset1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I iadd(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I isub(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline I iand(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
inline I ior(I x, I y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
template <int n>
inline I shl(I x) { return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)}; }
template <int n>
inline I shr(I x) { return {_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)}; }
template <int n>
inline I sar(I x) { return {_mm256_srai_epi32(x.a, n), _mm256_srai_epi32(x.b, n)}; }
inline Mask less(V x, V y) { return {_mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ)}; }
inline Mask is_nan(V x) { return {_mm256_cmp_ps(x.a, x.a, _CMP_UNORD_Q), _mm256_cmp_ps(x.b, x.b, _CMP_UNORD_Q)}; }
inline Mask below(int n) {
  const __m256i c = _mm256_set1_epi32(n);
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(c, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))),
          _mm256_castsi256_ps(_mm256_cmpgt_epi32(c, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)))};
}
inline Mask mask_and(Mask x, Mask y) { return {_mm256_and_ps(x.a, y.a), _mm256_and_ps(x.b, y.b)}; }
inline Mask mask_not(Mask x) {
  const __m256 ones = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
  return {_mm256_xor_ps(x.a, ones), _mm256_xor_ps(x.b, ones)};
}
inline bool any(Mask m) { return (_mm256_movemask_ps(m.a) | _mm256_movemask_ps(m.b)) != 0; }
inline V select(Mask m, V x, V y) { return {_mm256_blendv_ps(y.a, x.a, m.a), _mm256_blendv_ps(y.b, x.b, m.b)}; }
inline I select(Mask m, I x, I y) { return bits(select(m, from_bits(x), from_bits(y))); }

inline V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline V load(const float* p, int n) {
  const Mask m = below(n);
  return {_mm256_maskload_ps(p, _mm256_castps_si256(m.a)), _mm256_maskload_ps(p + 8, _mm256_castps_si256(m.b))};
}
inline void store(float* p, V x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline void store(float* p, V x, int n) {
  const Mask m = below(n);
  _mm256_maskstore_ps(p, _mm256_castps_si256(m.a), x.a);
  _mm256_maskstore_ps(p + 8, _mm256_castps_si256(m.b), x.b);
}

inline __m128i load8(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline V load(const bf16* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load8(p)), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load8(p + 8)), 16))};
}
inline V load(const fp16* p) { return {_mm256_cvtph_ps(load8(p)), _mm256_cvtph_ps(load8(p + 8))}; }
template <class T>
inline V load_tail(const T* p, int n) {
  T t[16] = {};
  for (int i = 0; i < n; i++) t[i] = p[i];
  return load(t);
}
inline V load(const bf16* p, int n) { return load_tail(p, n); }
inline V load(const fp16* p, int n) { return load_tail(p, n); }

inline __m256i narrow16(I x) {  // 32-bit lanes below 2^16 to 16-bit lanes, in order
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), 0xd8);
}
inline void store(bf16* p, V x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow16(to_bf16_bits(bits(x)))); }
inline void store(bf16* p, V x, int n) {
  bf16 t[16];
  store(t, x);
  for (int i = 0; i < n; i++) p[i] = t[i];
}

inline I load_bytes(const uint8_t* p, int n) {
  uint8_t t[16] = {};
  for (int i = 0; i < n; i++) t[i] = p[i];
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(t))),
          _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(t + 8)))};
}
inline void store_bytes(uint8_t* p, I x, int n) {
  const __m256i words = narrow16({_mm256_and_si256(x.a, _mm256_set1_epi32(255)), _mm256_and_si256(x.b, _mm256_set1_epi32(255))});
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  if (n == 16) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  uint8_t t[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(t), bytes);
  for (int i = 0; i < n; i++) p[i] = t[i];
}

inline float reduce_add(V x) {
  const __m256 h = _mm256_add_ps(x.a, x.b);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
inline V reduce16(const V* a) {  // reduce_add of sixteen vectors
  float t[16];
  for (int i = 0; i < 16; i++) t[i] = reduce_add(a[i]);
  return load(t);
}
inline float reduce_max(V x) {
  const __m256 h = _mm256_max_ps(x.a, x.b);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}

// Codes: one 32-bit lane per row holds 8 codes; vpermps over 8 magnitudes looks at 3 bits, the fourth becomes the sign.
inline I load_codes(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
inline V e2m1_table() {
  const __m256 t = _mm256_setr_ps(0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f);
  return {t, t};
}
template <int shift>
inline __m256 decode8(__m256i c, __m256 table) {
  const __m256 magnitude = _mm256_permutevar8x32_ps(table, _mm256_srli_epi32(c, shift));
  const __m256 sign = _mm256_and_ps(_mm256_castsi256_ps(_mm256_slli_epi32(c, 28 - shift)), _mm256_set1_ps(-0.f));
  return _mm256_or_ps(magnitude, sign);
}
template <int shift>
inline V decode(I codes, V table) {
  return {decode8<shift>(codes.a, table.a), decode8<shift>(codes.b, table.a)};
}
// Non-negative E4M3 block scales of 16 rows, times 2^-8: the byte, shifted into an FP16's place, is that value.
inline V load_scales(const uint8_t* p) {
  const __m256i h = _mm256_slli_epi16(_mm256_cvtepu8_epi16(load8(p)), 7);
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(h)), _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1))};
}

inline __m256i e8m0(__m128i bytes) {
  return _mm256_max_epi32(_mm256_slli_epi32(_mm256_cvtepu8_epi32(bytes), 23), _mm256_set1_epi32(0x00400000));
}
inline V load_e8m0(const uint8_t* p) {  // 2^(byte - 127); byte 0 is the subnormal 2^-127
  return {_mm256_castsi256_ps(e8m0(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))),
          _mm256_castsi256_ps(e8m0(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8))))};
}

// Codes as unsigned bytes 2 * value + 12.
struct Bytes {
  __m256i a, b;
};
inline Bytes code_table() {
  const __m128i t = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
  const __m256i v = _mm256_broadcastsi128_si256(t);
  return {v, v};
}
inline __m256i lookup(__m256i nibbles, __m256i table) {
  return _mm256_shuffle_epi8(table, _mm256_and_si256(nibbles, _mm256_set1_epi8(15)));
}
inline Bytes low_codes(I codes, Bytes table) { return {lookup(codes.a, table.a), lookup(codes.b, table.a)}; }
inline Bytes high_codes(I codes, Bytes table) {
  return {lookup(_mm256_srli_epi16(codes.a, 4), table.a), lookup(_mm256_srli_epi16(codes.b, 4), table.a)};
}
// Four products of unsigned and signed bytes, added to each 32-bit lane. Two products stay below 2 * 24 * 128 = 6144,
// so the 16-bit step of the form without VNNI does not saturate.
inline __m256i dot8(__m256i acc, __m256i w, __m256i x) {
#if defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(acc, w, x);
#else
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
#endif
}
inline I dot(I acc, Bytes w, I x) { return {dot8(acc.a, w.a, x.a), dot8(acc.b, w.b, x.b)}; }
#if !defined(__AVXVNNI__)
// acc and `factor` times the sums of a group's products, whose words of x lie `stride` apart. Sums of eight products stay below
// 8 * 24 * 128 = 24576, so that 16 bits hold them and they are widened once instead of four times.
#define NVFP4_SIXTEEN_BIT_SUMS
inline __m256i sum_of_eight(const __m256i* w, const uint32_t* x, int stride) {
  const auto product = [&](int i) { return _mm256_maddubs_epi16(w[i], _mm256_set1_epi32(static_cast<int32_t>(x[i * stride]))); };
  return _mm256_add_epi16(_mm256_add_epi16(product(0), product(1)), _mm256_add_epi16(product(2), product(3)));
}
template <int factor>
inline I dot_group(I acc, const Bytes* w, const uint32_t* x, int stride) {
  const __m256i a[4] = {w[0].a, w[1].a, w[2].a, w[3].a}, b[4] = {w[0].b, w[1].b, w[2].b, w[3].b};
  const __m256i times = _mm256_set1_epi16(factor);
  return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(sum_of_eight(a, x, stride), times)),
          _mm256_add_epi32(acc.b, _mm256_madd_epi16(sum_of_eight(b, x, stride), times))};
}
#endif
inline V to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline I to_int(V x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }  // nearest even

inline void transpose8(__m256 r[8]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 2; j++) {
      const __m256d a = _mm256_castps_pd(t[4 * i + j]), b = _mm256_castps_pd(t[4 * i + 2 + j]);
      u[4 * i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
      u[4 * i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm256_permute2f128_ps(u[i], u[4 + i], 0x20);
    r[4 + i] = _mm256_permute2f128_ps(u[i], u[4 + i], 0x31);
  }
}
inline void transpose16(V r[16]) {
  __m256 q[4][8];
  for (int i = 0; i < 8; i++) {
    q[0][i] = r[i].a;
    q[1][i] = r[i].b;
    q[2][i] = r[8 + i].a;
    q[3][i] = r[8 + i].b;
  }
  for (int i = 0; i < 4; i++) transpose8(q[i]);
  for (int i = 0; i < 8; i++) {
    r[i] = {q[0][i], q[2][i]};
    r[8 + i] = {q[1][i], q[3][i]};
  }
}

// E4M3 weights, 64 at a time, in order: the byte, moved into an FP16's place, is 2^-8 of the value. NaN codes are
// refused at load.
inline __m256 fp8_half(__m128i h) { return _mm256_mul_ps(_mm256_cvtph_ps(h), _mm256_set1_ps(256.f)); }
inline void decode_fp8(const e4m3* p, int n, V* out) {
  e4m3 t[64];
  if (n < 64) {
    __builtin_memset(t, 0, 64);
    __builtin_memcpy(t, p, static_cast<size_t>(n));
    p = t;
  }
  for (int i = 0; i < 4; i++) {
    const __m256i words = _mm256_slli_epi16(_mm256_cvtepi8_epi16(load8(p + 16 * i)), 7);  // the sign lies in two bits
    const __m256i h = _mm256_and_si256(words, _mm256_set1_epi16(static_cast<short>(0xbfff)));
    out[i] = {fp8_half(_mm256_castsi256_si128(h)), fp8_half(_mm256_extracti128_si256(h, 1))};
  }
}
inline int fp8_place(int i) { return i; }

// Sixteen bfloat16 weights by one load and two operations: the even ones, then the odd ones.
#define NVFP4_EVENS_AND_ODDS
inline V load_evens_and_odds(const bf16* p) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(words, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
}
inline V evens_and_odds(V x) {
  const auto ordered = [](__m256 v) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8)); };
  return {ordered(_mm256_shuffle_ps(x.a, x.b, 0x88)), ordered(_mm256_shuffle_ps(x.a, x.b, 0xdd))};
}
inline V from_evens_and_odds(V x) {
  const __m256 low = _mm256_unpacklo_ps(x.a, x.b), high = _mm256_unpackhi_ps(x.a, x.b);
  return {_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
}
