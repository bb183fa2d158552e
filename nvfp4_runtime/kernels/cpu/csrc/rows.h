// Ops whose rows are tokens: RMSNorm and SiLU-multiply.

template <class T>
inline V load_upto(const T* p, int left) {
  return left >= 16 ? load(p) : load(p, left);
}
template <class T>
inline void store_upto(T* p, V v, int left) {
  left >= 16 ? store(p, v) : store(p, v, left);
}
inline V load_weight(const void* w, Type type, int i, int left) {
  switch (type) {
    case Type::bf16: return load_upto(static_cast<const bf16*>(w) + i, left);
    case Type::fp16: return load_upto(static_cast<const fp16*>(w) + i, left);
    default: return load_upto(static_cast<const float*>(w) + i, left);
  }
}
inline float inverse_rms(V squares, int width, float eps) {
  return 1.0f / __builtin_sqrtf(reduce_add(squares) / static_cast<float>(width) + eps);
}

inline V as_stored(V v, const float*) { return v; }
inline V as_stored(V v, const bf16*) { return from_bits(shl<16>(to_bf16_bits(bits(v)))); }

template <class O>
void convert_to(const void* from, Type type, O* to, int count) {
  for (int i = 0; i < count; i += 16) store_upto(to + i, load_weight(from, type, i, count - i), count - i);
}
void convert(const void* from, Type type, void* to, Type to_type, int count) {
  to_type == Type::bf16 ? convert_to(from, type, static_cast<bf16*>(to), count)
                        : convert_to(from, type, static_cast<float*>(to), count);
}

template <class T, class O>
void rms_norm_as(const RMSNorm& a, int begin, int end) {
  for (int t = begin; t < end; t++) {
    const size_t row = static_cast<size_t>(t) * a.width;
    const T* x = static_cast<const T*>(a.x) + row;
    T* sum = a.residual ? static_cast<T*>(a.residual) + row : nullptr;
    V squares = zero();
    for (int i = 0; i < a.width; i += 16) {
      const int left = a.width - i;
      V v = load_upto(x + i, left);
      if (sum) {
        v = as_stored(add(v, load_upto(sum + i, left)), x);
        store_upto(sum + i, v, left);
      }
      squares = fma(v, v, squares);
    }
    const V scale = set1(inverse_rms(squares, a.width, a.eps));
    const T* from = sum ? sum : x;
    O* out = static_cast<O*>(a.out) + row;
    for (int i = 0; i < a.width; i += 16) {
      const int left = a.width - i;
      store_upto(out + i, mul(load_weight(a.weight, a.weight_type, i, left), mul(load_upto(from + i, left), scale)), left);
    }
  }
}
void rms_norm(const RMSNorm& a, int begin, int end) {
  const bool wide = a.out_type == Type::f32;
  if (a.type == Type::bf16)
    wide ? rms_norm_as<bf16, float>(a, begin, end) : rms_norm_as<bf16, bf16>(a, begin, end);
  else
    wide ? rms_norm_as<float, float>(a, begin, end) : rms_norm_as<float, bf16>(a, begin, end);
}

// x * sigmoid(z) is x / (1 + e^-z).
template <Gate gate>
inline V gated(const SiluMul& a, V g, V up) {
  V z = g;
  if constexpr (gate == Gate::gelu_tanh) {  // (1 + tanh u) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (g + 0.044715 g^3)
    z = mul(set1(1.5957691216057308f), fma(mul(mul(g, g), g), set1(0.044715f), g));
  } else if constexpr (gate == Gate::clamped) {  // the bounds first: a NaN passes
    g = vmin(set1(a.limit), g);
    z = mul(set1(a.alpha), g);
    up = add(vmax(set1(-a.limit), vmin(set1(a.limit), up)), set1(1.f));
  }
  return mul(div(g, add(set1(1.f), vexp(sub(zero(), z)))), up);
}

template <Gate gate, class T, class O>
void gated_as(const SiluMul& a, int begin, int end) {
  for (int t = begin; t < end; t++) {
    const T* rows = static_cast<const T*>(a.x) + static_cast<size_t>(t) * 2 * a.width;
    O* out = static_cast<O*>(a.out) + static_cast<size_t>(t) * a.width;
    for (int i = 0; i < a.width; i += 16) {
      const int left = a.width - i;
      store_upto(out + i, gated<gate>(a, load_upto(rows + i, left), load_upto(rows + a.width + i, left)), left);
    }
  }
}
template <class T, class O>
void silu_mul_as(const SiluMul& a, int begin, int end) {
  switch (a.gate) {
    case Gate::gelu_tanh: return gated_as<Gate::gelu_tanh, T, O>(a, begin, end);
    case Gate::clamped: return gated_as<Gate::clamped, T, O>(a, begin, end);
    default: return gated_as<Gate::silu, T, O>(a, begin, end);
  }
}
void silu_mul(const SiluMul& a, int begin, int end) {
  const bool wide = a.out_type == Type::f32;
  if (a.type == Type::bf16)
    wide ? silu_mul_as<bf16, float>(a, begin, end) : silu_mul_as<bf16, bf16>(a, begin, end);
  else
    wide ? silu_mul_as<float, float>(a, begin, end) : silu_mul_as<float, bf16>(a, begin, end);
}

constexpr int kMaxHeadDim = 512;
