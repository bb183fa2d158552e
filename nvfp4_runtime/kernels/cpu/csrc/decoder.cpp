#include "decoder.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace nvfp4 {
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
  void* normed = normed_.bytes(static_cast<size_t>(step.rows) * hidden_ * type_bytes(input_));
  embed(step);
  // the first block's residual is the embeddings themselves; afterwards what came before is added to it
  void *x = residual_rows_, *residual = nullptr;
  for (const Block& block : blocks_) {
    context_.rms_norm({x, residual, block.norm.data, block.norm.type, normed, stream_, input_, hidden_, block.norm.eps}, step.rows);
    block.body->run(step, normed, out_rows_);
    x = out_rows_;
    residual = residual_rows_;
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
  char* x = static_cast<char*>(last_.bytes(2 * row * std::max(1, step.wanted)));
  char* residual = x + row * step.wanted;
  for (int i = 0; i < step.wanted; i++) {
    std::memcpy(x + i * row, static_cast<const char*>(out_rows_) + step.logits_rows[i] * row, row);
    std::memcpy(residual + i * row, static_cast<const char*>(residual_rows_) + step.logits_rows[i] * row, row);
  }
  context_.rms_norm({x, residual, last_norm_.data, last_norm_.type, step.out, stream_, input_, hidden_, last_norm_.eps},
                    step.wanted);
}

}  // namespace nvfp4
