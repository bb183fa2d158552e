// A decoder up to its head as one call: embedding, its blocks' ops of context.h in their order, and the last norm of the
// rows whose logits are wanted, without a return to Python between them. What is computed is what the same ops compute one by
// one, bit for bit. A block is a norm, which first adds what came before to the residual stream, and a body (bodies.h).
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
  const int64_t* state_slots;  // [sequences]; null for models without states
};

struct Embedding {
  const void* data;  // [vocab][hidden]
  Type type;
  int64_t vocab;
};

// What a block makes of its normed rows.
struct Body {
  Context& context;
  const Type stream, input;
  Body(Context& c, Type s, Type i) : context(c), stream(s), input(i) {}
  virtual ~Body() = default;
  // normed [rows][hidden] of the input type -> out [rows][hidden] of the stream's; throws std::out_of_range
  virtual void run(const DecoderStep& step, const void* normed, void* out) = 0;
};

class Decoder {
 public:
  // stream: type of activations between ops; input: of those that enter a multiplication by weights
  Decoder(Context& context, int hidden, Type stream, Type input, Embedding embedding, NormWeight last_norm);
  void add(const NormWeight& norm, Body& body) { blocks_.push_back({norm, &body}); }
  void run(const DecoderStep& step);  // throws std::out_of_range
  Type input() const { return input_; }

 private:
  struct Block {
    NormWeight norm;
    Body* body;
  };
  void check(const DecoderStep& step) const;
  void embed(const DecoderStep& step);
  void finish(const DecoderStep& step);

  Context& context_;
  const int hidden_;
  const Type stream_, input_;
  const Embedding embedding_;
  const NormWeight last_norm_;
  std::vector<Block> blocks_;
  Scratch residual_, out_, normed_, last_;
  void *residual_rows_ = nullptr, *out_rows_ = nullptr;  // stream [rows][hidden]
};

}  // namespace nvfp4
