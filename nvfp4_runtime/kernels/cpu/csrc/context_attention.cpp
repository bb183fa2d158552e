// Attention: what a batch points at is checked, then cut into pieces for the threads.
#include "context.h"
#include "parallel.h"

namespace nvfp4 {
namespace {

struct AttentionCall {
  const Kernels* kernels;
  const Attention* args;
  const AttentionItem* items;
  const AttentionPiece* pieces;
  std::atomic<int>* pending;
  float* const* scratch;
  static void work(const void* context, int begin, int end, int thread) {
    const PlainFloats guard;
    const auto* call = static_cast<const AttentionCall*>(context);
    for (int i = begin; i < end; i++) {
      const AttentionPiece& piece = call->pieces[i];
      const AttentionItem& item = call->items[piece.item];
      call->kernels->attention(*call->args, item, piece.begin, piece.end, call->scratch[thread]);
      // whoever finishes an item's last piece merges them, in their order
      if (item.partial && call->pending[piece.item].fetch_sub(1, std::memory_order_acq_rel) == 1)
        call->kernels->attention_merge(*call->args, item, call->scratch[thread]);
    }
  }
};

}  // namespace

void Context::attention(Attention& a, const int32_t* cu_seqlens, const int32_t* seq_lens, int sequences, int rows,
                        int num_blocks) {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  if (cu_seqlens[0] != 0 || cu_seqlens[sequences] != rows)
    throw std::out_of_range("cu_seqlens_q runs from " + std::to_string(cu_seqlens[0]) + " to " +
                            std::to_string(cu_seqlens[sequences]) + "; q has " + std::to_string(rows) + " rows");
  for (int b = 0; b < sequences; b++) {
    const int64_t fresh = int64_t{cu_seqlens[b + 1]} - cu_seqlens[b];  // 64 bits: the bounds may be any
    const int tokens = static_cast<int>(fresh), length = seq_lens[b];
    if (fresh < 0 || length < fresh)
      throw std::out_of_range("sequence " + std::to_string(b) + " has " + std::to_string(fresh) +
                              " new tokens and seq_lens " + std::to_string(length));
    if (tokens == 0) continue;
    const int64_t used = (int64_t{length} + a.block_size - 1) / a.block_size;  // 64 bits: a length may be 2^31 - 1
    if (used > a.table_stride)
      throw std::out_of_range("sequence " + std::to_string(b) + " of " + std::to_string(length) + " tokens needs " +
                              std::to_string(used) + " blocks; its block table holds " + std::to_string(a.table_stride));
    const int32_t* table = a.block_tables + static_cast<size_t>(b) * a.table_stride;
    for (int i = 0; i < used; i++)
      if (table[i] < 0 || table[i] >= num_blocks)
        throw std::out_of_range("block_tables[" + std::to_string(b) + ", " + std::to_string(i) + "] is " +
                                std::to_string(table[i]) + "; the cache has " + std::to_string(num_blocks) + " blocks");
  }
  const int most = plan_attention(a, cu_seqlens, seq_lens, sequences);
  if (pieces_.empty()) return;
  addresses_.clear();
  for (auto& s : per_thread_) addresses_.push_back(s.floats(attention_scratch(most, a.head_dim)));
  const AttentionCall call{&kernels_, &a, items_.data(), pieces_.data(), pending_.get(), addresses_.data()};
  pool_.run(AttentionCall::work, &call, static_cast<int>(pieces_.size()), 1);
}

// Fills items_ and pieces_, and returns the most rows an item has. How work is cut affects the time taken, never a result:
// segments are merged in order whoever computed them. Tokens that come alone, and prompts' when there are few, are cut
// segment by segment. A token takes all KV heads at once, which lie side by side in every block of the cache, unless
// that leaves too few pieces for the threads.
int Context::plan_attention(const Attention& a, const int32_t* cu_seqlens, const int32_t* seq_lens, int sequences) {
  const int group = a.heads / a.kv_heads, tokens_at_once = std::max(1, kAttentionRows / group);
  const int enough = 4 * threads();
  const auto first_of = [&](int position) {
    return (a.window && position + 1 > a.window ? position + 1 - a.window : 0) / kSegment;
  };
  int alone = 0, together = 0;  // segments of single tokens; items of several
  for (int b = 0; b < sequences; b++) {
    const int tokens = cu_seqlens[b + 1] - cu_seqlens[b];
    if (tokens == 1) alone += (seq_lens[b] - 1) / kSegment + 1 - first_of(seq_lens[b] - 1);
    else together += (tokens + tokens_at_once - 1) / tokens_at_once * a.kv_heads;
  }
  int heads_at_once = a.kv_heads;
  while (heads_at_once > 1 && alone * (a.kv_heads / heads_at_once) + together < enough) heads_at_once = (heads_at_once + 1) / 2;

  items_.clear();
  int most = 0;
  for (int b = 0; b < sequences; b++) {
    const int tokens = cu_seqlens[b + 1] - cu_seqlens[b], step = tokens == 1 ? heads_at_once : 1;
    // the last tokens of a prompt see the most keys: start with them, so that no thread ends late
    for (int last = tokens; last > 0; last -= tokens_at_once) {
      const int t = std::max(0, last - tokens_at_once), position = seq_lens[b] - tokens + t;
      const int end = (position + last - t - 1) / kSegment + 1;
      for (int h = 0; h < a.kv_heads; h += step) {
        const int heads = std::min(step, a.kv_heads - h);
        items_.push_back({b, h, heads, cu_seqlens[b] + t, last - t, position, first_of(position), end, nullptr});
        most = std::max(most, (last - t) * heads * group);
      }
    }
  }

  const auto splits = [&](const AttentionItem& i) {
    return i.end_segment - i.first_segment > 1 && (i.tokens == 1 || alone + together < enough);
  };
  const auto partial_of = [&](const AttentionItem& i) {
    return attention_partial(i.tokens * i.kv_heads * group, round_chunk(a.head_dim)) * (i.end_segment - i.first_segment);
  };
  size_t floats = 0;
  for (const AttentionItem& i : items_) floats += splits(i) ? partial_of(i) : 0;
  float* partial = floats ? partials_.floats(floats) : nullptr;
  if (pending_size_ < items_.size()) {
    pending_ = std::make_unique<std::atomic<int>[]>(items_.size());
    pending_size_ = items_.size();
  }
  pieces_.clear();
  for (size_t n = 0; n < items_.size(); n++) {
    AttentionItem& i = items_[n];
    const bool split = splits(i);
    if (split) {
      i.partial = partial;
      partial += partial_of(i);
      pending_[n].store(i.end_segment - i.first_segment, std::memory_order_relaxed);
    }
    const int size = split ? 1 : i.end_segment - i.first_segment;
    for (int s = i.first_segment; s < i.end_segment; s += size) pieces_.push_back({static_cast<int>(n), s, s + size});
  }
  return most;
}

}  // namespace nvfp4
