// Rows between the multiplications of mixtures, hybrids and latent attention.

template <class T, class O>
void relu_squared_as(const ReluSquared& a, int begin, int end) {
  for (int t = begin; t < end; t++) {
    const T* x = static_cast<const T*>(a.x) + static_cast<size_t>(t) * a.width;
    O* out = static_cast<O*>(a.out) + static_cast<size_t>(t) * a.width;
    for (int i = 0; i < a.width; i += 16) {
      const V v = as_stored(vmax(zero(), load_upto(x + i, a.width - i)), x);  // a NaN passes
      store_upto(out + i, as_stored(mul(v, v), x), a.width - i);
    }
  }
}
void relu_squared(const ReluSquared& a, int begin, int end) {
  const bool wide = a.out_type == Type::f32;
  if (a.type == Type::bf16)
    wide ? relu_squared_as<bf16, float>(a, begin, end) : relu_squared_as<bf16, bf16>(a, begin, end);
  else
    wide ? relu_squared_as<float, float>(a, begin, end) : relu_squared_as<float, bf16>(a, begin, end);
}

template <class T>
void weigh_as(const Weigh& a, int begin, int end) {
  for (int t = begin; t < end; t++) {
    const size_t first = static_cast<size_t>(t) * a.top_k, row = static_cast<size_t>(t) * a.width;
    const T* y = static_cast<const T*>(a.y);
    const V gate = a.gate ? div(set1(1.f), add(set1(1.f), vexp(set1(-a.gate[t])))) : set1(1.f);
    T* out = static_cast<T*>(a.out) + row;
    for (int i = 0; i < a.width; i += 16) {
      const int left = a.width - i;
      V sum = zero();
      for (int k = 0; k < a.top_k; k++) {
        const V part = mul(load_upto(y + static_cast<size_t>(a.places[first + k]) * a.width + i, left), set1(a.weights[first + k]));
        sum = k ? add(sum, part) : part;
      }
      sum = as_stored(sum, out);
      if (a.shared) {
        const V all = load_upto(static_cast<const T*>(a.shared) + row + i, left);
        sum = add(sum, a.gate ? as_stored(mul(all, gate), out) : all);
      }
      store_upto(out + i, sum, left);
    }
  }
}
void weigh(const Weigh& a, int begin, int end) {
  a.type == Type::bf16 ? weigh_as<bf16>(a, begin, end) : weigh_as<float>(a, begin, end);
}

// Pairs turn: neighbours, or halves; what were neighbours come out as halves.
template <class T, class O>
inline void turn(const T* x, const float* cos, const float* sin, int width, bool interleaved, O* out) {
  const int half = width / 2;
  for (int i = 0; i < half; i += 16) {
    const int left = half - i;
    V a, b;
    if (interleaved) {
      float pairs[32], x1[16], x2[16];
      for (int j = 0; j < 32; j += 16) store(pairs + j, j < 2 * left ? load_upto(x + 2 * i + j, 2 * left - j) : zero());
      for (int j = 0; j < 16; j++) {
        x1[j] = pairs[2 * j];
        x2[j] = pairs[2 * j + 1];
      }
      a = load(x1), b = load(x2);
    } else {
      a = load_upto(x + i, left), b = load_upto(x + half + i, left);
    }
    const V c = load_upto(cos + i, left), s = load_upto(sin + i, left);
    store_upto(out + i, sub(mul(a, c), mul(b, s)), left);
    store_upto(out + half + i, add(mul(b, c), mul(a, s)), left);
  }
}

// As rms_norm_as, with rows that may lie apart.
template <class T, class O>
inline void norm_row(const T* x, const void* weight, Type weight_type, int width, float eps, O* out) {
  V squares = zero();
  for (int i = 0; i < width; i += 16) {
    const V v = load_upto(x + i, width - i);
    squares = fma(v, v, squares);
  }
  const V scale = set1(inverse_rms(squares, width, eps));
  for (int i = 0; i < width; i += 16) {
    const int left = width - i;
    store_upto(out + i, mul(load_weight(weight, weight_type, i, left), mul(load_upto(x + i, left), scale)), left);
  }
}

template <class T, class O>
void latent_prepare_as(const LatentPrepare& a, int begin, int end) {
  const int half = a.rope / 2;
  for (int t = begin; t < end; t++) {
    const T* row = static_cast<const T*>(a.projected) + static_cast<size_t>(t) * (a.query_width + a.rank + a.rope);
    if (a.q_norm)
      norm_row(row, a.q_norm, a.q_norm_type, a.query_width, a.q_eps,
               static_cast<O*>(a.queries) + static_cast<size_t>(t) * a.query_width);
    O* kept = static_cast<O*>(a.cache) + static_cast<size_t>(a.slots[t]) * (a.rank + a.rope);
    norm_row(row + a.query_width, a.kv_norm, a.kv_norm_type, a.rank, a.kv_eps, kept);
    const size_t at = static_cast<size_t>(a.positions[t]) * half;
    turn(row + a.query_width + a.rank, a.cos + at, a.sin + at, a.rope, a.interleaved, kept + a.rank);
  }
}
void latent_prepare(const LatentPrepare& a, int begin, int end) {
  const bool wide = a.out_type == Type::f32;
  if (a.type == Type::bf16)
    wide ? latent_prepare_as<bf16, float>(a, begin, end) : latent_prepare_as<bf16, bf16>(a, begin, end);
  else
    wide ? latent_prepare_as<float, float>(a, begin, end) : latent_prepare_as<float, bf16>(a, begin, end);
}

template <class T, class O>
void latent_queries_as(const LatentQueries& a, int begin, int end) {
  const int half = a.rope / 2;
  for (int t = begin; t < end; t++) {
    const size_t at = static_cast<size_t>(a.positions[t]) * half;
    for (int h = 0; h < a.heads; h++) {
      const T* q = static_cast<const T*>(a.q) + t * a.stride + static_cast<size_t>(h) * (a.nope + a.rope);
      O* plain = static_cast<O*>(a.q_nope) + (static_cast<size_t>(h) * a.tokens + t) * a.nope;
      for (int i = 0; i < a.nope; i += 16) store_upto(plain + i, load_upto(q + i, a.nope - i), a.nope - i);
      turn(q + a.nope, a.cos + at, a.sin + at, a.rope, a.interleaved,
           static_cast<O*>(a.q_rope) + (static_cast<size_t>(t) * a.heads + h) * a.rope);
    }
  }
}
void latent_queries(const LatentQueries& a, int begin, int end) {
  const bool wide = a.out_type == Type::f32;
  if (a.type == Type::bf16)
    wide ? latent_queries_as<bf16, float>(a, begin, end) : latent_queries_as<bf16, bf16>(a, begin, end);
  else
    wide ? latent_queries_as<float, float>(a, begin, end) : latent_queries_as<float, bf16>(a, begin, end);
}
