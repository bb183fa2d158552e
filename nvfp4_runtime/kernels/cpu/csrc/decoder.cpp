#include "decoder.h"

#include <algorithm>

namespace nvfp4 {

Decoder::Decoder(Context& context, int hidden, Type stream, Type input)
    : context_(context), hidden_(hidden), stream_(stream), input_(input) {}

void Decoder::run(const DecoderStep& step) {
  const auto lock = context_.lock();
  bool first = true;
  for (DecoderLayer& layer : layers_) {
    run_layer(layer, step, first);
    first = false;
  }
}

void Decoder::run_layer(DecoderLayer& layer, const DecoderStep& step, bool first) {
  const size_t rows = static_cast<size_t>(step.rows), stream = type_bytes(stream_), input = type_bytes(input_);
  const size_t q_width = static_cast<size_t>(layer.rope.heads) * layer.rope.head_dim;
  const size_t inner = static_cast<size_t>(layer.down->k);
  void* normed = normed_.bytes(rows * std::max({static_cast<size_t>(hidden_), q_width, inner}) * input);
  void* wide = wide_.bytes(rows * std::max(layer.qkv->n, layer.gate_up->n) * stream);
  void* queries = narrow_.bytes(rows * q_width * stream);

  // the first layer's residual is the embeddings themselves; afterwards what came before is added to it
  const auto norm = [&](const NormWeight& weight, void* x, void* residual) {
    context_.rms_norm({x, residual, weight.data, weight.type, normed, stream_, input_, hidden_, weight.eps}, step.rows);
  };
  first ? norm(layer.input_norm, step.x, nullptr) : norm(layer.input_norm, step.out, step.x);

  layer.qkv->run(context_, normed, input_, step.rows, wide, stream_);
  Rope& rope = layer.rope;
  rope.qkv = wide;
  rope.positions = step.positions;
  rope.slots = step.slots;
  rope.q_out = queries;
  context_.rope(rope, step.rows, static_cast<int64_t>(layer.num_blocks) * rope.block_size, layer.num_positions);

  Attention& attention = layer.attention;
  attention.q = queries;
  attention.out = normed;
  attention.block_tables = step.block_tables;
  attention.table_stride = step.table_stride;
  context_.attention(attention, step.cu_seqlens, step.seq_lens, step.sequences, step.rows, layer.num_blocks);
  layer.o->run(context_, normed, input_, step.rows, step.out, stream_);

  norm(layer.post_norm, step.out, step.x);
  layer.gate_up->run(context_, normed, input_, step.rows, wide, stream_);
  context_.silu_mul({wide, normed, stream_, input_, layer.down->k}, step.rows);
  layer.down->run(context_, normed, input_, step.rows, step.out, stream_);
}

}  // namespace nvfp4
