// Sixteen lanes as four 128-bit vectors of the compiler's own type: SSE2, NEON, whatever the baseline has.
// Multiply and add stay two roundings here (no -ffp-contract), so the bits do not depend on the compiler's mood.
typedef float F4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));
typedef uint32_t U4 __attribute__((vector_size(16)));
struct V {
  F4 q[4];
};
struct I {
  I4 q[4];
};
using Mask = I;
inline I to_bf16_bits(I x);  // simd_math.h

// r = f of the four quarters; T names the result's type.
#define NVFP4_QUARTERS(T, expression) \
  T r;                                \
  UNROLL for (int i = 0; i < 4; i++) r.q[i] = expression; \
  return r

template <class T, class S>
inline T as(S x) {  // the same 128 bits
  return reinterpret_cast<T>(x);
}
inline V set1(float x) { NVFP4_QUARTERS(V, (F4{x, x, x, x})); }
inline V zero() { return set1(0.f); }
inline V fma(V a, V b, V c) { NVFP4_QUARTERS(V, a.q[i] * b.q[i] + c.q[i]); }
inline V add(V a, V b) { NVFP4_QUARTERS(V, a.q[i] + b.q[i]); }
inline V sub(V a, V b) { NVFP4_QUARTERS(V, a.q[i] - b.q[i]); }
inline V mul(V a, V b) { NVFP4_QUARTERS(V, a.q[i] * b.q[i]); }
inline V div(V a, V b) { NVFP4_QUARTERS(V, a.q[i] / b.q[i]); }

inline I bits(V a) { NVFP4_QUARTERS(I, as<I4>(a.q[i])); }
inline V from_bits(I a) { NVFP4_QUARTERS(V, as<F4>(a.q[i])); }
inline I iset1(int32_t x) { NVFP4_QUARTERS(I, (I4{x, x, x, x})); }
inline I iadd(I a, I b) { NVFP4_QUARTERS(I, as<I4>(as<U4>(a.q[i]) + as<U4>(b.q[i]))); }
inline I isub(I a, I b) { NVFP4_QUARTERS(I, as<I4>(as<U4>(a.q[i]) - as<U4>(b.q[i]))); }
inline I iand(I a, I b) { NVFP4_QUARTERS(I, a.q[i] & b.q[i]); }
inline I ior(I a, I b) { NVFP4_QUARTERS(I, a.q[i] | b.q[i]); }
template <int n>
inline I shl(I a) {
  NVFP4_QUARTERS(I, as<I4>(as<U4>(a.q[i]) << n));
}
template <int n>
inline I shr(I a) {
  NVFP4_QUARTERS(I, as<I4>(as<U4>(a.q[i]) >> n));
}
template <int n>
inline I sar(I a) {
  NVFP4_QUARTERS(I, a.q[i] >> n);
}
inline Mask less(V a, V b) { NVFP4_QUARTERS(I, as<I4>(a.q[i] < b.q[i])); }
inline Mask is_nan(V a) { NVFP4_QUARTERS(I, as<I4>(a.q[i] != a.q[i])); }
inline Mask below(int n) {
  NVFP4_QUARTERS(I, as<I4>(I4{4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3} < I4{n, n, n, n}));
}
inline Mask mask_and(Mask a, Mask b) { return iand(a, b); }
inline Mask mask_not(Mask a) { NVFP4_QUARTERS(I, ~a.q[i]); }
inline bool any(Mask m) {
  const I4 o = (m.q[0] | m.q[1]) | (m.q[2] | m.q[3]);
  return (o[0] | o[1] | o[2] | o[3]) != 0;
}
inline I select(Mask m, I a, I b) { NVFP4_QUARTERS(I, (a.q[i] & m.q[i]) | (b.q[i] & ~m.q[i])); }
inline V select(Mask m, V a, V b) { return from_bits(select(m, bits(a), bits(b))); }
inline V vmax(V a, V b) { return select(less(b, a), a, b); }  // b where either is NaN
inline V vmin(V a, V b) { return select(less(a, b), a, b); }

inline V load(const float* p) {
  V r;
  __builtin_memcpy(&r, p, 64);
  return r;
}
inline V load(const float* p, int n) {
  float t[16] = {};
  for (int i = 0; i < n; i++) t[i] = p[i];
  return load(t);
}
inline void store(float* p, V a) { __builtin_memcpy(p, &a, 64); }
inline void store(float* p, V a, int n) {
  float t[16];
  store(t, a);
  for (int i = 0; i < n; i++) p[i] = t[i];
}
inline I load_ints(const int32_t* p) {
  I r;
  __builtin_memcpy(&r, p, 64);
  return r;
}
inline void store_ints(int32_t* p, I a) { __builtin_memcpy(p, &a, 64); }

typedef uint16_t H4 __attribute__((vector_size(8)));
inline V load(const bf16* p) {
  H4 h[4];
  __builtin_memcpy(h, p, 32);
  NVFP4_QUARTERS(V, as<F4>(__builtin_convertvector(h[i], U4) << 16));
}
inline V load(const bf16* p, int n) {
  bf16 t[16] = {};
  for (int i = 0; i < n; i++) t[i] = p[i];
  return load(t);
}
inline float half_to_float(uint16_t h) {  // exact, subnormals, infinities and NaN included
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = static_cast<uint32_t>(h & 0x7fff) << 13;
  uint32_t u = rest;
  float f;
  if ((h & 0x7c00) == 0x7c00) {
    u |= 0x7f800000u;
    __builtin_memcpy(&f, &u, 4);
  } else {
    __builtin_memcpy(&f, &u, 4);
    f *= 0x1p112f;
  }
  __builtin_memcpy(&u, &f, 4);
  u |= sign;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
inline V load(const fp16* p, int n) {
  float t[16] = {};
  for (int i = 0; i < n; i++) t[i] = half_to_float(p[i].bits);
  return load(t);
}
inline V load(const fp16* p) { return load(p, 16); }

inline void store(bf16* p, V a, int n) {
  int32_t t[16];
  store_ints(t, to_bf16_bits(bits(a)));
  for (int i = 0; i < n; i++) p[i].bits = static_cast<uint16_t>(t[i]);
}
inline void store(bf16* p, V a) { store(p, a, 16); }

inline I load_bytes(const uint8_t* p, int n) {
  int32_t t[16] = {};
  for (int i = 0; i < n; i++) t[i] = p[i];
  return load_ints(t);
}
inline void store_bytes(uint8_t* p, I a, int n) {
  int32_t t[16];
  store_ints(t, a);
  for (int i = 0; i < n; i++) p[i] = static_cast<uint8_t>(t[i]);
}

inline float reduce_add(V a) {
  const F4 q = (a.q[0] + a.q[2]) + (a.q[1] + a.q[3]);
  return (q[0] + q[2]) + (q[1] + q[3]);
}
inline V reduce16(const V* a) {  // reduce_add of sixteen vectors
  float t[16];
  for (int i = 0; i < 16; i++) t[i] = reduce_add(a[i]);
  return load(t);
}
inline float reduce_max(V a) {
  float t[16];
  store(t, a);
  float m = t[0];
  for (int i = 1; i < 16; i++) m = m > t[i] ? m : t[i];
  return m;
}

// Codes: one 32-bit lane per row holds 8 codes. Integer work only: SSE takes a slow path on subnormal floats.
inline I load_codes(const uint8_t* p) {
  I r;
  __builtin_memcpy(&r, p, 64);
  return r;
}
inline V e2m1_table() { return zero(); }
template <int shift>
inline F4 decode4(I4 codes) {
  const U4 c = as<U4>(codes) >> shift, m = c & 7u;
  const U4 normal = (m << 22) + 0x3f000000u, small = (0u - m) & 0x3f000000u;  // codes 0 and 1: 0 and 0.5
  const U4 is_small = as<U4>(m < 2u);
  return as<F4>((small & is_small) | (normal & ~is_small) | (c << 28 & 0x80000000u));
}
template <int shift>
inline V decode(I codes, V) {
  NVFP4_QUARTERS(V, decode4<shift>(codes.q[i]));
}
// Non-negative E4M3 block scales of 16 rows, times 2^-8.
inline V load_scales(const uint8_t* p) {
  const I m = load_bytes(p, 16);
  NVFP4_QUARTERS(V, as<F4>(m.q[i] < 8 ? as<I4>(__builtin_convertvector(m.q[i], F4) * 0x1p-17f)
                                      : (m.q[i] << 20) + (112 << 23)));
}

inline V load_e8m0(const uint8_t* p) {  // 2^(byte - 127); byte 0 is the subnormal 2^-127
  const I b = load_bytes(p, 16);
  NVFP4_QUARTERS(V, as<F4>(b.q[i] == 0 ? I4{} + 0x00400000 : as<I4>(as<U4>(b.q[i]) << 23)));
}

// Codes as unsigned bytes 2 * value + 12.
struct Bytes {
  uint8_t b[64];
};
constexpr uint8_t kCodeBytes[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
inline Bytes code_table() { return {}; }
inline Bytes codes_at(I codes, int shift) {
  Bytes r;
  __builtin_memcpy(r.b, &codes, 64);
  for (int i = 0; i < 64; i++) r.b[i] = kCodeBytes[r.b[i] >> shift & 15];
  return r;
}
inline Bytes low_codes(I codes, Bytes) { return codes_at(codes, 0); }
inline Bytes high_codes(I codes, Bytes) { return codes_at(codes, 4); }
// Four products of unsigned and signed bytes, added to each 32-bit lane.
inline I dot(I acc, Bytes w, I x) {
  int8_t b[64];
  int32_t sums[16];
  __builtin_memcpy(b, &x, 64);
  store_ints(sums, acc);
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 4; j++) sums[i] += w.b[4 * i + j] * b[4 * i + j];
  return load_ints(sums);
}
inline V to_float(I x) { NVFP4_QUARTERS(V, __builtin_convertvector(x.q[i], F4)); }
inline I to_int(V x) {  // nearest even; |x| < 2^22
  const V magic = set1(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  return isub(bits(add(x, magic)), bits(magic));
}

inline void transpose16(V r[16]) {
  float from[16][16], to[16][16];
  for (int i = 0; i < 16; i++) store(from[i], r[i]);
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) to[j][i] = from[i][j];
  for (int i = 0; i < 16; i++) r[i] = load(to[i]);
}

// E4M3 weights, 64 at a time, in order. NaN codes are refused at load.
struct FP8Table {
  float value[256] = {};
  constexpr FP8Table() {
    for (int b = 0; b < 128; b++) {
      float v = static_cast<float>(b < 8 ? b : 8 + b % 8) * 0x1p-9f;
      for (int e = 1; e < b / 8; e++) v *= 2.f;
      value[b] = v;
      value[128 + b] = -v;
    }
  }
};
static constexpr FP8Table kFP8;
inline void decode_fp8(const e4m3* p, int n, V* out) {
  float t[64] = {};
  for (int i = 0; i < (n < 64 ? n : 64); i++) t[i] = kFP8.value[p[i].bits];
  for (int i = 0; i < 4; i++) out[i] = load(t + 16 * i);
}
inline int fp8_place(int i) { return i; }
#undef NVFP4_QUARTERS
