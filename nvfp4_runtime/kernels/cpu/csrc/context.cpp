#include "context.h"

#include "isa.h"
#include "parallel.h"

namespace nvfp4 {

Context::Context(int threads, const std::string& isa)
    : kernels_(find_kernels(isa.empty() ? supported_isas().front() : isa)), ask_(gains_by_asking()), pool_(threads) {
  per_thread_.resize(static_cast<size_t>(pool_.threads()));
}

const char* Context::sixteen_bit() const {
  switch (kernels_.sixteen_bit) {
    case Operand::pairs: return "bfloat16 pairs";
    case Operand::digits: return "two int8 digits";
    default: return "float32";
  }
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

void Context::quantize(const PackX& a, uint8_t* codes, uint8_t* scales) {
  const PlainFloats guard;
  kernels_.quantize(a, codes, scales);
}

}  // namespace nvfp4
