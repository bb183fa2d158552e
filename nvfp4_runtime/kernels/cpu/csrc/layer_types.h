// Argument blocks of what lies between the multiplications of mixtures, hybrids and latent attention. Included by types.h.
#pragma once

namespace nvfp4 {

// relu(x)^2
struct ReluSquared {
  const void* x;  // [t][width]
  void* out;
  Type type, out_type;
  int width;
};

// A router's scores to experts and what each counts; see layers/moe.py: route.
struct Route {
  const float* logits;      // [t][experts]
  const float* correction;  // [experts], added for choosing only, or null
  int experts, top_k, groups, top_groups;
  bool softmax;  // else sigmoid
  bool renormalise;
  float scale;
  float* weights;   // [t][top_k], best first
  int32_t* chosen;  // [t][top_k]
};
static constexpr size_t route_scratch(int experts, int groups) { return 2 * static_cast<size_t>(experts) + static_cast<size_t>(groups); }

// Each token's experts' results, weighed and summed in the order in which the router ranked them; then the shared expert's.
struct Weigh {
  const void* y;          // [rows][width] of `type`, sorted by expert
  const int32_t* places;  // [t][top_k]: their rows
  const float* weights;   // [t][top_k]
  const void* shared;     // [t][width] of `type`, or null
  const float* gate;      // [t]: shared counts sigmoid(gate), or null
  void* out;              // [t][width] of `type`
  Type type;
  int width, top_k;
};

// Latent attention before its multiplications: what the first projection gave becomes normed queries to be projected again,
// and one cached vector: the normed latent vector and the rotated key.
struct LatentPrepare {
  const void* projected;  // [t][query_width + rank + rope] of `type`
  Type type, out_type;
  int query_width, rank, rope;
  const void *q_norm, *kv_norm;  // q_norm null: queries need no more than they are
  Type q_norm_type, kv_norm_type;
  float q_eps, kv_eps;
  void* queries;  // [t][query_width] of out_type, where there is a q_norm
  void* cache;    // [slots][rank + rope] of out_type
  const int64_t *slots, *positions;
  const float *cos, *sin;  // [positions][rope / 2]
  bool interleaved;
};

// Its queries, split: [t][heads][nope + rope] of `type` to [heads][t][nope] and, rotated, [t][heads][rope] of out_type.
struct LatentQueries {
  const void* q;
  size_t stride;  // elements between tokens
  Type type, out_type;
  int tokens, heads, nope, rope;
  void *q_nope, *q_rope;
  const int64_t* positions;
  const float *cos, *sin;
  bool interleaved;
};

}  // namespace nvfp4
