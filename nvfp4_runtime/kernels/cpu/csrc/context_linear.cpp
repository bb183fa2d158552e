// Linear layers: activations packed once for all threads, then pieces of the weight.
#include "context.h"
#include "parallel.h"

namespace nvfp4 {
namespace {

constexpr size_t kMostBytes = 1024 * 1024;  // weights a thread takes at a time where pieces halve; more gives no more
constexpr int kRowsAtOnce = 528;       // prefill rows kept packed: 528 x 2048 x 1.5 bytes = 1.6 MB of W4A8

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
  return std::make_unique<PackedNVFP4>(pool_, arena_, parts, row_scale, bias, k, numerics, input_scale, e8m0);
}

Operand Context::operand_of(const PackedNVFP4& w, Type type) const {
  return w.numerics == Numerics::w4a4   ? Operand::nvfp4
         : w.numerics == Numerics::w4a8 ? Operand::int8
         : type == Type::bf16           ? kernels_.sixteen_bit
                                        : Operand::floats;
}

Pieces Context::weight_pieces(int count, size_t unit_bytes, bool few, int side_by_side) const {
  if (few && kernels_.streams > 1) {
    const int grain = std::min(side_by_side, std::max(1, count / (2 * threads())));
    return {grain, std::max(grain, static_cast<int>(kMostBytes / std::max<size_t>(1, unit_bytes)))};
  }
  return grain_of(count, unit_bytes, threads());
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
    pack.packed = static_cast<uint32_t*>(x_.bytes(kernels_.packed_words(operand, rows, w.k) * sizeof(uint32_t)));
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
    a.ask = ask_;
    parallel<LinearNVFP4, &Kernels::linear_nvfp4>(pool_, kernels_, a, w.panels(),
                                                  weight_pieces(w.panels(), panel_bytes(w.k), rows <= kernels_.streamed_rows,
                                                                kernels_.streams));
  }
}

void Context::linear_plain(LinearPlain a, const void* x, Type type, int m, void* out, Type out_type) {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  a.pairs = kernels_.pairs && type == Type::bf16 && (a.weight_type == Type::bf16 || a.weight_type == Type::e4m3);
  a.out_type = out_type;
  const size_t packed_row = static_cast<size_t>(plain_vectors(a.k, a.pairs)) * 64;
  const int groups = (a.n + 15) / 16;
  // one group alone is read in several places, too
  const Pieces pieces = weight_pieces(groups, static_cast<size_t>(a.k) * 16 * type_bytes(a.weight_type), m <= kernels_.plain_first, 1);
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
    pool_.run(PlainCall::work, &call, groups, pieces);
  }
}

void Context::quantize_weight(const QuantizeWeight& a) {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  parallel<QuantizeWeight, &Kernels::quantize_weight>(pool_, kernels_, a, a.n,
                                                      row_grain(static_cast<size_t>(a.k) * type_bytes(a.type)));
}

}  // namespace nvfp4
