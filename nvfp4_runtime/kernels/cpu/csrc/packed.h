// Weights in the panel layout of types.h, made once at load.
#pragma once
#include <memory>
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

// Memory of many weights, side by side in whole huge pages: experts and heads are smaller than one, and 4 KiB pages cost their
// reader look-ups. It goes back with the last weight in its run of pages. Not for several threads at once.
class Arena {
 public:
  std::shared_ptr<uint8_t> bytes(size_t size);  // aligned to a cache line

 private:
  std::shared_ptr<uint8_t> run_;
  size_t used_ = 0, size_ = 0;
};

// The arithmetic of a layer: how W4A16, W4A8 or W4A4 takes its activations is the ISA's choice (see Operand).
enum class Numerics : int { w4a16 = 0, w4a8 = 1, w4a4 = 2 };

// Rows of one weight as a checkpoint stores them.
struct NVFP4Rows {
  const uint8_t* codes;   // [n][k / 2], low nibble first
  const uint8_t* scales;  // E4M3 [n][k / 16], or E8M0 [n][k / 32]
  int n;
};

class Context;

// One layer's weight, whatever it is stored in: x [m][k] -> out [m][n].
struct Linear {
  int n = 0, k = 0;
  size_t bytes = 0;
  virtual ~Linear() = default;
  virtual void run(Context& context, const void* x, Type type, int m, void* out, Type out_type) const = 0;
};

struct PackedNVFP4 final : Linear {
  Numerics numerics;
  float input_scale;  // W4A4, else 0
  bool e8m0;          // MXFP4

  // Joins the rows of `parts`. row_scale fp32 [n] and bias fp32 [n] or null. Throws std::invalid_argument, naming the
  // place, on a NaN scale.
  PackedNVFP4(Pool& pool, Arena& arena, const std::vector<NVFP4Rows>& parts, const float* row_scale, const float* bias,
              int k, Numerics numerics, float input_scale, bool e8m0);
  const uint8_t* data() const { return panels_.get(); }
  const float* row_scale() const { return row_scales_; }
  const float* bias() const { return biases_; }
  int panels() const { return (n + kPanel - 1) / kPanel; }
  void ask_for() const {  // for this object, not for its panels
    for (size_t line = 0; line < sizeof(*this); line += 64) __builtin_prefetch(reinterpret_cast<const char*>(this) + line);
  }
  void run(Context& context, const void* x, Type type, int m, void* out, Type out_type) const override;

 private:
  std::shared_ptr<uint8_t> panels_;
  Scratch scale_memory_, bias_memory_;
  float *row_scales_ = nullptr, *biases_ = nullptr;
};

// Plain and FP8 weights where they lie; the caller keeps them alive.
struct PlainWeight final : Linear {
  LinearPlain weight{};  // pointers, type, scales, n, k
  PlainWeight(const void* weights, Type type, const float* bias, int n_in, int k_in) {
    weight.weights = weights;
    weight.weight_type = type;
    weight.bias = bias;
    weight.n = n = n_in;
    weight.k = k = k_in;
    bytes = static_cast<size_t>(n) * k * (type == Type::f32 ? 4 : type == Type::e4m3 ? 1 : 2);
  }
  // FP8: one scale per `rows` x `columns`, fp32 [ceil(n / rows)][ceil(k / columns)]
  void scale_by(const float* scale, int rows, int columns) {
    weight.scale = scale;
    weight.scale_rows = rows;
    weight.scale_k = columns;
    bytes += sizeof(float) * static_cast<size_t>((n + rows - 1) / rows) * ((k + columns - 1) / columns);
  }
  void run(Context& context, const void* x, Type type, int m, void* out, Type out_type) const override;
};

}  // namespace nvfp4
