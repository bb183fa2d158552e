#include "context.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace nvfp4 {
namespace {

constexpr int kRowsAtOnce = 480;             // prefill rows kept widened: 480 x 1536 x 4 bytes = 2.8 MiB
constexpr int kPlainRowsAtOnce = 512;        // the same for plain weights: 512 x 2048 x 2 bytes = 2 MiB
constexpr size_t kPieceBytes = 96 * 1024;  // weights a thread takes at a time

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
#elif defined(__aarch64__)
  PlainFloats() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    if (saved_ & kFlush) set(saved_ & ~kFlush);
  }
  ~PlainFloats() {
    if (saved_ & kFlush) set(saved_);
  }

 private:
  static constexpr uint64_t kFlush = 1u << 24;
  static void set(uint64_t fpcr) { asm volatile("msr fpcr, %0" : : "r"(fpcr)); }
  uint64_t saved_;
#endif
};

#if defined(__aarch64__)
bool has_dot_products() {
#if defined(__linux__)
  constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP of the Linux ABI
  return getauxval(AT_HWCAP) & kDotProducts;
#elif defined(__APPLE__)
  return true;  // since the first of Apple's 64-bit desktop processors
#else
  return false;
#endif
}
#endif

const Kernels& find_kernels(const std::string& isa) {
  const auto isas = supported_isas();
  if (std::find(isas.begin(), isas.end(), isa) == isas.end())
    throw std::invalid_argument("this machine cannot run ISA variant '" + isa + "'");
#if defined(__x86_64__)
  if (isa == "avx512bf16") return kernels_avx512bf16;
  if (isa == "avx512") return kernels_avx512;
  if (isa == "avx2") return kernels_avx2;
#elif defined(__aarch64__)
  if (isa == "dotprod") return kernels_dotprod;
  if (isa == "neon") return kernels_neon;
#endif
  return kernels_portable;
}

// Pieces of `unit_bytes` items for `threads`: small enough to balance, large enough to be worth a hand-over.
int grain_of(int count, size_t unit_bytes, int threads) {
  const int by_size = static_cast<int>(std::max<size_t>(1, kPieceBytes / std::max<size_t>(1, unit_bytes)));
  const int by_balance = std::max(1, count / (4 * threads));
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

struct ExpertsCall {
  const Kernels* kernels;
  const PackX* packs;
  const LinearNVFP4* linears;
  const std::vector<ExpertPiece>* pieces;
  static void pack(const void* context, int begin, int end, int) {
    const PlainFloats guard;
    const auto* call = static_cast<const ExpertsCall*>(context);
    for (int i = begin; i < end; i++) {
      const ExpertPiece& piece = (*call->pieces)[static_cast<size_t>(i)];
      call->kernels->pack_x(call->packs[piece.expert], piece.begin, piece.end);
    }
  }
  static void multiply(const void* context, int begin, int end, int) {
    const PlainFloats guard;
    const auto* call = static_cast<const ExpertsCall*>(context);
    for (int i = begin; i < end; i++) {
      const ExpertPiece& piece = (*call->pieces)[static_cast<size_t>(i)];
      call->kernels->linear_nvfp4(call->linears[piece.expert], piece.begin, piece.end);
    }
  }
};

struct PlainCall {
  const Kernels* kernels;
  const LinearPlain* args;
  float* const* scratch;
  static void work(const void* context, int begin, int end, int thread) {
    const PlainFloats guard;
    const auto* call = static_cast<const PlainCall*>(context);
    call->kernels->linear_plain(*call->args, begin, end, call->scratch[thread]);
  }
};

// Rows a thread takes of an op that does little per row: about 16 KiB at a time.
int row_grain(size_t row_bytes) { return static_cast<int>(std::max<size_t>(1, 16384 / std::max<size_t>(1, row_bytes))); }

}  // namespace

int64_t find_nan_e4m3(const uint8_t* codes, int64_t count) {
  constexpr int64_t piece = 4096;  // a loop without an exit, which the compiler vectorises
  for (int64_t i = 0; i < count; i += piece) {
    const int64_t end = std::min(count, i + piece);
    uint8_t found = 0;
    for (int64_t j = i; j < end; j++) found |= (codes[j] & 0x7f) == 0x7f;
    if (!found) continue;
    for (int64_t j = i; j < end; j++)
      if ((codes[j] & 0x7f) == 0x7f) return j;
  }
  return -1;
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
#elif defined(__aarch64__)
  if (has_dot_products()) isas.push_back("dotprod");
  isas.push_back("neon");
#endif
  isas.push_back("portable");
  return isas;
}

Context::Context(int threads, const std::string& isa)
    : kernels_(find_kernels(isa.empty() ? supported_isas().front() : isa)), pool_(threads) {
  per_thread_.resize(static_cast<size_t>(pool_.threads()));
}

const char* Context::sixteen_bit() const {
  switch (kernels_.sixteen_bit) {
    case Operand::pairs: return "bfloat16 pairs";
    case Operand::digits: return "two int8 digits";
    default: return "float32";
  }
}

std::unique_ptr<PackedNVFP4> Context::pack(const std::vector<NVFP4Rows>& parts, const float* row_scale,
                                           const float* bias, int k, Numerics numerics, float input_scale, bool e8m0) {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  return std::make_unique<PackedNVFP4>(pool_, parts, row_scale, bias, k, numerics, input_scale, e8m0);
}

Operand Context::operand_of(const PackedNVFP4& w, Type type) const {
  return w.numerics == Numerics::w4a4   ? Operand::nvfp4
         : w.numerics == Numerics::w4a8 ? Operand::int8
         : type == Type::bf16           ? kernels_.sixteen_bit
                                        : Operand::floats;
}

void Context::linear_nvfp4(const PackedNVFP4& w, const void* x, Type type, int m, void* out, Type out_type) {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  const Operand operand = operand_of(w, type);
  const int most = kernels_.max_rows(operand), whole = kRowsAtOnce / most * most;
  for (int first = 0; first < m; first += whole) {
    const int rows = std::min(whole, m - first), blocks = (rows + most - 1) / most;
    PackX pack{};
    pack.x = static_cast<const char*>(x) + static_cast<size_t>(first) * w.k * type_bytes(type);
    pack.type = type;
    pack.m = rows;
    pack.k = w.k;
    pack.operand = operand;
    pack.input_scale = w.input_scale;
    pack.packed = static_cast<uint32_t*>(
        x_.bytes(static_cast<size_t>(blocks) * most * (w.k / kGroup) * words_per_group(operand) * sizeof(uint32_t)));
    parallel<PackX, &Kernels::pack_x>(pool_, kernels_, pack, blocks, 1);
    LinearNVFP4 a{};
    a.weights = w.data();
    a.e8m0 = w.e8m0;
    a.row_scale = w.row_scale();
    a.bias = w.bias();
    a.x = pack.packed;
    a.operand = operand;
    a.m = rows;
    a.n = w.n;
    a.k = w.k;
    a.out = static_cast<char*>(out) + static_cast<size_t>(first) * w.n * type_bytes(out_type);
    a.out_type = out_type;
    parallel<LinearNVFP4, &Kernels::linear_nvfp4>(pool_, kernels_, a, w.panels(),
                                                  grain_of(w.panels(), panel_bytes(w.k), pool_.threads()));
  }
}

ExpertsNVFP4::ExpertsNVFP4(std::vector<const PackedNVFP4*> e) : experts(std::move(e)) {
  for (const auto* w : experts)
    if (w->n != experts[0]->n || w->k != experts[0]->k || w->numerics != experts[0]->numerics ||
        w->e8m0 != experts[0]->e8m0)
      throw std::invalid_argument("experts differ in shape, format or numerics");
}

void Context::grouped_nvfp4(const ExpertsNVFP4& w, const void* x, Type type, const int32_t* offsets, int rows, void* out,
                            Type out_type) {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  if (rows == 0) return;
  const PackedNVFP4& one = *w.experts[0];
  const int n = one.n, k = one.k;
  const Operand operand = operand_of(one, type);
  const int most = kernels_.max_rows(operand);
  const size_t row_words = static_cast<size_t>(k / kGroup) * words_per_group(operand);
  size_t stored = 0;  // rows of x as packed: every expert begins a block
  for (size_t e = 0; e < w.experts.size(); e++)
    stored += static_cast<size_t>((offsets[e + 1] - offsets[e] + most - 1) / most * most);
  uint32_t* packed = static_cast<uint32_t*>(x_.bytes(stored * row_words * sizeof(uint32_t)));
  expert_packs_.clear();
  expert_linears_.clear();
  expert_pieces_.clear();
  for (size_t e = 0; e < w.experts.size(); e++) {
    const int m = offsets[e + 1] - offsets[e], blocks = (m + most - 1) / most;
    if (m == 0) continue;
    const PackedNVFP4& weight = *w.experts[e];
    PackX pack{};
    pack.x = static_cast<const char*>(x) + static_cast<size_t>(offsets[e]) * k * type_bytes(type);
    pack.type = type;
    pack.m = m;
    pack.k = k;
    pack.operand = operand;
    pack.input_scale = weight.input_scale;
    pack.packed = packed;
    LinearNVFP4 a{};
    a.weights = weight.data();
    a.e8m0 = weight.e8m0;
    a.row_scale = weight.row_scale();
    a.bias = weight.bias();
    a.x = packed;
    a.operand = operand;
    a.m = m;
    a.n = n;
    a.k = k;
    a.out = static_cast<char*>(out) + static_cast<size_t>(offsets[e]) * n * type_bytes(out_type);
    a.out_type = out_type;
    for (int b = 0; b < blocks; b++) expert_pieces_.push_back({static_cast<int>(expert_packs_.size()), b, b + 1});
    expert_packs_.push_back(pack);
    expert_linears_.push_back(a);
    packed += static_cast<size_t>(blocks) * most * row_words;
  }
  const ExpertsCall call{&kernels_, expert_packs_.data(), expert_linears_.data(), &expert_pieces_};
  pool_.run(ExpertsCall::pack, &call, static_cast<int>(expert_pieces_.size()), 1);
  const int panels = one.panels(), active = static_cast<int>(expert_linears_.size());
  const int grain = grain_of(panels * active, panel_bytes(k), pool_.threads());
  expert_pieces_.clear();
  for (int e = 0; e < active; e++)
    for (int p = 0; p < panels; p += grain) expert_pieces_.push_back({e, p, std::min(panels, p + grain)});
  pool_.run(ExpertsCall::multiply, &call, static_cast<int>(expert_pieces_.size()), 1);
}

void Context::linear_plain(LinearPlain a, const void* x, Type type, int m, void* out, Type out_type) {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  a.pairs = kernels_.pairs && type == Type::bf16 && (a.weight_type == Type::bf16 || a.weight_type == Type::e4m3);
  a.out_type = out_type;
  const size_t packed_row = static_cast<size_t>(plain_vectors(a.k, a.pairs)) * 64;
  const int groups = (a.n + 15) / 16;
  const int grain = grain_of(groups, static_cast<size_t>(a.k) * 16 * type_bytes(a.weight_type), pool_.threads());
  for (int first = 0; first < m; first += kPlainRowsAtOnce) {
    const int rows = std::min(kPlainRowsAtOnce, m - first);
    const int panels = rows <= kernels_.plain_first ? 1 : (rows + kernels_.plain_width - 1) / kernels_.plain_width;
    const int width = (rows + panels - 1) / panels;
    PackPlain pack{};
    pack.x = static_cast<const char*>(x) + static_cast<size_t>(first) * a.k * type_bytes(type);
    pack.type = type;
    pack.weight_type = a.weight_type;
    pack.m = rows;
    pack.k = a.k;
    pack.width = width;
    pack.packed = x_.bytes(packed_row * rows);
    parallel<PackPlain, &Kernels::pack_plain>(pool_, kernels_, pack, (rows + width - 1) / width,
                                              row_grain(packed_row * width));
    a.x = pack.packed;
    a.m = rows;
    a.width = width;
    a.out = static_cast<char*>(out) + static_cast<size_t>(first) * a.n * type_bytes(out_type);
    addresses_.clear();
    const size_t scratch = rows <= kernels_.plain_first ? 0 : plain_scratch(a.k, a.pairs);
    for (auto& s : per_thread_) addresses_.push_back(static_cast<float*>(s.bytes(scratch)));
    const PlainCall call{&kernels_, &a, addresses_.data()};
    pool_.run(PlainCall::work, &call, groups, grain);
  }
}

void Context::quantize_weight(const QuantizeWeight& a) {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  parallel<QuantizeWeight, &Kernels::quantize_weight>(pool_, kernels_, a, a.n,
                                                      row_grain(static_cast<size_t>(a.k) * type_bytes(a.type)));
}

void Context::convert(const void* from, Type type, void* to, Type to_type, int count) {
  const PlainFloats guard;
  kernels_.convert(from, type, to, to_type, count);
}

void Context::rms_norm(const RMSNorm& a, int rows) {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  parallel<RMSNorm, &Kernels::rms_norm>(pool_, kernels_, a, rows, row_grain(static_cast<size_t>(a.width) * 4));
}

void Context::silu_mul(const SiluMul& a, int rows) {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
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
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  const size_t row = static_cast<size_t>(a.heads + 2 * a.kv_heads) * a.head_dim * 4;
  parallel<Rope, &Kernels::rope>(pool_, kernels_, a, rows, row_grain(row));
}

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

void Context::quantize(const PackX& a, uint8_t* codes, uint8_t* scales) {
  const PlainFloats guard;
  kernels_.quantize(a, codes, scales);
}

}  // namespace nvfp4
