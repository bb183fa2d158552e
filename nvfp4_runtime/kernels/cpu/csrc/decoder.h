// A stack of pre-norm decoder layers as one call: the ops of context.h in their order, without a return to Python between
// them. What is computed is what the same ops compute one by one, bit for bit.
#pragma once
#include <memory>
#include <vector>

#include "context.h"

namespace nvfp4 {

struct NormWeight {
  const void* data;
  Type type;
  float eps;
};

// Fields that a step sets (activations, positions, tables) are left empty here.
struct DecoderLayer {
  NormWeight input_norm, post_norm;
  const Linear *qkv, *o, *gate_up, *down;
  Rope rope;
  Attention attention;
  int64_t num_positions;
  int num_blocks;
};

// One ragged batch; the pointers are those of ForwardBatch.
struct DecoderStep {
  void* x;         // stream [rows][hidden]: in, the embeddings; out, the residual that goes with `out`
  void* out;       // stream [rows][hidden]: what the last feed-forward gave
  int rows;
  const int64_t *positions, *slots;
  const int32_t *block_tables, *cu_seqlens, *seq_lens;
  int table_stride, sequences;
};

class Decoder {
 public:
  // stream: type of activations between ops; input: of those that enter a multiplication by weights
  Decoder(Context& context, int hidden, Type stream, Type input);
  void add(const DecoderLayer& layer) { layers_.push_back(layer); }
  // The cache of one layer: everything of Rope and Attention that points into it.
  DecoderLayer& layer(int i) { return layers_.at(static_cast<size_t>(i)); }
  void run(const DecoderStep& step);
  Type stream() const { return stream_; }

 private:
  void run_layer(DecoderLayer& layer, const DecoderStep& step, bool first);

  Context& context_;
  const int hidden_;
  const Type stream_, input_;
  std::vector<DecoderLayer> layers_;
  Scratch normed_, wide_, narrow_;
};

}  // namespace nvfp4
