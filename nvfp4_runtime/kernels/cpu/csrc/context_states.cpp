// Ops over latent caches and recurrent states.
#include <string>

#include "context.h"
#include "parallel.h"

namespace nvfp4 {
namespace {

struct LatentCall {
  const Kernels* kernels;
  const Latent* a;
  float* const* scratch;
  static void work(const void* context, int begin, int end, int thread) {
    const PlainFloats guard;
    const auto* call = static_cast<const LatentCall*>(context);
    call->kernels->latent(*call->a, begin, end, call->scratch[thread]);
  }
};

}  // namespace

void Context::latent(Latent& a, int sequences, int num_blocks) {
  for (int b = 0; b < sequences; b++) {
    const int needed = (a.seq_lens[b] + a.block_size - 1) / a.block_size;
    if (a.seq_lens[b] < 0 || needed > a.table_stride)
      throw std::out_of_range("seq_lens[" + std::to_string(b) + "] is " + std::to_string(a.seq_lens[b]) +
                              "; its block table holds " + std::to_string(a.table_stride) + " blocks of " +
                              std::to_string(a.block_size));
    const int32_t* table = a.block_tables + static_cast<size_t>(b) * a.table_stride;
    for (int i = 0; i < needed; i++)
      if (table[i] < 0 || table[i] >= num_blocks)
        throw std::out_of_range("block_tables[" + std::to_string(b) + ", " + std::to_string(i) + "] is " +
                                std::to_string(table[i]) + "; the cache has " + std::to_string(num_blocks) + " blocks");
  }
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  a.groups = (a.heads + kLatentHeads - 1) / kLatentHeads;
  addresses_.clear();
  for (auto& s : per_thread_) addresses_.push_back(s.floats(latent_scratch(a.rank, a.rope)));
  const LatentCall call{&kernels_, &a, addresses_.data()};
  pool_.run(LatentCall::work, &call, sequences * a.groups, 1);
}

void Context::mamba2(Mamba2& a, int sequences, int64_t num_slots) {
  for (int b = 0; b < sequences; b++) {
    if (a.slots[b] < 0 || a.slots[b] >= num_slots)
      throw std::out_of_range("state_slots[" + std::to_string(b) + "] is " + std::to_string(a.slots[b]) +
                              "; there are " + std::to_string(num_slots));
    if (a.cu_seqlens[b + 1] <= a.cu_seqlens[b])
      throw std::out_of_range("cu_seqlens_q[" + std::to_string(b + 1) + "] is " + std::to_string(a.cu_seqlens[b + 1]) +
                              "; every sequence needs a new token");
  }
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  a.pieces = (a.conv_dim() + kConvPiece - 1) / kConvPiece;
  const size_t rows = static_cast<size_t>(a.cu_seqlens[sequences]);
  const size_t inner = static_cast<size_t>(a.inner()), kept = a.gate ? inner : 0;
  a.mixed = x_.floats(rows * (static_cast<size_t>(a.conv_dim()) + 2 * static_cast<size_t>(a.heads) + kept));
  a.steps = a.mixed + rows * static_cast<size_t>(a.conv_dim());
  a.decays = a.steps + rows * static_cast<size_t>(a.heads);
  if (a.gate) a.y = a.decays + rows * static_cast<size_t>(a.heads);
  parallel<Mamba2, &Kernels::mamba2_steps>(pool_, kernels_, a, static_cast<int>(rows), row_grain(static_cast<size_t>(a.heads) * 4));
  parallel<Mamba2, &Kernels::mamba2_conv>(pool_, kernels_, a, sequences * a.pieces, 1);
  const size_t state = static_cast<size_t>(a.head_dim) * static_cast<size_t>(a.state) * 4;
  const int items = sequences * a.heads, grain = grain_of(items, state, threads());
  if (a.b) parallel<Mamba2, &Kernels::delta_scan>(pool_, kernels_, a, items, grain);
  else parallel<Mamba2, &Kernels::mamba2_scan>(pool_, kernels_, a, items, grain);
  if (a.gate)
    parallel<Mamba2, &Kernels::mamba2_norm>(pool_, kernels_, a, static_cast<int>(rows), row_grain(inner * 4));
}

}  // namespace nvfp4
