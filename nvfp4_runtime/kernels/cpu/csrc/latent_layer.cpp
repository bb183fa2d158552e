#include "latent_layer.h"

#include <cstring>

namespace nvfp4 {
namespace {

// [a][b][bytes] to [b][a][bytes]
void swap_axes(const void* from, void* to, int a, int b, size_t bytes) {
  for (int i = 0; i < a; i++)
    for (int j = 0; j < b; j++)
      std::memcpy(static_cast<char*>(to) + (static_cast<size_t>(j) * a + i) * bytes,
                  static_cast<const char*>(from) + (static_cast<size_t>(i) * b + j) * bytes, bytes);
}

}  // namespace

LatentLayer::LatentLayer(Context& context, const LatentShape& shape, const NormWeight& q_norm, const Linear* q_b,
                         const NormWeight& kv_norm, const Experts& keys, const Experts& values, const float* cos,
                         const float* sin, int64_t num_positions, Type stream, Type input)
    : context_(context), shape_(shape), q_norm_(q_norm), kv_norm_(kv_norm), q_b_(q_b), keys_(keys), values_(values),
      cos_(cos), sin_(sin), num_positions_(num_positions), stream_(stream), input_(input) {
  const int queries = shape.heads * (shape.nope + shape.rope);
  const bool fit = q_b ? q_b->n == queries && q_b->k == shape.query_width : shape.query_width == queries;
  if (!fit || keys.count() != shape.heads || values.count() != shape.heads || keys.n != shape.rank || keys.k != shape.nope ||
      values.n != shape.value || values.k != shape.rank)
    throw std::invalid_argument("latent attention's matrices do not fit together");
}

void LatentLayer::run(const LatentStep& step) {
  if (step.rows == 0) return;
  const auto lock = context_.lock();
  const size_t rows = static_cast<size_t>(step.rows), heads = static_cast<size_t>(shape_.heads), in = type_bytes(input_);
  const int first_width = shape_.query_width + shape_.rank + shape_.rope;
  void* normed = normed_.bytes(rows * static_cast<size_t>(shape_.query_width) * in);
  context_.latent_prepare({step.projected, stream_, input_, shape_.query_width, shape_.rank, shape_.rope, q_norm_.data,
                           kv_norm_.data, q_norm_.type, kv_norm_.type, q_norm_.eps, kv_norm_.eps, normed, step.cache, step.slots,
                           step.positions, cos_, sin_, shape_.interleaved},
                          step.rows, static_cast<int64_t>(step.num_blocks) * step.block_size, num_positions_);
  const void* q = step.projected;
  size_t stride = static_cast<size_t>(first_width);
  if (q_b_) {
    stride = static_cast<size_t>(q_b_->n);
    void* projected = queries_.bytes(rows * stride * type_bytes(stream_));
    q_b_->run(context_, normed, input_, step.rows, projected, stream_);
    q = projected;
  }
  void* nope = nope_.bytes(rows * heads * static_cast<size_t>(shape_.nope) * in);
  void* rope = rope_.bytes(rows * heads * static_cast<size_t>(shape_.rope) * in);
  context_.latent_queries({q, stride, stream_, input_, step.rows, shape_.heads, shape_.nope, shape_.rope, nope, rope,
                           step.positions, cos_, sin_, shape_.interleaved});
  offsets_.resize(heads + 1);
  for (size_t h = 0; h <= heads; h++) offsets_[h] = static_cast<int32_t>(h * rows);
  const size_t latent_bytes = rows * heads * static_cast<size_t>(shape_.rank) * in;
  void* seen = seen_.bytes(latent_bytes);
  void* by_token = by_token_.bytes(latent_bytes);
  by_head(keys_, nope, step.rows, seen);
  swap_axes(seen, by_token, shape_.heads, step.rows, static_cast<size_t>(shape_.rank) * in);
  void* attended = latent_.bytes(latent_bytes);
  Latent a{by_token, rope, step.cache, input_, attended, input_, step.block_tables, step.table_stride, step.seq_lens,
           shape_.heads, shape_.rank, shape_.rope, step.block_size, shape_.scale, 0};
  context_.latent(a, step.rows, step.num_blocks);
  swap_axes(attended, seen, step.rows, shape_.heads, static_cast<size_t>(shape_.rank) * in);
  void* values = by_token_.bytes(rows * heads * static_cast<size_t>(shape_.value) * in);
  by_head(values_, seen, step.rows, values);
  swap_axes(values, step.out, shape_.heads, step.rows, static_cast<size_t>(shape_.value) * in);
}

void LatentLayer::by_head(const Experts& matrices, const void* x, int rows, void* out) {
  context_.grouped(matrices, x, input_, offsets_.data(), rows * shape_.heads, out, input_);
}

}  // namespace nvfp4
