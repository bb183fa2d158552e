// Rows between multiplications: routing, weighing, and what latent attention does before it multiplies.
#include <cmath>
#include <limits>
#include <string>

#include "context.h"
#include "parallel.h"

namespace nvfp4 {
namespace {

struct RouteCall {
  const Route* a;
  float* const* scratch;
  static void work(const void* context, int begin, int end, int thread) {
    const PlainFloats guard;
    const auto* call = static_cast<const RouteCall*>(context);
    for (int t = begin; t < end; t++) one(*call->a, t, call->scratch[thread]);
  }

  static void one(const Route& a, int token, float* scratch) {
    const int count = a.experts, each = count / a.groups;
    const float* logits = a.logits + static_cast<size_t>(token) * count;
    float *scores = scratch, *ranked = scratch + count, *merits = ranked + count;
    score(a, logits, scores);
    for (int e = 0; e < count; e++) ranked[e] = a.correction ? scores[e] + a.correction[e] : scores[e];
    if (a.groups > 1) {
      for (int g = 0; g < a.groups; g++) merits[g] = best_two(ranked + g * each, each);
      for (int kept = 0; kept < a.groups; kept++) {
        const int g = take_best(merits, a.groups);
        if (kept >= a.top_groups)
          for (int e = g * each; e < (g + 1) * each; e++) ranked[e] = kTaken;
      }
    }
    float* weights = a.weights + static_cast<size_t>(token) * a.top_k;
    int32_t* chosen = a.chosen + static_cast<size_t>(token) * a.top_k;
    float total = 0;
    for (int k = 0; k < a.top_k; k++) {
      chosen[k] = take_best(ranked, count);
      weights[k] = scores[chosen[k]];
      total += weights[k];
    }
    if (a.renormalise)
      for (int k = 0; k < a.top_k; k++) weights[k] /= std::max(total, 1e-20f);
    for (int k = 0; k < a.top_k; k++) weights[k] *= a.scale;
  }

  static void score(const Route& a, const float* logits, float* scores) {
    if (!a.softmax) {
      for (int e = 0; e < a.experts; e++) scores[e] = 1.f / (1.f + std::exp(-logits[e]));
      return;
    }
    float most = logits[0], total = 0;
    for (int e = 1; e < a.experts; e++) most = std::max(most, logits[e]);
    for (int e = 0; e < a.experts; e++) total += scores[e] = std::exp(logits[e] - most);
    for (int e = 0; e < a.experts; e++) scores[e] /= total;
  }

  static float best_two(const float* values, int count) {
    float first = values[0], second = values[1];
    if (second > first) std::swap(first, second);
    for (int i = 2; i < count; i++) {
      if (values[i] > first) {
        second = first;
        first = values[i];
      } else if (values[i] > second) {
        second = values[i];
      }
    }
    return first + second;
  }

  // The largest value's place, the first of equals; it cannot be taken again. Values that cannot be compared come last, so
  // that every answer is a place, whatever the logits are.
  static constexpr float kTaken = -std::numeric_limits<float>::infinity();
  static int take_best(float* values, int count) {
    int best = -1;
    for (int i = 0; i < count; i++)
      if (values[i] > (best < 0 ? kTaken : values[best])) best = i;
    if (best < 0) {  // only NaN and infinities are left: the first that was not taken
      best = 0;
      for (int i = count - 1; i >= 0; i--)
        if (values[i] != kTaken) best = i;
    }
    values[best] = kTaken;
    return best;
  }
};

}  // namespace

void Context::route(const Route& a, int rows) {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  addresses_.clear();
  for (auto& s : per_thread_) addresses_.push_back(s.floats(route_scratch(a.experts, a.groups)));
  const RouteCall call{&a, addresses_.data()};
  pool_.run(RouteCall::work, &call, rows, row_grain(static_cast<size_t>(a.experts) * 64));
}

void Context::relu_squared(const ReluSquared& a, int rows) {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  parallel<ReluSquared, &Kernels::relu_squared>(pool_, kernels_, a, rows, row_grain(static_cast<size_t>(a.width) * 4));
}

void Context::weigh(const Weigh& a, int rows) {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  parallel<Weigh, &Kernels::weigh>(pool_, kernels_, a, rows, row_grain(static_cast<size_t>(a.width) * static_cast<size_t>(a.top_k) * 4));
}

void Context::latent_prepare(const LatentPrepare& a, int rows, int64_t num_slots, int64_t num_positions) {
  for (int t = 0; t < rows; t++) {
    if (a.slots[t] < 0 || a.slots[t] >= num_slots)
      throw std::out_of_range("slot_mapping[" + std::to_string(t) + "] is " + std::to_string(a.slots[t]) +
                              "; the cache has slots 0 to " + std::to_string(num_slots - 1));
    if (a.positions[t] < 0 || a.positions[t] >= num_positions)
      throw std::out_of_range("positions[" + std::to_string(t) + "] is " + std::to_string(a.positions[t]) +
                              "; the cos and sin tables hold " + std::to_string(num_positions) + " positions");
  }
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  const size_t row = static_cast<size_t>(a.query_width + a.rank + a.rope) * 4;
  parallel<LatentPrepare, &Kernels::latent_prepare>(pool_, kernels_, a, rows, row_grain(row));
}

void Context::latent_queries(const LatentQueries& a) {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  const size_t row = static_cast<size_t>(a.heads) * static_cast<size_t>(a.nope + a.rope) * 4;
  parallel<LatentQueries, &Kernels::latent_queries>(pool_, kernels_, a, a.tokens, row_grain(row));
}

}  // namespace nvfp4
