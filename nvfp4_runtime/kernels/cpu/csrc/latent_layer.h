// Latent attention between its first and its last projection as one call, absorbed: one query a token over latent vectors.
#pragma once
#include <vector>

#include "context.h"
#include "decoder.h"

namespace nvfp4 {

struct LatentShape {
  int heads, nope, rope, rank, value, query_width;  // query_width: of the projected queries, before q_b where there is one
  bool interleaved;
  float scale;
};

// The tokens of one step, each with the block table and length of its own.
struct LatentStep {
  const void* projected;  // [rows][query_width + rank + rope] of the stream's type
  int rows;
  const int64_t *positions, *slots;
  const int32_t *block_tables, *seq_lens;
  int table_stride;
  void* cache;
  int block_size, num_blocks;
  void* out;  // [rows][heads * value] of the input type
};

class LatentLayer {
 public:
  // q_b null: queries come ready. keys: [rank, nope] each; values: [value, rank] each. All are kept alive by the caller.
  LatentLayer(Context& context, const LatentShape& shape, const NormWeight& q_norm, const Linear* q_b, const NormWeight& kv_norm,
              const Experts& keys, const Experts& values, const float* cos, const float* sin, int64_t num_positions,
              Type stream, Type input);
  void run(const LatentStep& step);  // throws std::out_of_range
  Type stream() const { return stream_; }
  Type input() const { return input_; }

 private:
  void by_head(const Experts& matrices, const void* x, int rows, void* out);

  Context& context_;
  const LatentShape shape_;
  const NormWeight q_norm_, kv_norm_;
  const Linear* q_b_;
  const Experts &keys_, &values_;
  const float *cos_, *sin_;
  const int64_t num_positions_;
  const Type stream_, input_;
  Scratch normed_, queries_, nope_, rope_, seen_, by_token_, latent_;
  std::vector<int32_t> offsets_;
};

}  // namespace nvfp4
