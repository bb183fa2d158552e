// Ops whose rows are tokens: RMSNorm, SiLU-multiply, rotary embedding with the write into the paged cache.

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

template <class T, class O>
void silu_mul_as(const SiluMul& a, int begin, int end) {
  for (int t = begin; t < end; t++) {
    const T* gate = static_cast<const T*>(a.x) + static_cast<size_t>(t) * 2 * a.width;
    O* out = static_cast<O*>(a.out) + static_cast<size_t>(t) * a.width;
    for (int i = 0; i < a.width; i += 16) {
      const int left = a.width - i;
      const V g = load_upto(gate + i, left), up = load_upto(gate + a.width + i, left);
      const V e = vexp(sub(zero(), g));
      store_upto(out + i, mul(div(g, add(set1(1.f), e)), up), left);
    }
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

// One head into `buffer` (FP32), normalised and rotated.
template <class T>
void rotate_head(const Rope& a, const T* x, const void* norm, const float* cos, const float* sin, float* buffer) {
  const int d = a.head_dim, half = a.rotary_dim / 2;
  V squares = zero();
  for (int i = 0; i < d; i += 16) {
    const V v = load_upto(x + i, d - i);
    squares = fma(v, v, squares);
    store(buffer + i, v);
  }
  if (norm) {
    const V scale = set1(inverse_rms(squares, d, a.eps));
    for (int i = 0; i < d; i += 16)
      store(buffer + i, mul(load_weight(norm, a.norm_type, i, d - i), mul(load(buffer + i), scale)));
  }
  for (int i = 0; i < half; i += 16) {
    const int n = half - i < 16 ? half - i : 16;
    const V c = load(cos + i, n), s = load(sin + i, n);
    const V x1 = load(buffer + i, n), x2 = load(buffer + half + i, n);
    store(buffer + i, sub(mul(x1, c), mul(x2, s)), n);
    store(buffer + half + i, add(mul(x2, c), mul(x1, s)), n);
  }
}

inline V divided(V v, float scale) { return scale == 1.f ? v : div(v, set1(scale)); }

template <class T, class C>
void rope_as(const Rope& a, int begin, int end) {
  float buffer[kMaxHeadDim + 16];
  const int d = a.head_dim, half = a.rotary_dim / 2;
  for (int t = begin; t < end; t++) {
    const T* x = static_cast<const T*>(a.qkv) + static_cast<size_t>(t) * (a.heads + 2 * a.kv_heads) * d;
    const float* cos = a.cos + a.positions[t] * half;
    const float* sin = a.sin + a.positions[t] * half;
    T* q = static_cast<T*>(a.q_out) + static_cast<size_t>(t) * a.heads * d;
    for (int h = 0; h < a.heads; h++, x += d, q += d) {
      rotate_head(a, x, a.q_norm, cos, sin, buffer);
      for (int i = 0; i < d; i += 16) store_upto(q + i, load(buffer + i), d - i);
    }
    const int64_t block = a.slots[t] / a.block_size, offset = a.slots[t] % a.block_size;
    for (int h = 0; h < a.kv_heads; h++, x += d) {
      const size_t to = static_cast<size_t>((block * a.kv_heads + h) * a.block_size + offset) * d;
      C* k = static_cast<C*>(a.k) + to;
      C* v = static_cast<C*>(a.v) + to;
      const T* value = x + static_cast<size_t>(a.kv_heads) * d;
      rotate_head(a, x, a.k_norm, cos, sin, buffer);
      for (int i = 0; i < d; i += 16) {
        store_upto(k + i, divided(load(buffer + i), a.k_scale), d - i);
        store_upto(v + i, divided(load_upto(value + i, d - i), a.v_scale), d - i);
      }
    }
  }
}
template <class T>
void rope_from(const Rope& a, int begin, int end) {
  switch (a.kv_type) {
    case Type::bf16: rope_as<T, bf16>(a, begin, end); break;
    case Type::e4m3: rope_as<T, e4m3>(a, begin, end); break;
    default: rope_as<T, float>(a, begin, end); break;
  }
}
void rope(const Rope& a, int begin, int end) {
  a.type == Type::bf16 ? rope_from<bf16>(a, begin, end) : rope_from<float>(a, begin, end);
}
