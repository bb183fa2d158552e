// Rotary embedding, per-head QK-norm before it, and the write of keys and values into the paged cache.

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
    const int left = half - i;
    const V c = load_upto(cos + i, left), s = load_upto(sin + i, left);
    const V x1 = load_upto(buffer + i, left), x2 = load_upto(buffer + half + i, left);
    store_upto(buffer + i, sub(mul(x1, c), mul(x2, s)), left);
    store_upto(buffer + half + i, add(mul(x2, c), mul(x1, s)), left);
  }
}

inline V divided(V v, float scale) { return scale == 1.f ? v : div(v, set1(scale)); }

// One vector of a head, in the cache's type.
template <class C>
inline void store_head(const Rope& a, const float* from, size_t slot, void* cache, uint8_t*, float scale) {
  C* to = static_cast<C*>(cache) + slot * a.head_dim;
  for (int i = 0; i < a.head_dim; i += 16) store_upto(to + i, divided(load_upto(from + i, a.head_dim - i), scale), a.head_dim - i);
}
template <>
inline void store_head<e2m1x2>(const Rope& a, const float* from, size_t slot, void* cache, uint8_t* blocks, float scale) {
  const float global_scale = 1.0f / scale, inverse_global = 1.0f / global_scale;
  uint8_t* to = static_cast<uint8_t*>(cache) + slot * (a.head_dim / 2);
  for (int g = 0; g < a.head_dim / 16; g++, to += 8) {
    const BlockScale block = quantize_group(load(from + 16 * g), global_scale, inverse_global);
    uint8_t codes[16];
    store_bytes(codes, block.codes, 16);
    for (int i = 0; i < 8; i++) to[i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
    store_bytes(blocks + slot * (a.head_dim / 16) + g, block.scale_bits, 1);
  }
}

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
      const size_t slot = static_cast<size_t>((block * a.kv_heads + h) * a.block_size + offset);
      rotate_head(a, x, a.k_norm, cos, sin, buffer);
      store_head<C>(a, buffer, slot, a.k, a.k_blocks, a.k_scale);
      const T* value = x + static_cast<size_t>(a.kv_heads) * d;
      for (int i = 0; i < d; i += 16) store(buffer + i, load_upto(value + i, d - i));
      store_head<C>(a, buffer, slot, a.v, a.v_blocks, a.v_scale);
    }
  }
}
template <class T>
void rope_from(const Rope& a, int begin, int end) {
  switch (a.kv_type) {
    case Type::bf16: rope_as<T, bf16>(a, begin, end); break;
    case Type::e4m3: rope_as<T, e4m3>(a, begin, end); break;
    case Type::nvfp4: rope_as<T, e2m1x2>(a, begin, end); break;
    default: rope_as<T, float>(a, begin, end); break;
  }
}
void rope(const Rope& a, int begin, int end) {
  a.type == Type::bf16 ? rope_from<bf16>(a, begin, end) : rope_from<float>(a, begin, end);
}
