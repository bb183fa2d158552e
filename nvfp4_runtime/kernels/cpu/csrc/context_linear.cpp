// Linear layers: activations packed once for all threads, then pieces of the weight.
#include <utility>

#include "context.h"
#include "parallel.h"

namespace nvfp4 {
namespace {

constexpr int kRowsAtOnce = 528;       // prefill rows kept packed: 528 x 2048 x 1.5 bytes = 1.6 MB of W4A8
constexpr int kPlainRowsAtOnce = 512;  // the same for plain weights: 512 x 2048 x 2 bytes = 2 MiB

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

}  // namespace nvfp4
