// Multi-head latent attention, absorbed: some heads at a time meet every latent vector, as key and as value, while it is in
// registers. Tiles of keys begin at multiples of kLatentTile, so that a sequence's result does not depend on anything beside it,
// and no sum is shared by heads, so that it does not depend on how many go together either.

// Heads whose sums of two vectors fit into registers. A multiply-add with 8 of them takes one load and not two.
#if defined(__AVX512F__)
constexpr int kHeadsTogether = 8;
#else
constexpr int kHeadsTogether = 2;
#endif

// f(Count<H>, head) for all heads, as many as possible at a time.
template <int H = kHeadsTogether, class F>
inline void heads_together(int heads, F&& f, int head = 0) {
  for (; heads - head >= H; head += H) f(Count<H>{}, head);
  if constexpr (H > 1) heads_together<H / 2>(heads, f, head);
}

// Some heads of one sequence: [head][padded] floats each.
struct LatentHeads {
  int width, padded;
  float *q, *sums;  // q: scaled, zero beyond the width
  float* weights;   // [head][kLatentTile]: scores, then their exponentials

  // Scores of H heads against one key, whose even and odd vectors are summed apart.
  template <int H, class T>
  ALWAYS_INLINE void score(int head, const T* key, int k) const {
    V even[H], odd[H];
    UNROLL for (int h = 0; h < H; h++) even[h] = odd[h] = zero();
    const float* query = q + static_cast<size_t>(head) * padded;
    const auto add_products = [&](V* sum, V c, int i) {
      UNROLL for (int h = 0; h < H; h++) sum[h] = fma(load(query + static_cast<size_t>(h) * padded + i), c, sum[h]);
    };
    int i = 0;
    for (; i + 32 <= width; i += 32) {
      add_products(even, load(key + i), i);
      add_products(odd, load(key + i + 16), i + 16);
    }
    if (i < width) add_products(even, load_upto(key + i, width - i), i);
    if (i + 16 < width) add_products(odd, load_upto(key + i + 16, width - i - 16), i + 16);
    UNROLL for (int h = 0; h < H; h++) weights[(head + h) * kLatentTile + k] = reduce_add(add(even[h], odd[h]));
  }

  // Two vectors (N = 2) or one of the sums of H heads, from place i on: times what they shrink by, plus the weighted values.
  template <int H, int N, class T>
  ALWAYS_INLINE void mix(int head, const T* const* keys, int count, const float* shrink, int i) const {
    float* sum = sums + static_cast<size_t>(head) * padded + i;
    const float* w = weights + head * kLatentTile;
    V v[H][N];
    UNROLL for (int h = 0; h < H; h++)
      UNROLL for (int n = 0; n < N; n++) v[h][n] = mul(load(sum + static_cast<size_t>(h) * padded + 16 * n), set1(shrink[head + h]));
    for (int k = 0; k < count; k++) {
      V c[N];
      UNROLL for (int n = 0; n < N; n++) c[n] = N > 1 ? load(keys[k] + i + 16 * n) : load_upto(keys[k] + i, width - i);
      UNROLL for (int h = 0; h < H; h++) {
        const V weight = set1(w[h * kLatentTile + k]);
        UNROLL for (int n = 0; n < N; n++) v[h][n] = fma(weight, c[n], v[h][n]);
      }
    }
    UNROLL for (int h = 0; h < H; h++)
      UNROLL for (int n = 0; n < N; n++) store(sum + static_cast<size_t>(h) * padded + 16 * n, v[h][n]);
  }

  // A tile's scores of one head become weights. Returns what the sums before it shrink by.
  float soften(int head, int count, float& largest, float& total) const {
    float* w = weights + head * kLatentTile;
    float most = largest;
    for (int k = 0; k < count; k++) most = w[k] > most ? w[k] : most;
    for (int k = count; k < kLatentTile; k++) w[k] = -__builtin_inff();
    V added = zero();
    for (int k = 0; k < kLatentTile; k += 16) {
      const V e = vexp(sub(load(w + k), set1(most)));
      store(w + k, e);
      added = add(added, e);
    }
    float shrink[16];
    store(shrink, vexp(set1(largest - most)));
    total = total * shrink[0] + reduce_add(added);
    largest = most;
    return shrink[0];
  }
};

template <class T>
void latent_as(const Latent& a, int begin, int end, float* scratch) {
  const int width = a.rank + a.rope, padded = round16(width);
  float* q = scratch;
  float* sums = q + kLatentHeads * static_cast<size_t>(padded);
  const LatentHeads some{width, padded, q, sums, sums + kLatentHeads * static_cast<size_t>(padded)};
  for (int item = begin; item < end; item++) {
    const int sequence = item / a.groups, first = item % a.groups * kLatentHeads;
    const int heads = a.heads - first < kLatentHeads ? a.heads - first : kLatentHeads;
    const int length = a.seq_lens[sequence];
    float largest[kLatentHeads], total[kLatentHeads], shrink[kLatentHeads];
    for (int h = 0; h < heads; h++) {
      const size_t row = static_cast<size_t>(sequence) * a.heads + first + h;
      float* into = q + static_cast<size_t>(h) * padded;
      for (int i = 0; i < padded; i += 16) store(into + i, zero());
      for (int i = 0; i < a.rank; i += 16)
        store_upto(into + i, mul(load_upto(static_cast<const T*>(a.q_nope) + row * a.rank + i, a.rank - i), set1(a.scale)), a.rank - i);
      for (int i = 0; i < a.rope; i += 16)
        store_upto(into + a.rank + i, mul(load_upto(static_cast<const T*>(a.q_rope) + row * a.rope + i, a.rope - i), set1(a.scale)), a.rope - i);
      for (int i = 0; i < padded; i += 16) store(sums + static_cast<size_t>(h) * padded + i, zero());
      largest[h] = -__builtin_inff();
      total[h] = 0;
    }
    const int32_t* table = a.block_tables + static_cast<size_t>(sequence) * a.table_stride;
    for (int key = 0; key < length; key += kLatentTile) {
      const int count = length - key < kLatentTile ? length - key : kLatentTile;
      const T* keys[kLatentTile];
      for (int k = 0; k < count; k++) {
        const size_t slot = static_cast<size_t>(table[(key + k) / a.block_size]) * a.block_size + (key + k) % a.block_size;
        keys[k] = static_cast<const T*>(a.cache) + slot * width;
      }
      heads_together(heads, [&](auto n, int h) {
        for (int k = 0; k < count; k++) some.score<decltype(n)::value>(h, keys[k], k);
      });
      for (int h = 0; h < heads; h++) shrink[h] = some.soften(h, count, largest[h], total[h]);
      heads_together(heads, [&](auto n, int h) {
        constexpr int H = decltype(n)::value;
        int i = 0;
        for (; i + 32 <= a.rank; i += 32) some.mix<H, 2>(h, keys, count, shrink, i);
        for (; i < a.rank; i += 16) some.mix<H, 1>(h, keys, count, shrink, i);
      });
    }
    for (int h = 0; h < heads; h++) {
      const size_t row = static_cast<size_t>(sequence) * a.heads + first + h;
      const V inverse = set1(length > 0 ? 1.f / total[h] : 0.f);
      for (int i = 0; i < a.rank; i += 16) {
        const V v = mul(load(sums + static_cast<size_t>(h) * padded + i), inverse);
        if (a.out_type == Type::bf16)
          store_upto(static_cast<bf16*>(a.out) + row * a.rank + i, v, a.rank - i);
        else
          store_upto(static_cast<float*>(a.out) + row * a.rank + i, v, a.rank - i);
      }
    }
  }
}
void latent(const Latent& a, int begin, int end, float* scratch) {
  a.type == Type::bf16 ? latent_as<bf16>(a, begin, end, scratch) : latent_as<float>(a, begin, end, scratch);
}
