// The ops as the binding sees them: one context per backend owns the threads, the scratch and the choice of ISA.
#pragma once
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "packed.h"
#include "pool.h"
#include "types.h"

namespace nvfp4 {

std::vector<std::string> supported_isas();  // best first

static inline size_t type_bytes(Type t) { return t == Type::f32 ? 4 : t == Type::e4m3 ? 1 : 2; }

class Context {
 public:
  Context(int threads, const std::string& isa);  // throws std::invalid_argument when the machine lacks `isa`

  const char* isa() const { return kernels_.isa; }
  int threads() const { return pool_.threads(); }
  const char* sixteen_bit() const;
  std::unique_lock<std::recursive_mutex> lock() { return std::unique_lock(mutex_); }


  std::unique_ptr<PackedNVFP4> pack(const std::vector<NVFP4Rows>& parts, const float* row_scale, const float* bias,
                                    int k, Numerics numerics, float input_scale, bool e8m0);
  void linear_nvfp4(const PackedNVFP4& w, const void* x, Type type, int m, void* out, Type out_type);
  void linear_dense(const void* w, Type w_type, const float* bias, const void* x, Type type, int m, int n, int k,
                    void* out, Type out_type);
  void rms_norm(const RMSNorm& a, int rows);
  void silu_mul(const SiluMul& a, int rows);
  void rope(const Rope& a, int rows, int64_t num_slots, int64_t num_positions);
  void attention(Attention& a, const int32_t* cu_seqlens, const int32_t* seq_lens, int sequences, int rows,
                 int num_blocks);
  void quantize(const PackX& a, uint8_t* codes, uint8_t* scales);

 private:
  const Kernels& kernels_;
  Pool pool_;
  std::recursive_mutex mutex_;  // a decoder holds it over the ops it calls
  Scratch x_;
  std::vector<Scratch> per_thread_;
  std::vector<float*> addresses_;  // of per_thread_
  std::vector<AttentionItem> items_;
};

}  // namespace nvfp4
