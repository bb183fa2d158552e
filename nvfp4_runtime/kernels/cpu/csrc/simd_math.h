// What every ISA builds from its sixteen lanes: rounding to storage types, E2M1 thresholds, exp. Lane position never matters.

inline I to_bf16_bits(I x) {  // nearest even; a NaN stays a (quiet) NaN
  const I rounded = shr<16>(iadd(x, iadd(iset1(0x7fff), iand(shr<16>(x), iset1(1)))));
  return select(is_nan(from_bits(x)), ior(shr<16>(x), iset1(0x40)), rounded);
}

inline V vabs(V x) { return from_bits(iand(bits(x), iset1(0x7fffffff))); }
inline I sign_of(V x) { return iand(bits(x), iset1(static_cast<int32_t>(0x80000000u))); }
// Small non-negative integers to float, by the mantissa of 2^23.
inline V small_to_float(I x) { return sub(from_bits(ior(x, iset1(0x4b000000))), set1(8388608.f)); }

inline V from_e4m3(I byte) {
  const I m = iand(byte, iset1(0x7f));
  const V as_float = small_to_float(m);
  const V normal = from_bits(iadd(shl<20>(m), iset1(120 << 23)));
  V r = select(less(as_float, set1(8.f)), mul(as_float, set1(0x1p-9f)), normal);
  r = select(less(set1(126.f), as_float), from_bits(iset1(0x7fc00000)), r);
  return from_bits(ior(bits(r), shl<24>(iand(byte, iset1(0x80)))));
}
inline I to_e4m3(V x) {  // nearest even, saturating at 448; NaN stays NaN
  const V a = vmin(set1(448.f), vabs(x));
  const I b = bits(a);
  const I normal = isub(shr<20>(iadd(b, iadd(iset1(0x7ffff), iand(shr<20>(b), iset1(1))))), iset1(120 << 3));
  const I subnormal = isub(bits(add(a, set1(16384.f))), iset1(0x46800000));  // 2^14 has steps of 2^-9
  I r = select(less(a, set1(0x1p-6f)), subnormal, normal);
  r = select(is_nan(x), iset1(0x7f), r);
  return ior(r, shr<24>(sign_of(x)));
}
inline V load(const e4m3* p, int n) { return from_e4m3(load_bytes(&p->bits, n)); }
inline V load(const e4m3* p) { return load(p, 16); }
inline void store(e4m3* p, V x, int n) { store_bytes(&p->bits, to_e4m3(x), n); }
inline void store(e4m3* p, V x) { store(p, x, 16); }

// Boundaries of E2M1 rounding: where a tie goes down, the boundary is the next float above the midpoint.
constexpr float kE2M1Boundaries[7] = {0x1.000002p-2f, .75f, 0x1.400002p0f, 1.75f, 0x1.400002p1f, 3.5f, 0x1.400002p2f};
constexpr float kE2M1Steps[7] = {.5f, .5f, .5f, .5f, 1.f, 1.f, 2.f};
inline V round_e2m1(V y) {  // the value; NaN becomes 6
  const V a = vabs(y);
  V r = zero();
  for (int i = 0; i < 7; i++) r = add(r, select(less(a, set1(kE2M1Boundaries[i])), zero(), set1(kE2M1Steps[i])));
  return from_bits(ior(bits(r), sign_of(y)));
}
inline I encode_e2m1(V y) {
  const V a = vabs(y);
  I r = iset1(0);
  for (int i = 0; i < 7; i++) r = iadd(r, select(less(a, set1(kE2M1Boundaries[i])), iset1(0), iset1(1)));
  return ior(r, shr<28>(sign_of(y)));
}

// e^x by x = n ln 2 + r, |r| <= ln 2 / 2, and the Taylor series to r^7 (truncation 5e-9 relative).
inline V vexp(V x) {
  x = vmax(set1(-104.f), vmin(set1(89.f), x));  // beyond: 0 and infinity come out by themselves; NaN passes
  const V magic = set1(12582912.f);             // 1.5 * 2^23: adding it rounds to an integer
  const V t = fma(x, set1(1.44269504f), magic), n = sub(t, magic);
  V r = fma(n, set1(-0.693359375f), x);  // 9 bits: n * this is exact
  r = fma(n, set1(2.12194440e-4f), r);
  V p = set1(1.f / 5040);
  p = fma(p, r, set1(1.f / 720));
  p = fma(p, r, set1(1.f / 120));
  p = fma(p, r, set1(1.f / 24));
  p = fma(p, r, set1(1.f / 6));
  p = fma(p, r, set1(.5f));
  p = fma(p, r, set1(1.f));
  p = fma(p, r, set1(1.f));
#if defined(__AVX512F__)
  return {_mm512_scalef_ps(p.v, n.v)};
#else
  const I e = isub(bits(t), bits(magic)), half = sar<1>(e), bias = iset1(127);
  p = mul(p, from_bits(shl<23>(iadd(half, bias))));
  return mul(p, from_bits(shl<23>(iadd(isub(e, half), bias))));
#endif
}
