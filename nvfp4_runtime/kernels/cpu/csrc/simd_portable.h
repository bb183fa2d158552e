// Sixteen lanes in the compiler's own vector type: SSE2, NEON or plain registers, whatever the baseline has.
// Multiply and add stay two roundings here (no -ffp-contract), so the bits do not depend on the compiler's mood.
typedef float V __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef I Mask;
inline I to_bf16_bits(I x);  // simd_math.h

inline V set1(float x) { return V{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
inline V zero() { return set1(0.f); }
inline V fma(V a, V b, V c) { return a * b + c; }
inline V add(V a, V b) { return a + b; }
inline V sub(V a, V b) { return a - b; }
inline V mul(V a, V b) { return a * b; }
inline V div(V a, V b) { return a / b; }
inline V vmax(V a, V b) { return a > b ? a : b; }  // b where either is NaN
inline V vmin(V a, V b) { return a < b ? a : b; }

inline I bits(V a) { return reinterpret_cast<I>(a); }
inline V from_bits(I a) { return reinterpret_cast<V>(a); }
inline I iset1(int32_t x) { return I{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
typedef uint32_t U __attribute__((vector_size(64)));
inline I iadd(I a, I b) { return reinterpret_cast<I>(reinterpret_cast<U>(a) + reinterpret_cast<U>(b)); }
inline I isub(I a, I b) { return reinterpret_cast<I>(reinterpret_cast<U>(a) - reinterpret_cast<U>(b)); }
inline I iand(I a, I b) { return a & b; }
inline I ior(I a, I b) { return a | b; }
template <int n>
inline I shl(I a) { return reinterpret_cast<I>(reinterpret_cast<U>(a) << n); }
template <int n>
inline I shr(I a) { return reinterpret_cast<I>(reinterpret_cast<U>(a) >> n); }
template <int n>
inline I sar(I a) { return a >> n; }
inline Mask less(V a, V b) { return a < b; }
inline Mask is_nan(V a) { return a != a; }
inline Mask below(int n) { return I{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} < iset1(n); }
inline Mask mask_and(Mask a, Mask b) { return a & b; }
inline Mask mask_not(Mask a) { return ~a; }
inline bool any(Mask m) {
  int32_t r = 0;
  for (int i = 0; i < 16; i++) r |= m[i];
  return r != 0;
}
inline V select(Mask m, V a, V b) { return from_bits((bits(a) & m) | (bits(b) & ~m)); }
inline I select(Mask m, I a, I b) { return (a & m) | (b & ~m); }

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
  for (int i = 0; i < n; i++) p[i] = a[i];
}

typedef uint16_t H __attribute__((vector_size(32)));
inline V load(const bf16* p) {
  H h;
  __builtin_memcpy(&h, p, 32);
  return reinterpret_cast<V>(__builtin_convertvector(h, U) << 16);
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
  const I b = to_bf16_bits(bits(a));
  for (int i = 0; i < n; i++) p[i].bits = static_cast<uint16_t>(b[i]);
}
inline void store(bf16* p, V a) {
  const H h = __builtin_convertvector(reinterpret_cast<U>(to_bf16_bits(bits(a))), H);
  __builtin_memcpy(p, &h, 32);
}

inline I load_bytes(const uint8_t* p, int n) {
  int32_t t[16] = {};
  for (int i = 0; i < n; i++) t[i] = p[i];
  I r;
  __builtin_memcpy(&r, t, 64);
  return r;
}
inline void store_bytes(uint8_t* p, I a, int n) {
  for (int i = 0; i < n; i++) p[i] = static_cast<uint8_t>(a[i]);
}

inline float reduce_add(V a) {
  float h[8], q[4];
  for (int i = 0; i < 8; i++) h[i] = a[i] + a[i + 8];
  for (int i = 0; i < 4; i++) q[i] = h[i] + h[i + 4];
  return (q[0] + q[2]) + (q[1] + q[3]);
}
inline V reduce16(const V* a) {  // reduce_add of sixteen vectors
  float t[16];
  for (int i = 0; i < 16; i++) t[i] = reduce_add(a[i]);
  return load(t);
}
inline float reduce_max(V a) {
  float m = a[0];
  for (int i = 1; i < 16; i++) m = m > a[i] ? m : a[i];
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
inline V decode(I codes, V) {
  const U c = reinterpret_cast<U>(codes) >> shift, m = c & 7u;
  const U normal = (m << 22) + 0x3f000000u, small = (0u - m) & 0x3f000000u;  // codes 0 and 1: 0 and 0.5
  const U is_small = reinterpret_cast<U>(m < 2u);
  return reinterpret_cast<V>((small & is_small) | (normal & ~is_small) | (c << 28 & 0x80000000u));
}
// Non-negative E4M3 block scales of 16 rows, times 2^-8.
inline V load_scales(const uint8_t* p) {
  const I m = load_bytes(p, 16);
  const V small = __builtin_convertvector(m, V) * set1(0x1p-17f);
  return select(m < 8, small, from_bits((m << 20) + (112 << 23)));
}

inline void transpose16(V r[16]) {
  float t[16][16];
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) t[j][i] = r[i][j];
  for (int i = 0; i < 16; i++) r[i] = load(t[i]);
}
