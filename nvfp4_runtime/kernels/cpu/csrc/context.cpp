#include "context.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace nvfp4 {
namespace {

constexpr int kRowsAtOnce = 480;             // prefill rows kept widened: 480 x 1536 x 4 bytes = 2.8 MiB
constexpr size_t kPieceBytes = 48 * 1024;    // weights a thread takes at a time: they stay in L1/L2 over all row blocks
constexpr size_t kHugePage = size_t{2} << 20;

// A host may have set flush-to-zero on its own thread; ours have not, and rows must not depend on who computes them.
class [[maybe_unused]] PlainFloats {
 public:
#if defined(__x86_64__)
  PlainFloats() : saved_(_mm_getcsr()) {
    if (saved_ & 0x8040) _mm_setcsr(saved_ & ~0x8040u);
  }
  ~PlainFloats() {
    if (saved_ & 0x8040) _mm_setcsr(saved_);
  }

 private:
  unsigned saved_;
#endif
};

const Kernels& find_kernels(const std::string& isa) {
#if defined(__x86_64__)
  const auto isas = supported_isas();
  if (std::find(isas.begin(), isas.end(), isa) == isas.end())
    throw std::invalid_argument("this machine cannot run ISA variant '" + isa + "'");
  if (isa == "avx512bf16") return kernels_avx512bf16;
  if (isa == "avx512") return kernels_avx512;
  if (isa == "avx2") return kernels_avx2;
#else
  if (isa != "portable") throw std::invalid_argument("this build has no ISA variant '" + isa + "'");
#endif
  return kernels_portable;
}

// Pieces of `unit_bytes` items for `threads`: small enough to balance, large enough to be worth a hand-over.
int grain_of(int count, size_t unit_bytes, int threads) {
  const int by_size = static_cast<int>(std::max<size_t>(1, kPieceBytes / std::max<size_t>(1, unit_bytes)));
  const int by_balance = std::max(1, count / (2 * threads));
  return std::min(by_size, by_balance);
}

template <class Args, void (*Kernels::*kernel)(const Args&, int, int)>
struct Call {
  const Kernels* kernels;
  const Args* args;
  static void work(const void* context, int begin, int end, int) {
    const PlainFloats guard;
    const auto* call = static_cast<const Call*>(context);
    (call->kernels->*kernel)(*call->args, begin, end);
  }
};

template <class Args, void (*Kernels::*kernel)(const Args&, int, int)>
void parallel(Pool& pool, const Kernels& kernels, const Args& args, int count, int grain) {
  const Call<Args, kernel> call{&kernels, &args};
  pool.run(Call<Args, kernel>::work, &call, count, grain);
}

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

size_t type_bytes(Type t) { return t == Type::f32 ? 4 : t == Type::e4m3 ? 1 : 2; }

// Rows a thread takes of an op that does little per row: about 16 KiB at a time.
int row_grain(size_t row_bytes) { return static_cast<int>(std::max<size_t>(1, 16384 / std::max<size_t>(1, row_bytes))); }

}  // namespace

Scratch::~Scratch() { std::free(data_); }

void* Scratch::bytes(size_t size) {
  if (size > size_) {
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
    const size_t alignment = size >= kHugePage ? kHugePage : 64;
    const size_t rounded = (size + alignment - 1) / alignment * alignment;
    data_ = std::aligned_alloc(alignment, rounded);
    if (!data_) throw std::bad_alloc();
    size_ = rounded;
#if defined(MADV_HUGEPAGE)
    if (alignment == kHugePage) (void)madvise(data_, rounded, MADV_HUGEPAGE);
#endif
  }
  return data_;
}

PackedNVFP4::PackedNVFP4(const uint8_t* codes, const uint8_t* scales, const float* row_scale_in, const float* bias_in,
                         int n_in, int k_in, float input_scale_in)
    : n(n_in), k(k_in), input_scale(input_scale_in), has_bias(bias_in != nullptr) {
  const int panels = (n + kPanel - 1) / kPanel, groups = k / kGroup;
  const size_t panel = panel_bytes(k);
  bytes = panel * panels;
  panels_ = static_cast<uint8_t*>(weights.bytes(bytes));
  std::memset(panels_, 0, bytes);
  for (int r = 0; r < n; r++)
    for (int g = 0; g < groups; g++) {
      uint8_t* block = panels_ + (r / kPanel) * panel + static_cast<size_t>(g / 4) * kBlockBytes;
      const uint8_t scale = scales[static_cast<size_t>(r) * groups + g];
      if ((scale & 0x7f) == 0x7f)
        throw std::invalid_argument("block scale [" + std::to_string(r) + ", " + std::to_string(g) +
                                    "] is NaN; expected finite values: quantise the layer again");
      block[16 * (g % 4) + r % kPanel] = scale & 0x7f;
      const uint8_t flip = scale & 0x80 ? 0x88 : 0;  // a negative scale: the codes carry the sign
      const uint8_t* from = codes + static_cast<size_t>(r) * (k / 2) + g * (kGroup / 2);
      for (int half = 0; half < 2; half++) {
        uint8_t nibbles[8];
        for (int i = 0; i < 4; i++) {
          const uint8_t b = from[4 * half + i] ^ flip;
          nibbles[2 * i] = b & 15;
          nibbles[2 * i + 1] = b >> 4;
        }
        uint8_t* to = block + 64 + 128 * (g % 4) + 64 * half + 4 * (r % kPanel);
        for (int i = 0; i < 4; i++) to[i] = static_cast<uint8_t>(nibbles[i] | nibbles[4 + i] << 4);
      }
    }
  row_scales_ = row_scale.floats(static_cast<size_t>(panels) * kPanel);
  biases_ = has_bias ? bias.floats(static_cast<size_t>(panels) * kPanel) : nullptr;
  for (int r = 0; r < panels * kPanel; r++) {
    row_scales_[r] = r < n ? row_scale_in[r] * 256.f : 0.f;  // 2^8: the kernel's block scales are 2^-8 of theirs
    if (biases_) biases_[r] = r < n ? bias_in[r] : 0.f;
  }
  bytes += static_cast<size_t>(panels) * kPanel * sizeof(float) * (has_bias ? 2 : 1);
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> isas;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi")) {
    isas.push_back("avx512");
    // vdpbf16ps does twice the work of an FP32 multiply-add. AMD issues both at one rate; Intel's Emerald Rapids issues
    // it at less than a quarter (0.46 against 2 a cycle), so there it is available but not preferred.
    if (__builtin_cpu_supports("avx512bf16"))
      isas.insert(__builtin_cpu_is("amd") ? isas.begin() : isas.end(), "avx512bf16");
  }
  if (avx2) isas.push_back("avx2");
#endif
  isas.push_back("portable");
  return isas;
}

Context::Context(int threads, const std::string& isa)
    : kernels_(find_kernels(isa.empty() ? supported_isas().front() : isa)), pool_(threads) {
  per_thread_.resize(static_cast<size_t>(pool_.threads()));
}

void Context::linear_nvfp4(const PackedNVFP4& w, const void* x, Type type, int m, void* out, Type out_type) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const bool quantised = w.input_scale != 0.f;
  const int whole = kRowsAtOnce / kernels_.max_rows * kernels_.max_rows;
  for (int first = 0; first < m; first += whole) {
    const int rows = std::min(whole, m - first);
    const int blocks = (rows + kernels_.max_rows - 1) / kernels_.max_rows;
    const size_t stored = static_cast<size_t>(blocks) * kernels_.max_rows;
    PackX pack{};
    pack.x = static_cast<const char*>(x) + static_cast<size_t>(first) * w.k * type_bytes(type);
    pack.type = type;
    pack.m = rows;
    pack.k = w.k;
    pack.input_scale = w.input_scale;
    pack.packed = x_.floats(stored * w.k);
    pack.scales = quantised ? scales_.floats(stored * (w.k / kGroup)) : nullptr;
    parallel<PackX, &Kernels::pack_x>(pool_, kernels_, pack, blocks, 1);
    LinearNVFP4 a{};
    a.weights = w.data();
    a.row_scale = w.scale_data();
    a.bias = w.bias_data();
    a.x = pack.packed;
    a.pairs = kernels_.pairs && type == Type::bf16;
    a.scales = pack.scales;
    a.m = rows;
    a.n = w.n;
    a.k = w.k;
    a.out = static_cast<char*>(out) + static_cast<size_t>(first) * w.n * type_bytes(out_type);
    a.out_type = out_type;
    const int panels = (w.n + kPanel - 1) / kPanel;
    parallel<LinearNVFP4, &Kernels::linear_nvfp4>(pool_, kernels_, a, panels,
                                                  grain_of(panels, panel_bytes(w.k), pool_.threads()));
  }
}

void Context::linear_dense(const void* w, Type w_type, const float* bias, const void* x, Type type, int m, int n, int k,
                           void* out, Type out_type) {
  const std::lock_guard<std::mutex> lock(mutex_);
  LinearDense a{};
  a.stride = round16(k);
  const bool direct = type == Type::f32 && k % 16 == 0;
  for (int first = 0; first < m; first += kRowsAtOnce) {
    const int rows = std::min(kRowsAtOnce, m - first);
    const char* from = static_cast<const char*>(x) + static_cast<size_t>(first) * k * type_bytes(type);
    if (kernels_.pairs && type == Type::bf16 && w_type == Type::bf16) {
      a.pairs = reinterpret_cast<const bf16*>(from);
    } else if (!direct) {
      Widen widen{from, type, rows, k, a.stride, x_.floats(static_cast<size_t>(rows) * a.stride)};
      parallel<Widen, &Kernels::widen>(pool_, kernels_, widen, rows, row_grain(static_cast<size_t>(k) * 4));
      a.x = widen.out;
    } else {
      a.x = reinterpret_cast<const float*>(from);
    }
    a.weights = w;
    a.weight_type = w_type;
    a.bias = bias;
    a.m = rows;
    a.n = n;
    a.k = k;
    a.out = static_cast<char*>(out) + static_cast<size_t>(first) * n * type_bytes(out_type);
    a.out_type = out_type;
    int grain = grain_of(n, static_cast<size_t>(k) * type_bytes(w_type), pool_.threads());
    if (grain > 8) grain = grain / 8 * 8;  // whole tiles
    parallel<LinearDense, &Kernels::linear_dense>(pool_, kernels_, a, n, grain);
  }
}

void Context::rms_norm(const RMSNorm& a, int rows) {
  const std::lock_guard<std::mutex> lock(mutex_);
  parallel<RMSNorm, &Kernels::rms_norm>(pool_, kernels_, a, rows, row_grain(static_cast<size_t>(a.width) * 4));
}

void Context::silu_mul(const SiluMul& a, int rows) {
  const std::lock_guard<std::mutex> lock(mutex_);
  parallel<SiluMul, &Kernels::silu_mul>(pool_, kernels_, a, rows, row_grain(static_cast<size_t>(a.width) * 4));
}

void Context::rope(const Rope& a, int rows, int64_t num_slots, int64_t num_positions) {
  for (int t = 0; t < rows; t++) {
    if (a.slots[t] < 0 || a.slots[t] >= num_slots)
      throw std::out_of_range("slot_mapping[" + std::to_string(t) + "] is " + std::to_string(a.slots[t]) +
                              "; the cache has slots 0 to " + std::to_string(num_slots - 1));
    if (a.positions[t] < 0 || a.positions[t] >= num_positions)
      throw std::out_of_range("positions[" + std::to_string(t) + "] is " + std::to_string(a.positions[t]) +
                              "; the cos and sin tables hold " + std::to_string(num_positions) + " positions");
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  const size_t row = static_cast<size_t>(a.heads + 2 * a.kv_heads) * a.head_dim * 4;
  parallel<Rope, &Kernels::rope>(pool_, kernels_, a, rows, row_grain(row));
}

void Context::attention(Attention& a, const int32_t* cu_seqlens, const int32_t* seq_lens, int sequences, int rows,
                        int num_blocks) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (cu_seqlens[0] != 0 || cu_seqlens[sequences] != rows)
    throw std::out_of_range("cu_seqlens_q runs from " + std::to_string(cu_seqlens[0]) + " to " +
                            std::to_string(cu_seqlens[sequences]) + "; q has " + std::to_string(rows) + " rows");
  for (int b = 0; b < sequences; b++) {
    const int tokens = cu_seqlens[b + 1] - cu_seqlens[b], length = seq_lens[b];
    if (tokens < 0 || length < tokens)
      throw std::out_of_range("sequence " + std::to_string(b) + " has " + std::to_string(tokens) +
                              " new tokens and seq_lens " + std::to_string(length));
    if (tokens == 0) continue;
    const int used = (length + a.block_size - 1) / a.block_size;
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

void Context::quantize(const PackX& a, uint8_t* codes, uint8_t* scales) {
  const PlainFloats guard;
  kernels_.quantize(a, codes, scales);
}

}  // namespace nvfp4
