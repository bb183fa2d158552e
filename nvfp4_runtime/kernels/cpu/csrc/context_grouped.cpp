// Many weights over rows sorted by weight: the rows of all are packed once, then the threads share the pieces of all weights at
// once, so that weights with few rows leave no thread idle.
#include <utility>

#include "context.h"
#include "parallel.h"

namespace nvfp4 {
namespace {

// Items begin .. end - 1 of all experts' one after the other, `each` of them an expert's: f(expert, begin, end) for every expert.
template <class F>
void by_expert(int each, int begin, int end, F&& f) {
  while (begin < end) {
    const int expert = begin / each, first = begin % each, last = std::min(each, first + end - begin);
    f(expert, first, last);
    begin += last - first;
  }
}

struct ExpertsCall {
  const Kernels* kernels;
  const PackX* packs;
  const LinearNVFP4* linears;
  const std::vector<ExpertBlock>* blocks;
  int panels;
  static void pack(const void* context, int begin, int end, int) {
    const PlainFloats guard;
    const auto* call = static_cast<const ExpertsCall*>(context);
    for (int i = begin; i < end; i++) {
      const ExpertBlock& b = (*call->blocks)[static_cast<size_t>(i)];
      call->kernels->pack_x(call->packs[b.expert], b.block, b.block + 1);
    }
  }
  static void multiply(const void* context, int begin, int end, int) {
    const PlainFloats guard;
    const auto* call = static_cast<const ExpertsCall*>(context);
    by_expert(call->panels, begin, end, [&](int expert, int first, int last) {
      call->kernels->linear_nvfp4(call->linears[expert], first, last);
    });
  }
};

struct PlainExpertsCall {
  const Kernels* kernels;
  const PackPlain* packs;
  const LinearPlain* linears;
  const std::vector<ExpertBlock>* blocks;
  int groups;
  float* const* scratch;
  static void pack(const void* context, int begin, int end, int) {
    const PlainFloats guard;
    const auto* call = static_cast<const PlainExpertsCall*>(context);
    for (int i = begin; i < end; i++) {
      const ExpertBlock& b = (*call->blocks)[static_cast<size_t>(i)];
      call->kernels->pack_plain(call->packs[b.expert], b.block, b.block + 1);
    }
  }
  static void multiply(const void* context, int begin, int end, int thread) {
    const PlainFloats guard;
    const auto* call = static_cast<const PlainExpertsCall*>(context);
    by_expert(call->groups, begin, end, [&](int expert, int first, int last) {
      call->kernels->linear_plain(call->linears[expert], first, last, call->scratch[thread]);
    });
  }
};

// Pieces of about as many items of which a whole number makes an expert's `count`, where that is possible.
Pieces alike(int count, Pieces pieces) {
  if (pieces.most) return pieces;
  const int each = std::max(1, (count + pieces.grain / 2) / pieces.grain);
  return (count + each - 1) / each;
}

}  // namespace

Experts::Experts(const std::vector<const Linear*>& e) {
  for (const Linear* w : e) {
    if (w->n != e[0]->n || w->k != e[0]->k) throw std::invalid_argument("experts differ in shape");
    if (const auto* p = dynamic_cast<const PackedNVFP4*>(w)) packed.push_back(p);
    if (const auto* p = dynamic_cast<const PlainWeight*>(w)) plain.push_back(p);
  }
  if (e.empty() || (packed.size() != e.size() && plain.size() != e.size()))
    throw std::invalid_argument("experts differ in format");
  for (const auto* w : packed)
    if (w->numerics != packed[0]->numerics || w->e8m0 != packed[0]->e8m0)
      throw std::invalid_argument("experts differ in format or numerics");
  for (const auto* w : plain)
    if (w->weight.weight_type != plain[0]->weight.weight_type) throw std::invalid_argument("experts differ in type");
  n = e[0]->n;
  k = e[0]->k;
}

void Context::grouped(const Experts& w, const void* x, Type type, const int32_t* offsets, int rows, void* out,
                      Type out_type, bool same_row) {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  if (rows == 0) return;
  w.plain.empty() ? grouped_nvfp4(w.packed, x, type, offsets, out, out_type, same_row)
                  : grouped_plain(w.plain, x, type, offsets, out, out_type, same_row);
}

void Context::grouped_nvfp4(const std::vector<const PackedNVFP4*>& w, const void* x, Type type, const int32_t* offsets,
                            void* out, Type out_type, bool same_row) {
  const PackedNVFP4& one = *w[0];
  const int n = one.n, k = one.k;
  const Operand operand = operand_of(one, type);
  const int most = kernels_.max_rows(operand);
  size_t stored = 0;  // words of x as packed: every expert begins a block
  for (size_t e = 0; e < w.size(); e++)
    if (const int m = offsets[e + 1] - offsets[e]) {
      stored += kernels_.packed_words(operand, m, k);
      w[e]->ask_for();  // of all experts at once: each would be waited for below
    }
  uint32_t* packed = static_cast<uint32_t*>(x_.bytes(stored * sizeof(uint32_t)));
  expert_packs_.clear();
  expert_linears_.clear();
  expert_blocks_.clear();
  for (size_t e = 0; e < w.size(); e++) {
    const int m = offsets[e + 1] - offsets[e], blocks = (m + most - 1) / most;
    if (m == 0) continue;
    const PackedNVFP4& weight = *w[e];
    const size_t first = same_row ? 0 : static_cast<size_t>(offsets[e]);
    PackX pack{};
    pack.x = static_cast<const char*>(x) + first * k * type_bytes(type);
    pack.type = type;
    pack.m = m;
    pack.k = k;
    pack.operand = operand;
    pack.input_scale = weight.input_scale;
    pack.packed = packed;
    // only W4A4 takes x by the weight's own scale
    const bool packed_already = same_row && !expert_packs_.empty() &&
                                (operand != Operand::nvfp4 || pack.input_scale == expert_packs_[0].input_scale);
    LinearNVFP4 a{};
    a.weights = weight.data();
    a.e8m0 = weight.e8m0;
    a.row_scale = weight.row_scale();
    a.bias = weight.bias();
    a.x = packed_already ? expert_packs_[0].packed : packed;
    a.operand = operand;
    a.m = m;
    a.n = n;
    a.k = k;
    a.out = static_cast<char*>(out) + static_cast<size_t>(offsets[e]) * n * type_bytes(out_type);
    a.out_type = out_type;
    a.ask = ask_;
    expert_linears_.push_back(a);
    if (packed_already) continue;
    for (int b = 0; b < blocks; b++) expert_blocks_.push_back({static_cast<int>(expert_packs_.size()), b});
    expert_packs_.push_back(pack);
    packed += kernels_.packed_words(operand, m, k);
  }
  const int panels = one.panels(), active = static_cast<int>(expert_linears_.size());
  const ExpertsCall call{&kernels_, expert_packs_.data(), expert_linears_.data(), &expert_blocks_, panels};
  pool_.run(ExpertsCall::pack, &call, static_cast<int>(expert_blocks_.size()), 1);
  const bool few = offsets[w.size()] <= active * kernels_.streamed_rows;
  pool_.run(ExpertsCall::multiply, &call, panels * active,
            alike(panels, weight_pieces(panels * active, panel_bytes(k), few, kernels_.streams)));
}

void Context::grouped_plain(const std::vector<const PlainWeight*>& w, const void* x, Type type, const int32_t* offsets,
                            void* out, Type out_type, bool same_row) {
  const LinearPlain& one = w[0]->weight;
  const int n = one.n, k = one.k;
  const bool pairs = kernels_.pairs && type == Type::bf16 && (one.weight_type == Type::bf16 || one.weight_type == Type::e4m3);
  const size_t packed_row = static_cast<size_t>(plain_vectors(k, pairs)) * 64;
  const size_t x_row = static_cast<size_t>(k) * type_bytes(type), out_row = static_cast<size_t>(n) * type_bytes(out_type);
  int most = 0;
  for (size_t e = 0; e < w.size(); e++) most = std::max(most, offsets[e + 1] - offsets[e]);
  if (most > kPlainRowsAtOnce) {  // each of them keeps the threads busy
    for (size_t e = 0; e < w.size(); e++) {
      const size_t first = static_cast<size_t>(offsets[e]);
      if (offsets[e + 1] > offsets[e])
        linear_plain(w[e]->weight, static_cast<const char*>(x) + first * x_row, type, offsets[e + 1] - offsets[e],
                     static_cast<char*>(out) + first * out_row, out_type);
    }
    return;
  }
  char* packed = static_cast<char*>(x_.bytes(packed_row * static_cast<size_t>(offsets[w.size()])));
  plain_packs_.clear();
  plain_linears_.clear();
  expert_blocks_.clear();
  for (size_t e = 0; e < w.size(); e++) {
    const int m = offsets[e + 1] - offsets[e];
    if (m == 0) continue;
    const size_t first = static_cast<size_t>(offsets[e]);
    const int panels = m <= kernels_.plain_first ? 1 : (m + kernels_.plain_width - 1) / kernels_.plain_width;
    const int width = (m + panels - 1) / panels, pack = static_cast<int>(plain_packs_.size());
    char* to = same_row ? packed : packed + first * packed_row;
    if (!same_row || pack == 0) {
      plain_packs_.push_back({static_cast<const char*>(x) + (same_row ? 0 : first * x_row), type, one.weight_type, m, k, width, to});
      for (int p = 0; p < (m + width - 1) / width; p++) expert_blocks_.push_back({pack, p});
    }
    LinearPlain a = w[e]->weight;
    a.pairs = pairs;
    a.out_type = out_type;
    a.x = to;
    a.m = m;
    a.width = width;
    a.out = static_cast<char*>(out) + first * out_row;
    plain_linears_.push_back(a);
  }
  addresses_.clear();
  const size_t scratch = most <= kernels_.plain_first ? 0 : plain_scratch(k, pairs);
  for (auto& s : per_thread_) addresses_.push_back(static_cast<float*>(s.bytes(scratch)));
  const int groups = (n + 15) / 16, active = static_cast<int>(plain_linears_.size());
  const PlainExpertsCall call{&kernels_, plain_packs_.data(), plain_linears_.data(), &expert_blocks_, groups, addresses_.data()};
  pool_.run(PlainExpertsCall::pack, &call, static_cast<int>(expert_blocks_.size()), row_grain(packed_row));
  const size_t unit = static_cast<size_t>(k) * 16 * type_bytes(one.weight_type);
  pool_.run(PlainExpertsCall::multiply, &call, groups * active,
            alike(groups, weight_pieces(groups * active, unit, most <= kernels_.plain_first, 1)));
}

}  // namespace nvfp4
