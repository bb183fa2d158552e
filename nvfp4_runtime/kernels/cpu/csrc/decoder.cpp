#include "decoder.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace nvfp4 {
namespace {

constexpr int kMLPRows = 264;  // gate and up of so many rows at a time: 264 x 16,384 floats are 17 MB, which a last-level cache holds

}  // namespace

Decoder::Decoder(Context& context, int hidden, Type stream, Type input, Embedding embedding, NormWeight last_norm)
    : context_(context), hidden_(hidden), stream_(stream), input_(input), embedding_(embedding), last_norm_(last_norm) {}

void Decoder::check(const DecoderStep& step) const {
  for (int t = 0; t < step.rows; t++)
    if (step.ids[t] < 0 || step.ids[t] >= embedding_.vocab)
      throw std::out_of_range("input_ids[" + std::to_string(t) + "] is " + std::to_string(step.ids[t]) +
                              "; the embedding has " + std::to_string(embedding_.vocab) + " rows");
  for (int i = 0; i < step.wanted; i++)
    if (step.logits_rows[i] < 0 || step.logits_rows[i] >= step.rows)
      throw std::out_of_range("logits_rows[" + std::to_string(i) + "] is " + std::to_string(step.logits_rows[i]) +
                              "; the batch has " + std::to_string(step.rows) + " tokens");
}

void Decoder::run(const DecoderStep& step) {
  check(step);
  const auto lock = context_.lock();
  const size_t bytes = static_cast<size_t>(step.rows) * hidden_ * type_bytes(stream_);
  residual_rows_ = residual_.bytes(bytes);
  out_rows_ = out_.bytes(bytes);
  embed(step);
  bool first = true;
  for (DecoderLayer& layer : layers_) {
    run_layer(layer, step, first);
    first = false;
  }
  finish(step);
}

void Decoder::embed(const DecoderStep& step) {
  const size_t row = static_cast<size_t>(hidden_);
  for (int t = 0; t < step.rows; t++) {
    const char* from = static_cast<const char*>(embedding_.data) + step.ids[t] * row * type_bytes(embedding_.type);
    char* to = static_cast<char*>(residual_rows_) + t * row * type_bytes(stream_);
    context_.convert(from, embedding_.type, to, stream_, hidden_);
  }
}

// The rows whose logits are wanted move to the front (they are in ascending order or not: copies go to other memory).
void Decoder::finish(const DecoderStep& step) {
  const size_t row = static_cast<size_t>(hidden_) * type_bytes(stream_);
  char* x = static_cast<char*>(wide_.bytes(2 * row * std::max(1, step.wanted)));
  char* residual = x + row * step.wanted;
  for (int i = 0; i < step.wanted; i++) {
    std::memcpy(x + i * row, static_cast<const char*>(out_rows_) + step.logits_rows[i] * row, row);
    std::memcpy(residual + i * row, static_cast<const char*>(residual_rows_) + step.logits_rows[i] * row, row);
  }
  context_.rms_norm({x, residual, last_norm_.data, last_norm_.type, step.out, stream_, input_, hidden_, last_norm_.eps},
                    step.wanted);
}

void Decoder::run_layer(DecoderLayer& layer, const DecoderStep& step, bool first) {
  const size_t rows = static_cast<size_t>(step.rows), stream = type_bytes(stream_), input = type_bytes(input_);
  const size_t q_width = static_cast<size_t>(layer.rope.heads) * layer.rope.head_dim;
  const size_t inner = static_cast<size_t>(layer.down->k);
  const size_t mlp_rows = std::min<size_t>(rows, kMLPRows);
  void* normed = normed_.bytes(rows * std::max(static_cast<size_t>(hidden_), q_width) * input);
  void* wide = wide_.bytes(std::max(rows * layer.qkv->n, mlp_rows * layer.gate_up->n) * stream);
  void* gated = gated_.bytes(mlp_rows * inner * input);
  void* queries = narrow_.bytes(rows * q_width * stream);

  // the first layer's residual is the embeddings themselves; afterwards what came before is added to it
  const auto norm = [&](const NormWeight& weight, void* x, void* residual) {
    context_.rms_norm({x, residual, weight.data, weight.type, normed, stream_, input_, hidden_, weight.eps}, step.rows);
  };
  first ? norm(layer.input_norm, residual_rows_, nullptr) : norm(layer.input_norm, out_rows_, residual_rows_);

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
  layer.o->run(context_, normed, input_, step.rows, out_rows_, stream_);

  norm(layer.post_norm, out_rows_, residual_rows_);
  for (int row = 0; row < step.rows; row += kMLPRows) {
    const int count = std::min(kMLPRows, step.rows - row);
    const size_t before = static_cast<size_t>(row);
    const char* x = static_cast<const char*>(normed) + before * hidden_ * input;
    layer.gate_up->run(context_, x, input_, count, wide, stream_);
    context_.silu_mul({wide, gated, stream_, input_, layer.down->k}, count);
    layer.down->run(context_, gated, input_, count, static_cast<char*>(out_rows_) + before * hidden_ * stream, stream_);
  }
}

}  // namespace nvfp4
