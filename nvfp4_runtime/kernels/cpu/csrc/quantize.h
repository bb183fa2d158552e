// Weights quantised at load: E4M3 under a scale per row, or NVFP4 under one tensor scale. Bit for bit what nvfp4/fp8.py and
// nvfp4/codec.py define: the same FP32 operations in the same order.

template <class T>
float row_amax(const T* w, int k) {
  V most = zero();
  bool finite = true;
  for (int i = 0; i < k; i += 16) {
    const V a = vabs(load_upto(w + i, k - i));
    finite = finite && !any(is_nan(sub(a, a)));  // infinity - infinity is NaN as well
    most = vmax(most, a);
  }
  return finite ? reduce_max(most) : __builtin_nanf("");
}

// encode_e2m1 of values that are not NaN, by rounding in place: below 1 to steps of 0.5, above to one bit of mantissa.
inline I encode_finite_e2m1(V y) {
  const V a = vmin(vabs(y), set1(6.f));
  const I b = bits(a);
  const I normal = isub(shr<22>(iadd(b, iadd(iset1(0x1fffff), iand(shr<22>(b), iset1(1))))), iset1(126 << 1));
  const I small = isub(bits(add(a, set1(0x1p22f))), iset1(0x4a800000));  // 2^22 has steps of 0.5
  return ior(select(less(a, set1(1.f)), small, normal), shr<28>(sign_of(y)));
}

// Sixteen codes, a byte each, to eight bytes, even ones in the low nibbles.
inline void store_nibbles(uint8_t* to, I codes) {
  uint8_t bytes[16];
  store_bytes(bytes, codes, 16);
  for (int half = 0; half < 2; half++) {
    uint64_t t;
    __builtin_memcpy(&t, bytes + 8 * half, 8);
    t = (t | t >> 4) & 0x00ff00ff00ff00ffull;
    t = (t | t >> 8) & 0x0000ffff0000ffffull;
    const uint32_t four = static_cast<uint32_t>(t | t >> 16);
    __builtin_memcpy(to + 4 * half, &four, 4);
  }
}

template <class T>
void quantize_row(const QuantizeWeight& a, int row) {
  const T* w = static_cast<const T*>(a.w) + static_cast<size_t>(row) * a.k;
  if (!a.codes) {
    a.row_amax[row] = row_amax(w, a.k);
    return;
  }
  if (!a.block_scales) {
    const float amax = row_amax(w, a.k), wanted = amax / 448.f;
    a.row_amax[row] = amax;
    const V scale = set1(wanted == 0.f ? 1.f : wanted);
    uint8_t* codes = a.codes + static_cast<size_t>(row) * a.k;
    for (int i = 0; i < a.k; i += 16) {
      const int left = a.k - i < 16 ? a.k - i : 16;
      store_bytes(codes + i, to_e4m3(div(load_upto(w + i, left), scale)), left);
    }
    return;
  }
  const float six = 6.f * a.scale_2;
  for (int g = 0; g < a.k / kGroup; g++) {
    const V x = load(w + g * kGroup);
    float scale = reduce_max(vabs(x)) / six;
    if (scale == 0.f || a.scale_2 == 0.f) scale = 1.f;
    I bits = to_e4m3(set1(scale < 0x1p-9f ? 0x1p-9f : scale));
    if (a.method != BlockScales::max) bits = better_scale(x, bits, a, a.importance ? a.importance + g * kGroup : nullptr);
    const V step = mul(from_e4m3(bits), set1(a.scale_2));
    float one[16];
    store(one, step);
    const I codes = encode_finite_e2m1(one[0] == 0.f ? mul(x, zero()) : div(x, step));
    const size_t block = static_cast<size_t>(row) * (a.k / kGroup) + g;
    store_bytes(a.block_scales + block, bits, 1);
    store_nibbles(a.codes + 8 * block, codes);
  }
}

void quantize_weight(const QuantizeWeight& a, int begin, int end) {
  for (int r = begin; r < end; r++) switch (a.type) {
      case Type::bf16: quantize_row<bf16>(a, r); break;
      case Type::fp16: quantize_row<fp16>(a, r); break;
      default: quantize_row<float>(a, r); break;
    }
}
