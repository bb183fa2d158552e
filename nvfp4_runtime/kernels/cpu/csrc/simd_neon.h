// Sixteen lanes as four NEON registers: what every 64-bit ARM has (armv8-a), and its byte dot products where the compiler
// may use them (the dotprod variant). No FP16 arithmetic.
// Trees and fused operations are those of simd_avx2.h, so both give the same bits (the payload of a NaN aside).
struct V {
  float32x4_t q[4];
};
struct I {
  int32x4_t q[4];
};
struct Mask {
  uint32x4_t q[4];
};
inline I to_bf16_bits(I x);  // simd_math.h

// r = f of the four quarters; T names the result's type.
#define NVFP4_QUARTERS(T, expression)                      \
  T r;                                                     \
  UNROLL for (int i = 0; i < 4; i++) r.q[i] = expression; \
  return r

inline V set1(float x) { NVFP4_QUARTERS(V, vdupq_n_f32(x)); }
inline V zero() { return set1(0.f); }
inline V fma(V a, V b, V c) { NVFP4_QUARTERS(V, vfmaq_f32(c.q[i], a.q[i], b.q[i])); }
inline V add(V a, V b) { NVFP4_QUARTERS(V, vaddq_f32(a.q[i], b.q[i])); }
inline V sub(V a, V b) { NVFP4_QUARTERS(V, vsubq_f32(a.q[i], b.q[i])); }
inline V mul(V a, V b) { NVFP4_QUARTERS(V, vmulq_f32(a.q[i], b.q[i])); }
inline V div(V a, V b) { NVFP4_QUARTERS(V, vdivq_f32(a.q[i], b.q[i])); }

inline I bits(V a) { NVFP4_QUARTERS(I, vreinterpretq_s32_f32(a.q[i])); }
inline V from_bits(I a) { NVFP4_QUARTERS(V, vreinterpretq_f32_s32(a.q[i])); }
inline I iset1(int32_t x) { NVFP4_QUARTERS(I, vdupq_n_s32(x)); }
inline I iadd(I a, I b) { NVFP4_QUARTERS(I, vaddq_s32(a.q[i], b.q[i])); }
inline I isub(I a, I b) { NVFP4_QUARTERS(I, vsubq_s32(a.q[i], b.q[i])); }
inline I iand(I a, I b) { NVFP4_QUARTERS(I, vandq_s32(a.q[i], b.q[i])); }
inline I ior(I a, I b) { NVFP4_QUARTERS(I, vorrq_s32(a.q[i], b.q[i])); }
template <int n>
inline I shl(I a) {
  NVFP4_QUARTERS(I, vshlq_n_s32(a.q[i], n));
}
template <int n>
inline I shr(I a) {
  NVFP4_QUARTERS(I, vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a.q[i]), n)));
}
template <int n>
inline I sar(I a) {
  NVFP4_QUARTERS(I, vshrq_n_s32(a.q[i], n));
}
inline Mask less(V a, V b) { NVFP4_QUARTERS(Mask, vcltq_f32(a.q[i], b.q[i])); }
inline Mask is_nan(V a) { NVFP4_QUARTERS(Mask, vmvnq_u32(vceqq_f32(a.q[i], a.q[i]))); }
inline Mask below(int n) {
  const int32_t first[4] = {0, 1, 2, 3};
  const int32x4_t lane = vld1q_s32(first);
  NVFP4_QUARTERS(Mask, vcgtq_s32(vdupq_n_s32(n), vaddq_s32(lane, vdupq_n_s32(4 * i))));
}
inline Mask mask_and(Mask a, Mask b) { NVFP4_QUARTERS(Mask, vandq_u32(a.q[i], b.q[i])); }
inline Mask mask_not(Mask a) { NVFP4_QUARTERS(Mask, vmvnq_u32(a.q[i])); }
inline bool any(Mask m) { return vmaxvq_u32(vorrq_u32(vorrq_u32(m.q[0], m.q[1]), vorrq_u32(m.q[2], m.q[3]))) != 0; }
inline V select(Mask m, V a, V b) { NVFP4_QUARTERS(V, vbslq_f32(m.q[i], a.q[i], b.q[i])); }
inline I select(Mask m, I a, I b) { NVFP4_QUARTERS(I, vbslq_s32(m.q[i], a.q[i], b.q[i])); }
inline V vmax(V a, V b) { return select(less(b, a), a, b); }  // b where either is NaN: vmaxq_f32 would give the NaN
inline V vmin(V a, V b) { return select(less(a, b), a, b); }

inline V load(const float* p) { NVFP4_QUARTERS(V, vld1q_f32(p + 4 * i)); }
inline void store(float* p, V a) { UNROLL for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, a.q[i]); }
inline void store(float* p, V a, int n) {
  float t[16];
  store(t, a);
  for (int i = 0; i < n; i++) p[i] = t[i];
}
inline V load(const bf16* p) {
  const uint16_t* u = &p->bits;
  NVFP4_QUARTERS(V, vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vld1_u16(u + 4 * i)), 16)));
}
inline V load(const fp16* p) {
  const uint16_t* u = &p->bits;
  NVFP4_QUARTERS(V, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(u + 4 * i))));
}
template <class T>
inline V load_tail(const T* p, int n) {  // no masked loads here: nothing beyond n may be touched
  T t[16] = {};
  for (int i = 0; i < n; i++) t[i] = p[i];
  return load(t);
}
inline V load(const float* p, int n) { return load_tail(p, n); }
inline V load(const bf16* p, int n) { return load_tail(p, n); }
inline V load(const fp16* p, int n) { return load_tail(p, n); }

inline uint16x4_t narrow(int32x4_t x) { return vmovn_u32(vreinterpretq_u32_s32(x)); }  // the low half of each lane
inline void store(bf16* p, V a) {
  const I rounded = to_bf16_bits(bits(a));
  UNROLL for (int i = 0; i < 4; i++) vst1_u16(&p->bits + 4 * i, narrow(rounded.q[i]));
}
inline void store(bf16* p, V a, int n) {
  bf16 t[16];
  store(t, a);
  for (int i = 0; i < n; i++) p[i] = t[i];
}

inline I widen_bytes(uint8x16_t b) {
  const uint16x8_t h[2] = {vmovl_u8(vget_low_u8(b)), vmovl_high_u8(b)};
  I r;
  UNROLL for (int i = 0; i < 2; i++) {
    r.q[2 * i] = vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(h[i])));
    r.q[2 * i + 1] = vreinterpretq_s32_u32(vmovl_high_u16(h[i]));
  }
  return r;
}
inline I load_bytes(const uint8_t* p, int n) {
  if (n >= 16) return widen_bytes(vld1q_u8(p));
  uint8_t t[16] = {};
  for (int i = 0; i < n; i++) t[i] = p[i];
  return widen_bytes(vld1q_u8(t));
}
inline void store_bytes(uint8_t* p, I x, int n) {
  uint8_t t[16];
  for (int i = 0; i < 2; i++) vst1_u8(t + 8 * i, vmovn_u16(vcombine_u16(narrow(x.q[2 * i]), narrow(x.q[2 * i + 1]))));
  for (int i = 0; i < n; i++) p[i] = t[i];
}

inline float reduce_add(V a) {
  const float32x4_t q = vaddq_f32(vaddq_f32(a.q[0], a.q[2]), vaddq_f32(a.q[1], a.q[3]));
  const float32x2_t h = vadd_f32(vget_low_f32(q), vget_high_f32(q));
  return vget_lane_f32(h, 0) + vget_lane_f32(h, 1);
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

// Codes: one 32-bit lane per row holds 8 codes. The two high bytes of a code's float come from a table of 32 bytes: the
// index bytes of a lane are code, 16 + code, and two beyond the table, for which the look-up gives 0.
inline I load_codes(const uint8_t* p) { NVFP4_QUARTERS(I, vreinterpretq_s32_u8(vld1q_u8(p + 16 * i))); }
inline V e2m1_table() {
  static const uint8_t bytes[32] = {0x00, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40, 0x80, 0xbf, 0xbf,
                                    0xbf, 0xc0, 0xc0, 0xc0, 0xc0, 0x00, 0x00, 0x80, 0xc0, 0x00, 0x40,
                                    0x80, 0xc0, 0x00, 0x00, 0x80, 0xc0, 0x00, 0x40, 0x80, 0xc0};
  V r = zero();
  UNROLL for (int i = 0; i < 2; i++) r.q[i] = vreinterpretq_f32_u8(vld1q_u8(bytes + 16 * i));
  return r;
}
template <int shift>
inline uint32x4_t code_at(int32x4_t lanes) {
  const uint32x4_t c = vreinterpretq_u32_s32(lanes);
  if constexpr (shift == 0) return vandq_u32(c, vdupq_n_u32(15));
  else return vandq_u32(vshrq_n_u32(c, shift), vdupq_n_u32(15));
}
template <int shift>
inline V decode(I codes, V table) {
  const uint8x16x2_t t = {{vreinterpretq_u8_f32(table.q[0]), vreinterpretq_u8_f32(table.q[1])}};
  const uint32x4_t spread = vdupq_n_u32(0x01010000u), base = vdupq_n_u32(0x0010ffffu);
  NVFP4_QUARTERS(V, vreinterpretq_f32_u8(vqtbl2q_u8(
                        t, vreinterpretq_u8_u32(vmlaq_u32(base, code_at<shift>(codes.q[i]), spread)))));
}
// Non-negative E4M3 block scales of 16 rows, times 2^-8: the byte, shifted into an FP16's place, is that value.
inline V load_scales(const uint8_t* p) {
  const uint8x16_t b = vld1q_u8(p);
  const uint16x8_t h[2] = {vshll_n_u8(vget_low_u8(b), 7), vshll_high_n_u8(b, 7)};
  V r;
  UNROLL for (int i = 0; i < 2; i++) {
    r.q[2 * i] = vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(h[i])));
    r.q[2 * i + 1] = vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(h[i])));
  }
  return r;
}

inline V load_e8m0(const uint8_t* p) {  // 2^(byte - 127); byte 0 is the subnormal 2^-127
  const I b = load_bytes(p, 16);
  NVFP4_QUARTERS(V, vreinterpretq_f32_s32(vmaxq_s32(vshlq_n_s32(b.q[i], 23), vdupq_n_s32(0x00400000))));
}

// Codes as bytes 2 * value + 12: 0 .. 24, so signed products do.
struct Bytes {
  int8x16_t q[4];
};
inline Bytes code_table() {
  static const int8_t bytes[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
  const int8x16_t t = vld1q_s8(bytes);
  NVFP4_QUARTERS(Bytes, t);
}
inline Bytes low_codes(I codes, Bytes table) {
  NVFP4_QUARTERS(Bytes, vqtbl1q_s8(table.q[i], vandq_u8(vreinterpretq_u8_s32(codes.q[i]), vdupq_n_u8(15))));
}
inline Bytes high_codes(I codes, Bytes table) {
  NVFP4_QUARTERS(Bytes, vqtbl1q_s8(table.q[i], vshrq_n_u8(vreinterpretq_u8_s32(codes.q[i]), 4)));
}
// Four products of bytes, added to each 32-bit lane. Two products stay below 2 * 24 * 128 = 6144, so the 16-bit step of
// the form without the dot-product extension does not overflow.
inline int32x4_t dot4(int32x4_t acc, int8x16_t w, int8x16_t x) {
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_s32(acc, w, x);
#else
  const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x)), high = vmull_high_s8(w, x);
  return vpadalq_s16(acc, vpaddq_s16(low, high));
#endif
}
inline I dot(I acc, Bytes w, I x) { NVFP4_QUARTERS(I, dot4(acc.q[i], w.q[i], vreinterpretq_s8_s32(x.q[i]))); }
inline V to_float(I x) { NVFP4_QUARTERS(V, vcvtq_f32_s32(x.q[i])); }
inline I to_int(V x) { NVFP4_QUARTERS(I, vcvtnq_s32_f32(x.q[i])); }  // nearest even

inline float32x4_t low_pairs(float32x4_t a, float32x4_t b) {
  return vreinterpretq_f32_f64(vtrn1q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
}
inline float32x4_t high_pairs(float32x4_t a, float32x4_t b) {
  return vreinterpretq_f32_f64(vtrn2q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
}
inline void transpose16(V r[16]) {
  V t[16];
  UNROLL for (int i = 0; i < 4; i++)    // rows 4 i .. 4 i + 3
    UNROLL for (int j = 0; j < 4; j++) {  // columns 4 j .. 4 j + 3
      const float32x4_t a = vtrn1q_f32(r[4 * i].q[j], r[4 * i + 1].q[j]), b = vtrn2q_f32(r[4 * i].q[j], r[4 * i + 1].q[j]);
      const float32x4_t c = vtrn1q_f32(r[4 * i + 2].q[j], r[4 * i + 3].q[j]), d = vtrn2q_f32(r[4 * i + 2].q[j], r[4 * i + 3].q[j]);
      t[4 * j].q[i] = low_pairs(a, c);
      t[4 * j + 1].q[i] = low_pairs(b, d);
      t[4 * j + 2].q[i] = high_pairs(a, c);
      t[4 * j + 3].q[i] = high_pairs(b, d);
    }
  UNROLL for (int i = 0; i < 16; i++) r[i] = t[i];
}

// E4M3 weights, 64 at a time, in order: the byte, moved into an FP16's place, is 2^-8 of the value. NaN codes are
// refused at load.
inline float32x4_t fp8_quarter(int16x4_t words) {
  const uint16x4_t h = vand_u16(vreinterpret_u16_s16(words), vdup_n_u16(0xbfff));  // the sign lies in two bits
  return vmulq_f32(vcvt_f32_f16(vreinterpret_f16_u16(h)), vdupq_n_f32(256.f));
}
inline void decode_fp8(const e4m3* p, int n, V* out) {
  e4m3 t[64];
  if (n < 64) {
    __builtin_memset(t, 0, 64);
    __builtin_memcpy(t, p, static_cast<size_t>(n));
    p = t;
  }
  for (int i = 0; i < 4; i++) {
    const int8x16_t b = vreinterpretq_s8_u8(vld1q_u8(&p->bits + 16 * i));
    const int16x8_t low = vshll_n_s8(vget_low_s8(b), 7), high = vshll_high_n_s8(b, 7);
    out[i].q[0] = fp8_quarter(vget_low_s16(low));
    out[i].q[1] = fp8_quarter(vget_high_s16(low));
    out[i].q[2] = fp8_quarter(vget_low_s16(high));
    out[i].q[3] = fp8_quarter(vget_high_s16(high));
  }
}
inline int fp8_place(int i) { return i; }
#undef NVFP4_QUARTERS
