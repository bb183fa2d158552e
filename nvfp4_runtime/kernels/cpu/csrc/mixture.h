// A mixture of experts' routed part as one call: router, choice, both multiplications, and the weighed sum.
#pragma once
#include <vector>

#include "context.h"

namespace nvfp4 {

class Mixture {
 public:
  // first: gate and up joined, or up alone where experts are not gated; activation: of gated ones, without its pointers.
  // route: without pointers but the correction's. All are kept alive by the caller.
  Mixture(Context& context, const Linear& router, const Route& route, const Experts& first, const Experts& down, bool gated,
          const SiluMul& activation, Type stream, Type input);

  // x [rows][hidden] of the input type, which the router reads; inner_x [rows][experts' inputs], often the same.
  // shared [rows][down.n] of the stream's type, or null, is added; gate [rows] or null: by sigmoid(gate).
  void run(const void* x, const void* inner_x, int rows, const void* shared, const float* gate, void* out);

  Type stream() const { return stream_; }
  Type input() const { return input_; }
  // Experts that the last call chose: [rows][top_k]
  const std::vector<int32_t>& chosen() const { return chosen_; }

 private:
  void sort(int rows);

  Context& context_;
  const Linear& router_;
  Route route_;
  const Experts &first_, &down_;
  const bool gated_;
  SiluMul activation_;
  const Type stream_, input_;
  Scratch logits_, weights_, rows_, wide_, inner_, results_;
  std::vector<int32_t> chosen_, places_, sources_, offsets_;  // sources_: the token of each sorted row
};

}  // namespace nvfp4
