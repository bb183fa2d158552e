#include "bodies.h"

#include <algorithm>
#include <string>

namespace nvfp4 {
namespace {

constexpr int kMLPRows = 264;  // gate and up of so many rows at a time: 264 x 16,384 floats are 17 MB, which a last-level cache holds

}  // namespace

void AttentionBody::run(const DecoderStep& step, const void* normed, void* out) {
  const size_t rows = static_cast<size_t>(step.rows);
  const size_t q_width = static_cast<size_t>(rope.heads) * rope.head_dim;
  void* wide = wide_.bytes(rows * qkv.n * type_bytes(stream));
  void* queries = queries_.bytes(rows * q_width * type_bytes(stream));
  void* attended = attended_.bytes(rows * q_width * type_bytes(input));
  qkv.run(context, normed, input, step.rows, wide, stream);
  rope.qkv = wide;
  rope.positions = step.positions;
  rope.slots = step.slots;
  rope.q_out = queries;
  context.rope(rope, step.rows, static_cast<int64_t>(num_blocks) * rope.block_size, num_positions);
  attention.q = queries;
  attention.out = attended;
  attention.block_tables = step.block_tables;
  attention.table_stride = step.table_stride;
  context.attention(attention, step.cu_seqlens, step.seq_lens, step.sequences, step.rows, num_blocks);
  o.run(context, attended, input, step.rows, out, stream);
}

FeedForward::FeedForward(Context& c, Type s, Type i, const Linear& up_in, const Linear& down_in, bool gated_in)
    : Body(c, s, i), up(up_in), down(down_in), gated(gated_in) {
  activation.type = s;
  activation.out_type = i;
  activation.width = down.k;
}

void FeedForward::run_rows(int rows, const void* normed, void* out) {
  const size_t most = static_cast<size_t>(std::min(rows, kMLPRows));
  void* wide = wide_.bytes(most * up.n * type_bytes(stream));
  void* inner = inner_.bytes(most * down.k * type_bytes(input));
  for (int row = 0; row < rows; row += kMLPRows) {
    const int count = std::min(kMLPRows, rows - row);
    const size_t before = static_cast<size_t>(row);
    up.run(context, static_cast<const char*>(normed) + before * up.k * type_bytes(input), input, count, wide, stream);
    if (gated) {
      SiluMul a = activation;
      a.x = wide;
      a.out = inner;
      context.silu_mul(a, count);
    } else {
      context.relu_squared({wide, inner, stream, input, down.k}, count);
    }
    down.run(context, inner, input, count, static_cast<char*>(out) + before * down.n * type_bytes(stream), stream);
  }
}

void MixtureBody::run(const DecoderStep& step, const void* normed, void* out) {
  const size_t rows = static_cast<size_t>(step.rows);
  void* all = nullptr;
  float* logits = nullptr;
  if (shared) {
    all = shared_.bytes(rows * shared->down.n * type_bytes(stream));
    shared->run_rows(step.rows, normed, all);
  }
  if (gate) {
    logits = gate_.floats(rows);
    gate->run(context, normed, input, step.rows, logits, Type::f32);
  }
  mixture.run(normed, normed, step.rows, all, logits, out);
}

void LatentBody::run(const DecoderStep& step, const void* normed, void* out) {
  if (step.rows != step.sequences)
    throw std::out_of_range("a latent layer decodes one token a sequence here: " + std::to_string(step.rows) + " tokens of " +
                            std::to_string(step.sequences) + " sequences");
  const size_t rows = static_cast<size_t>(step.rows);
  void* projected = projected_.bytes(rows * first.n * type_bytes(stream));
  void* attended = attended_.bytes(rows * o.k * type_bytes(input));
  first.run(context, normed, input, step.rows, projected, stream);
  layer.run({projected, step.rows, step.positions, step.slots, step.block_tables, step.seq_lens, step.table_stride, cache,
             block_size, num_blocks, attended});
  o.run(context, attended, input, step.rows, out, stream);
}

void MambaBody::run(const DecoderStep& step, const void* normed, void* out) {
  const size_t rows = static_cast<size_t>(step.rows);
  void* projected = projected_.bytes(rows * in.n * type_bytes(stream));
  mamba.out = mixed_.bytes(rows * out_proj.k * type_bytes(input));
  in.run(context, normed, input, step.rows, projected, stream);
  mamba.split(projected, mamba.heads, mamba.head_dim, mamba.state, mamba.groups);
  mamba.slots = step.state_slots;
  mamba.positions = step.positions;
  mamba.cu_seqlens = step.cu_seqlens;
  context.mamba2(mamba, step.sequences, num_slots);
  out_proj.run(context, mamba.out, input, step.rows, out, stream);
}

}  // namespace nvfp4
