// Multi-head latent attention, absorbed: a tile of latent vectors is widened once for some heads, which take it as keys and
// as values. Tiles begin at multiples of kLatentTile, so that a sequence's result does not depend on anything beside it.

template <class T>
void latent_as(const Latent& a, int begin, int end, float* scratch) {
  const int width = a.rank + a.rope, padded = round16(width);
  float* tile = scratch;                                        // [kLatentTile][padded]
  float* q = tile + static_cast<size_t>(kLatentTile) * padded;  // [kLatentHeads][padded], scaled
  float* sums = q + kLatentHeads * static_cast<size_t>(padded);  // [kLatentHeads][padded]
  float* largest = sums + kLatentHeads * static_cast<size_t>(padded);  // [kLatentHeads]
  float* total = largest + kLatentHeads * 16;
  float* weights = total + kLatentHeads * 16;  // [kLatentTile]
  for (int item = begin; item < end; item++) {
    const int sequence = item / a.groups, first = item % a.groups * kLatentHeads;
    const int heads = a.heads - first < kLatentHeads ? a.heads - first : kLatentHeads;
    const int length = a.seq_lens[sequence];
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
      for (int k = 0; k < count; k++) {
        const size_t slot = static_cast<size_t>(table[(key + k) / a.block_size]) * a.block_size + (key + k) % a.block_size;
        const T* from = static_cast<const T*>(a.cache) + slot * width;
        float* into = tile + static_cast<size_t>(k) * padded;
        for (int i = 0; i < padded; i += 16) store(into + i, i + 16 <= width ? load(from + i) : load(from + i, width - i));
      }
      for (int h = 0; h < heads; h++) {
        const float* query = q + static_cast<size_t>(h) * padded;
        float most = largest[h];
        for (int k = 0; k < count; k++) {
          const float* c = tile + static_cast<size_t>(k) * padded;
          V sum = zero(), other = zero();
          int i = 0;
          for (; i + 32 <= padded; i += 32) {
            sum = fma(load(query + i), load(c + i), sum);
            other = fma(load(query + i + 16), load(c + i + 16), other);
          }
          if (i < padded) sum = fma(load(query + i), load(c + i), sum);
          weights[k] = reduce_add(add(sum, other));
          most = weights[k] > most ? weights[k] : most;
        }
        for (int k = count; k < kLatentTile; k++) weights[k] = -__builtin_inff();
        V added = zero();
        for (int k = 0; k < kLatentTile; k += 16) {
          const V e = vexp(sub(load(weights + k), set1(most)));
          store(weights + k, e);
          added = add(added, e);
        }
        float shrink[16];
        store(shrink, vexp(set1(largest[h] - most)));
        total[h] = total[h] * shrink[0] + reduce_add(added);
        largest[h] = most;
        const V factor = set1(shrink[0]);
        float* sum = sums + static_cast<size_t>(h) * padded;
        for (int i = 0; i < a.rank; i += 16) {
          V v = mul(load(sum + i), factor);
          for (int k = 0; k < count; k++) v = fma(set1(weights[k]), load(tile + static_cast<size_t>(k) * padded + i), v);
          store(sum + i, v);
        }
      }
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
