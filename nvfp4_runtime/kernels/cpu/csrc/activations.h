// Activations on their way into the NVFP4 kernel: what each Operand of types.h stores, 16 inputs of one row at a time.

inline float largest(V x) { return any(is_nan(x)) ? __builtin_nanf("") : reduce_max(vabs(x)); }

struct BlockScale {
  V quantised;  // values of the codes
  I codes;
  I scale_bits;
  float scale;
};

// One group of 16 by the recipe of codec.quantize_activation, operation for operation.
inline BlockScale quantize_group(V x, float global_scale, float inverse_global) {
  const float sixth = 1.0f / 6.0f;
  const float wanted = global_scale * (largest(x) * sixth);
  BlockScale r;
  r.scale_bits = to_e4m3(set1(wanted));
  float s[16];
  store(s, from_e4m3(r.scale_bits));
  r.scale = s[0];
  const float output_scale = r.scale == 0.f ? 0.f : 1.0f / (r.scale * inverse_global);
  const V y = mul(x, set1(output_scale));
  r.quantised = round_e2m1(y);
  r.codes = encode_e2m1(y);
  return r;
}

struct Integers {
  I values;
  float scale;
};

// The smallest float with four significant bits that is no smaller than x, which is normal or NaN.
inline float round_up_to_four_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if ((bits & 0x7f800000u) != 0x7f800000u) bits = (bits + 0xfffffu) & ~0xfffffu;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

// One group of W4A8 by the recipe of codec.quantize_int8: x = values * scale, |values| <= 127, scale of four significant bits.
// A block with NaN, infinity or 2^100 and more has a NaN scale, which makes its row NaN; one of at most 2^-100 is zero.
inline Integers to_int8(V x) {
  const float amax = largest(x);
  const bool sound = amax < 0x1p100f, zero_block = amax <= 0x1p-100f;
  Integers r;
  r.scale = !sound ? __builtin_nanf("") : zero_block ? 0.f : round_up_to_four_bits(amax / 127.f);
  r.values = to_int(mul(sound ? x : zero(), set1(sound && !zero_block ? 1.0f / r.scale : 0.f)));
  return r;
}

// One group as two digits: x = values * scale with |values| <= 32512. Blocks as above, but finite ones are all sound.
inline Integers to_digits(V x) {
  const float amax = largest(x);
  const bool finite = amax < __builtin_inff();
  const bool zero_block = amax <= 0x1p-100f;
  const V y = mul(x, set1(finite && !zero_block ? 32512.f / amax : 0.f));
  Integers r;
  r.values = to_int(select(is_nan(y), zero(), y));
  r.scale = !finite ? __builtin_nanf("") : zero_block ? 0.f : amax / 32512.f;
  return r;
}

// The four words of 16 signed bytes, word i at out[i * width].
inline void put_bytes(uint32_t* out, int width, I bytes) {
  if (width == 1) return store_bytes(reinterpret_cast<uint8_t*>(out), bytes, 16);
  uint32_t words[4];
  store_bytes(reinterpret_cast<uint8_t*>(words), bytes, 16);
  for (int i = 0; i < 4; i++) out[i * width] = words[i];
}
inline void put_digits(uint32_t* out, int width, I values) {
  const I high = sar<8>(iadd(values, iset1(128)));
  put_bytes(out, width, high);
  put_bytes(out + 4 * width, width, isub(values, shl<8>(high)));
}
inline void put_float(uint32_t* out, float x) { __builtin_memcpy(out, &x, 4); }

// The kernel's weights are 2 * code + 12 in unsigned bytes: what 12 adds is taken off again by starting at -12 * sum.
constexpr int kCodeOffset = 12;
inline uint32_t offset_of(float sum) { return static_cast<uint32_t>(-kCodeOffset * static_cast<int32_t>(sum)); }

// start and base of types.h, of a block scale with four significant bits, or zero, or NaN.
inline void put_scale(uint32_t* out, int width, float scale, float sum) {
  uint32_t bits, base = 0x7fc00000u;  // NaN
  __builtin_memcpy(&bits, &scale, 4);
  if (scale == 0.f) bits = 0x3f800000u;  // its bytes are zeros: any scale will do
  if (scale == scale) base = ((bits & 0x7f800000u) + (23u << 23)) | 0x400000u | (bits >> 20 & 7) << 3;
  out[0] = base + offset_of(sum);
  out[width] = base;
}

// One row's group as integers; `out` points at its column of the group's words.
template <Operand operand>
inline void put_integers(uint32_t* out, int width, V x, float global_scale, float inverse_global) {
  if constexpr (operand == Operand::digits) {
    const Integers b = to_digits(x);
    put_digits(out, width, b.values);
    out[8 * width] = offset_of(reduce_add(to_float(b.values)));
    put_float(out + 9 * width, b.scale * .5f);
    return;
  }
  I q;
  float scale;
  if constexpr (operand == Operand::nvfp4) {
    const BlockScale b = quantize_group(x, global_scale, inverse_global);
    q = to_int(add(b.quantised, b.quantised));
    scale = b.scale * .25f;  // both sides hold twice their E2M1 value
    if (scale != scale) q = iset1(0);  // the one NaN, whatever the codes and weights
  } else {
    const Integers b = to_int8(x);
    q = b.values;
    scale = b.scale * .5f;
  }
  put_bytes(out, width, q);
  put_scale(out + 4 * width, width, scale, reduce_add(to_float(q)));
}

// The scales put_integers takes for sixteen groups of one row, by the same operations with a group in each lane, and what
// multiplies the groups' values before they are rounded; false where a group needs put_integers itself, for NaN or values
// that are unsound.
template <Operand operand>
inline bool sixteen_scales(const V* x, float global_scale, float inverse_global, V* scale, V* inverse) {
  V t[16];
  UNROLL for (int g = 0; g < 16; g++) t[g] = vabs(x[g]);
  transpose16(t);
  V amax = t[0], sum = t[0];
  UNROLL for (int i = 1; i < 16; i++) {
    amax = vmax(amax, t[i]);
    sum = add(sum, t[i]);
  }
  if (any(is_nan(sum))) return false;
  const Mask nonzero = less(set1(0x1p-100f), amax);
  if constexpr (operand == Operand::nvfp4) {
    const V rounded = from_e4m3(to_e4m3(mul(set1(global_scale), mul(amax, set1(1.0f / 6.0f)))));
    *inverse = select(less(zero(), rounded), div(set1(1.f), mul(rounded, set1(inverse_global))), zero());
    *scale = mul(rounded, set1(.25f));
  } else if constexpr (operand == Operand::digits) {
    if (any(mask_not(less(amax, set1(__builtin_inff()))))) return false;
    *inverse = select(nonzero, div(set1(32512.f), amax), zero());
    *scale = select(nonzero, mul(div(amax, set1(32512.f)), set1(.5f)), zero());
  } else {
    if (any(mask_not(less(amax, set1(0x1p100f))))) return false;
    const I wanted = bits(div(select(nonzero, amax, set1(127.f)), set1(127.f)));
    const V rounded = from_bits(iand(iadd(wanted, iset1(0xfffff)), iset1(~0xfffff)));
    *inverse = select(nonzero, div(set1(1.f), rounded), zero());
    *scale = select(nonzero, mul(rounded, set1(.5f)), zero());
  }
  return true;
}

// Sixteen groups of one row at once; false where sixteen_scales says so. `stride` words lie between groups.
template <Operand operand>
inline bool put_sixteen(uint32_t* out, size_t stride, int width, const V* x, float global_scale, float inverse_global) {
  V scale, inverse, t[16];
  if (!sixteen_scales<operand>(x, global_scale, inverse_global, &scale, &inverse)) return false;
  float inverses[16];
  store(inverses, inverse);
  UNROLL for (int g = 0; g < 16; g++) {
    V y = mul(x[g], set1(inverses[g]));
    if constexpr (operand == Operand::nvfp4) {
      y = round_e2m1(y);
      y = add(y, y);
    }
    const I q = to_int(y);
    if constexpr (operand == Operand::digits)
      put_digits(out + g * stride, width, q);
    else
      put_bytes(out + g * stride, width, q);
    t[g] = to_float(q);
  }
  const I offset = to_int(mul(reduce16(t), set1(-kCodeOffset)));  // sums below 2^20 are exact
  float offsets[16], scales[16];
  if constexpr (operand == Operand::digits) {
    store(offsets, from_bits(offset));
    store(scales, scale);
  } else {
    const I bits_of = bits(select(less(zero(), scale), scale, set1(1.f)));
    const I base = ior(iadd(iand(bits_of, iset1(0x7f800000)), iset1((23 << 23) + 0x400000)),
                       shl<3>(iand(shr<20>(bits_of), iset1(7))));
    store(offsets, from_bits(iadd(base, offset)));
    store(scales, from_bits(base));
  }
  constexpr int after = operand == Operand::digits ? 8 : 4;
  for (int g = 0; g < 16; g++) {
    put_float(out + g * stride + after * width, offsets[g]);
    put_float(out + g * stride + (after + 1) * width, scales[g]);
  }
  return true;
}

template <class T, Operand operand>
void pack_integers(const PackX& a, const T* x, uint32_t* out, int rows, int width) {
  const float global_scale = 1.0f / a.input_scale, inverse_global = 1.0f / global_scale;
  constexpr int words = words_per_group(operand);
  const int groups = a.k / kGroup;
  const size_t stride = static_cast<size_t>(words) * width;
  for (int r = 0; r < rows; r++) {
    const T* row = x + static_cast<size_t>(r) * a.k;
    for (int g = 0; g < groups;) {
      if (groups - g >= 16) {
        V values[16];
        UNROLL for (int i = 0; i < 16; i++) values[i] = load(row + (g + i) * kGroup);
        if (put_sixteen<operand>(out + g * stride + r, stride, width, values, global_scale, inverse_global)) {
          g += 16;
          continue;
        }
      }
      put_integers<operand>(out + g * stride + r, width, load(row + g * kGroup), global_scale, inverse_global);
      g++;
    }
  }
  for (int g = 0; g < groups; g++)
    for (int i = 0; i < words; i++)
      for (int r = rows; r < width; r++) out[g * stride + i * width + r] = 0;
}

#if defined(__AVX512BF16__)
constexpr bool kPairs = true;
inline V as_pairs(V x) { return to_pairs(x); }
#else
constexpr bool kPairs = false;
inline V as_pairs(V x) { return x; }
#endif

// FP32 values or pairs of bfloat16: sixteen rows transposed at a time.
template <class T, Operand operand>
void pack_values(const PackX& a, const T* x, uint32_t* packed, int rows, int width) {
  constexpr int words = words_per_group(operand);
  float* out = reinterpret_cast<float*>(packed);
  for (int r0 = 0; r0 < width; r0 += 16) {
    const int n = width - r0 < 16 ? width - r0 : 16;
    for (int g = 0; g < a.k / kGroup; g++) {
      const auto row = [&](int i) {
        const V v = load(x + static_cast<size_t>(i) * a.k + g * kGroup);
        return operand == Operand::pairs ? as_pairs(v) : v;
      };
      float* o = out + static_cast<size_t>(g) * words * width + r0;
      if (width == 1) {
        store(o, row(0), words);
        continue;
      }
      V r[16];
      for (int i = 0; i < 16; i++) r[i] = r0 + i < rows ? row(r0 + i) : zero();
      transpose16(r);
      for (int i = 0; i < words; i++) store(o + static_cast<size_t>(i) * width, r[i], n);
    }
  }
}

template <class T>
void pack_block(const PackX& a, int block) {
  const int most = max_rows(a.operand), first = block * most, rows = a.m - first < most ? a.m - first : most;
  const int width = block_width(a.operand, rows);
  const T* x = static_cast<const T*>(a.x) + static_cast<size_t>(first) * a.k;
  uint32_t* out = a.packed + static_cast<size_t>(first) * (a.k / kGroup) * words_per_group(a.operand);
  switch (a.operand) {
    case Operand::pairs: pack_values<T, Operand::pairs>(a, x, out, rows, width); break;
    case Operand::digits: pack_integers<T, Operand::digits>(a, x, out, rows, width); break;
    case Operand::int8: pack_integers<T, Operand::int8>(a, x, out, rows, width); break;
    case Operand::nvfp4: pack_integers<T, Operand::nvfp4>(a, x, out, rows, width); break;
    default: pack_values<T, Operand::floats>(a, x, out, rows, width); break;
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
