// A decoder up to its head as one call: embedding, the layers' ops of context.h in their order, and the last norm of the
// rows whose logits are wanted, without a return to Python between them. What is computed is what the same ops compute one by one, bit for bit.
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
  const int64_t* ids;
  int rows;
  const int64_t* logits_rows;
  int wanted;
  void* out;  // [wanted][hidden] of the input type
  const int64_t *positions, *slots;
  const int32_t *block_tables, *cu_seqlens, *seq_lens;
  int table_stride, sequences;
};

struct Embedding {
  const void* data;  // [vocab][hidden]
  Type type;
  int64_t vocab;
};

class Decoder {
 public:
  // stream: type of activations between ops; input: of those that enter a multiplication by weights
  Decoder(Context& context, int hidden, Type stream, Type input, Embedding embedding, NormWeight last_norm);
  void add(const DecoderLayer& layer) { layers_.push_back(layer); }
  // The cache of one layer: everything of Rope and Attention that points into it.
  DecoderLayer& layer(int i) { return layers_.at(static_cast<size_t>(i)); }
  void run(const DecoderStep& step);  // throws std::out_of_range
  Type input() const { return input_; }

 private:
  void check(const DecoderStep& step) const;
  void embed(const DecoderStep& step);
  void run_layer(DecoderLayer& layer, const DecoderStep& step, bool first);
  void finish(const DecoderStep& step);

  Context& context_;
  const int hidden_;
  const Type stream_, input_;
  const Embedding embedding_;
  const NormWeight last_norm_;
  std::vector<DecoderLayer> layers_;
  Scratch residual_, out_, normed_, wide_, narrow_, gated_;
  void *residual_rows_ = nullptr, *out_rows_ = nullptr;  // stream [rows][hidden]
};

}  // namespace nvfp4
