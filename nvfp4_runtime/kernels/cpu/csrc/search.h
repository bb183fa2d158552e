// The search for a block's scale: the E4M3 code near `max`'s, or of two, that leaves the least squared error. Bit for bit
// what nvfp4/block_scales.py defines: the same FP32 operations in the same order, sums by halves of the block.

// The magnitude of round_e2m1 of values that are not NaN; see encode_finite_e2m1.
inline V magnitude_e2m1(V y) {
  const V a = vmin(vabs(y), set1(6.f));
  const I b = bits(a);
  const I kept = iadd(b, iadd(iset1(0x1fffff), iand(shr<22>(b), iset1(1))));
  const V normal = from_bits(iand(kept, iset1(~0x3fffff)));
  const V small = sub(add(a, set1(0x1p22f)), set1(0x1p22f));  // 2^22 has steps of 0.5
  return select(less(a, set1(1.f)), small, normal);
}

inline float block_error(V x, float step, const float* importance) {
  const V s = set1(step);
  const V value = magnitude_e2m1(step == 0.f ? mul(x, zero()) : div(x, s));
  const V d = sub(vabs(x), mul(value, s));
  V squares = mul(d, d);
  if (importance) squares = mul(squares, load(importance));
  return reduce_add(squares);
}

constexpr int kSearchFrom = -3, kSearchTo = 7;

// Every lane holds the code of the best candidate; `start` holds `max`'s. A tie keeps the earlier one.
inline I better_scale(V x, I start, const QuantizeWeight& a, const float* importance) {
  uint8_t codes[16];
  float steps[16];
  store_bytes(codes, start, 16);
  const int first = codes[0];
  int count = 1;
  if (a.method == BlockScales::mse) {
    for (int o = kSearchFrom; o <= kSearchTo; o++) {
      if (o == 0) continue;
      const int code = first + o;
      codes[count++] = static_cast<uint8_t>(code < 1 ? 1 : code > 126 ? 126 : code);
    }
  } else {
    float scale = reduce_max(vabs(x)) / (4.f * a.scale_2);
    if (scale == 0.f || a.scale_2 == 0.f) scale = 1.f;
    store_bytes(codes + count++, to_e4m3(set1(scale < 0x1p-9f ? 0x1p-9f : scale)), 1);
  }
  store(steps, mul(from_e4m3(load_bytes(codes, 16)), set1(a.scale_2)));
  int best = 0;
  float least = block_error(x, steps[0], importance);
  for (int i = 1; i < count; i++) {
    const float error = block_error(x, steps[i], importance);
    if (error < least) {
      least = error;
      best = i;
    }
  }
  return iset1(codes[best]);
}
