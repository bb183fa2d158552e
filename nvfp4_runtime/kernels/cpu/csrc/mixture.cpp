#include "mixture.h"

#include <cstring>

namespace nvfp4 {

Mixture::Mixture(Context& context, const Linear& router, const Route& route, const Experts& first, const Experts& down,
                 bool gated, const SiluMul& activation, Type stream, Type input)
    : context_(context), router_(router), route_(route), first_(first), down_(down), gated_(gated), activation_(activation),
      stream_(stream), input_(input) {
  if (router.n != route.experts || first.count() != route.experts || down.count() != route.experts ||
      first.n != (gated ? 2 : 1) * down.k)
    throw std::invalid_argument("a mixture's router and experts do not fit together");
}

void Mixture::run(const void* x, const void* inner_x, int rows, const void* shared, const float* gate, void* out) {
  if (rows == 0) return;
  const auto lock = context_.lock();
  const size_t count = static_cast<size_t>(rows), pairs = count * static_cast<size_t>(route_.top_k);
  Route route = route_;
  float* logits = logits_.floats(count * static_cast<size_t>(route.experts));
  chosen_.resize(pairs);
  router_.run(context_, x, input_, rows, logits, Type::f32);
  route.logits = logits;
  route.weights = weights_.floats(pairs);
  route.chosen = chosen_.data();
  context_.route(route, rows);
  sort(rows);

  const size_t row = static_cast<size_t>(first_.k) * type_bytes(input_);
  const void* sorted = inner_x;
  if (rows > 1) {
    char* to = static_cast<char*>(rows_.bytes(pairs * row));
    for (size_t i = 0; i < pairs; i++)
      std::memcpy(to + i * row, static_cast<const char*>(inner_x) + static_cast<size_t>(sources_[i]) * row, row);
    sorted = to;
  }
  const int all = static_cast<int>(pairs);
  void* wide = wide_.bytes(pairs * static_cast<size_t>(first_.n) * type_bytes(stream_));
  void* inner = inner_.bytes(pairs * static_cast<size_t>(down_.k) * type_bytes(input_));
  void* results = results_.bytes(pairs * static_cast<size_t>(down_.n) * type_bytes(stream_));
  context_.grouped(first_, sorted, input_, offsets_.data(), all, wide, stream_, rows == 1);
  if (gated_) {
    SiluMul a = activation_;
    a.x = wide;
    a.out = inner;
    context_.silu_mul(a, all);
  } else {
    context_.relu_squared({wide, inner, stream_, input_, down_.k}, all);
  }
  context_.grouped(down_, inner, input_, offsets_.data(), all, results, stream_);
  context_.weigh({results, places_.data(), route.weights, shared, gate, out, stream_, down_.n, route.top_k}, rows);
}

// By expert, tokens of one in their order.
void Mixture::sort(int rows) {
  const int all = rows * route_.top_k;
  offsets_.assign(static_cast<size_t>(route_.experts) + 1, 0);
  places_.resize(static_cast<size_t>(all));
  sources_.resize(static_cast<size_t>(all));
  for (const int32_t e : chosen_) offsets_[static_cast<size_t>(e) + 1]++;
  for (size_t e = 1; e < offsets_.size(); e++) offsets_[e] += offsets_[e - 1];
  std::vector<int32_t> next(offsets_.begin(), offsets_.end() - 1);
  for (int i = 0; i < all; i++) {
    const int32_t place = next[static_cast<size_t>(chosen_[static_cast<size_t>(i)])]++;
    places_[static_cast<size_t>(i)] = place;
    sources_[static_cast<size_t>(place)] = i / route_.top_k;
  }
}

}  // namespace nvfp4
