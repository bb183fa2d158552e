// The ops as the binding sees them: one context per backend owns the threads, the scratch and the choice of ISA.
#pragma once
#include <atomic>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "pool.h"
#include "types.h"

namespace nvfp4 {

// Memory that only grows, aligned to a cache line; what it held is lost when it does.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch(Scratch&& other) noexcept : data_(other.data_), size_(other.size_) { other.data_ = nullptr; }
  ~Scratch();
  void* bytes(size_t size);
  float* floats(size_t count) { return static_cast<float*>(bytes(count * sizeof(float))); }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// A weight in the panel layout of types.h, with its row multipliers and bias padded to whole panels.
struct PackedNVFP4 {
  int n, k;
  float input_scale;  // W4A4, else 0
  bool has_bias;
  Scratch weights, row_scale, bias;
  size_t bytes;

  // codes uint8 [n][k/2], scales e4m3 [n][k/16], row_scale fp32 [n], bias fp32 [n] or null. Throws on a NaN scale.
  PackedNVFP4(const uint8_t* codes, const uint8_t* scales, const float* row_scale, const float* bias, int n, int k,
              float input_scale);
  const uint8_t* data() const { return panels_; }
  const float* scale_data() const { return row_scales_; }
  const float* bias_data() const { return biases_; }

 private:
  uint8_t* panels_;
  float *row_scales_, *biases_;
};

std::vector<std::string> supported_isas();  // best first

// Segments begin .. end - 1 of items_[item].
struct AttentionPiece {
  int item, begin, end;
};

class Context {
 public:
  Context(int threads, const std::string& isa);  // throws std::invalid_argument when the machine lacks `isa`

  const char* isa() const { return kernels_.isa; }
  int threads() const { return pool_.threads(); }

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
  int plan_attention(const Attention& a, const int32_t* cu_seqlens, const int32_t* seq_lens, int sequences);

  const Kernels& kernels_;
  Pool pool_;
  std::mutex mutex_;
  Scratch x_, scales_;
  std::vector<Scratch> per_thread_;
  std::vector<float*> addresses_;  // of per_thread_
  Scratch partials_;
  std::vector<AttentionItem> items_;
  std::vector<AttentionPiece> pieces_;
  std::unique_ptr<std::atomic<int>[]> pending_;  // per item: pieces not yet done
  size_t pending_size_ = 0;
};

}  // namespace nvfp4
