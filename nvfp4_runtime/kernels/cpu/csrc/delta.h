// The gated delta rule, token by token, behind Mamba-2's convolution and decays (mamba2.h). A value head's state holds a
// row for each dimension of its values; a row is decayed, compared with what the key should find, mended, and read.

// A query or key, divided by its length and multiplied by `scale`.
inline void normalise(const float* x, int n, float scale, float* out) {
  V sum = zero();
  for (int i = 0; i < n; i += 16) {
    const V v = load_upto(x + i, n - i);
    sum = fma(v, v, sum);
  }
  const V by = set1(scale / __builtin_sqrtf(reduce_add(sum) + 1e-6f));
  for (int i = 0; i < n; i += 16) store(out + i, mul(load_upto(x + i, n - i), by));  // zeros beyond n
}

template <class T>
void delta_scan_as(const Mamba2& a, int begin, int end) {
  const int channels = a.conv_dim(), keys = a.groups * a.state, n = a.state;
  alignas(64) float q[kMaxHeadDim], k[kMaxHeadDim];
  const float scale = 1.f / __builtin_sqrtf(static_cast<float>(n));
  for (int item = begin; item < end; item++) {
    const int sequence = item / a.heads, head = item % a.heads, group = head / (a.heads / a.groups);
    const int start = a.cu_seqlens[sequence], stop = a.cu_seqlens[sequence + 1];
    float* state = a.ssm_state + (static_cast<size_t>(a.slots[sequence]) * a.heads + head) * a.head_dim * n;
    if (a.positions[start] == 0)
      for (int i = 0; i < a.head_dim * n; i++) state[i] = 0;
    for (int t = start; t < stop; t++) {
      const float* row = a.mixed + static_cast<size_t>(t) * channels;
      normalise(row + group * n, n, scale, q);
      normalise(row + keys + group * n, n, 1.f, k);
      const float* v = row + 2 * keys + head * a.head_dim;
      const size_t at = static_cast<size_t>(t) * a.heads + head;
      const V decay = set1(a.decays[at]);
      float raw[16];
      store(raw, load_upto(static_cast<const T*>(a.b) + at, 1));
      const float beta = 1.f / (1.f + exp1(-raw[0]));
      float* out = a.y + static_cast<size_t>(t) * a.heads * a.head_dim + head * a.head_dim;
      for (int p = 0; p < a.head_dim; p++) {
        float* s = state + static_cast<size_t>(p) * n;
        V found = zero();
        for (int i = 0; i < n; i += 16) {
          const V x = mul(load_upto(s + i, n - i), decay);
          store_upto(s + i, x, n - i);
          found = fma(x, load(k + i), found);
        }
        const V mend = set1(beta * (v[p] - reduce_add(found)));
        V sum = zero();
        for (int i = 0; i < n; i += 16) {
          const V x = fma(mend, load(k + i), load_upto(s + i, n - i));
          store_upto(s + i, x, n - i);
          sum = fma(x, load(q + i), sum);
        }
        out[p] = reduce_add(sum);
      }
    }
  }
}
void delta_scan(const Mamba2& a, int begin, int end) {
  a.type == Type::bf16 ? delta_scan_as<bf16>(a, begin, end) : delta_scan_as<float>(a, begin, end);
}
