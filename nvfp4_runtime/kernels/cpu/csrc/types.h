// Element types and argument blocks shared by the kernels (compiled once per ISA) and the driver (compiled once).
// Plain C++ data only: no inline function of the standard library may enter the per-ISA files, or the linker could keep
// the AVX-512 copy of it for everybody.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace nvfp4 {

// Storage types: bits with a name, so that overloads of load() and store() can tell them apart.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
struct e4m3 {
  uint8_t bits;
};
struct e2m1x2 {  // two codes, the even element in the low nibble
  uint8_t bits;
};

// nvfp4: e2m1x2 under E4M3 block scales, in the paged cache.
enum class Type : int { f32 = 0, bf16 = 1, fp16 = 2, e4m3 = 3, nvfp4 = 16 };

// Packed NVFP4 weights: panels of 16 rows. Per 64 of K one line of 64 block scales (4 groups x 16 rows), then per group
// 128 bytes of codes: 9 cache lines per 1024 weights, one sequential stream. K is padded to 64 with zeros.
// Inside a group, line h (0, 1) holds k = 8h .. 8h+7; byte 4 * row + i: low nibble k = 8h + i, high nibble 8h + 4 + i.
constexpr int kPanel = 16;
constexpr int kGroup = 16;
constexpr int kBlockBytes = 576;
static constexpr size_t panel_bytes(int k) { return static_cast<size_t>((k + 63) / 64) * kBlockBytes; }

// Activations are handed to the NVFP4 kernel as FP32, `rows` rows at a time: block b covers rows b * max_rows .. and
// lies at x + b * max_rows * k, stored [k][width] where width >= its rows (padded rows are zero). An ISA with `pairs`
// keeps bfloat16 activations as pairs instead, [k / 2][width] of 32 bits, in the order its decoder gives weights.
struct PackX {
  const void* x;  // [m][k] of `type`
  Type type;
  int m, k;
  float input_scale;  // > 0 with `scales`: quantise to NVFP4 first (W4A4)
  float* packed;
  float* scales;  // W4A4: per block [k / 16][width], else null
};

struct LinearNVFP4 {
  const uint8_t* weights;
  const float* row_scale;  // fp32 [n padded to 16], weight_scale_2 (and input_scale) times 2^8
  const float* bias;       // fp32 [n padded to 16] or null
  const float* x;          // from PackX
  bool pairs;              // x holds pairs of bfloat16: PackX's type was bf16 and the ISA multiplies them
  const float* scales;     // from PackX, or null for W4A16
  int m, n, k;
  void* out;  // [m][n]
  Type out_type;
};

struct LinearDense {
  const void* weights;  // [n][k]
  Type weight_type;
  const float* bias;  // fp32 [n] or null
  const float* x;     // fp32 [m][stride], zeros beyond k
  const bf16* pairs;  // or bf16 [m][k] as it came, with bf16 weights on an ISA that multiplies them; else null
  int stride;
  int m, n, k;
  void* out;
  Type out_type;
};

struct Widen {
  const void* x;  // [m][k]
  Type type;
  int m, k, stride;
  float* out;  // fp32 [m][stride], zeros beyond k
};

struct RMSNorm {
  const void* x;
  void* residual;  // in: residual, out: the sum; null: the sum is x
  const void* weight;
  Type weight_type;
  void* out;
  Type type;      // of x, residual and sum
  Type out_type;  // bf16 or f32
  int width;
  float eps;
};

struct SiluMul {
  const void* x;  // [t][2 * width]
  void* out;      // [t][width]
  Type type;
  Type out_type;
  int width;
};

struct Rope {
  const void* qkv;  // [t][(hq + 2 hkv) * d]
  Type type;
  const int64_t* positions;
  const float* cos;
  const float* sin;
  const void* q_norm;  // [d] or null
  const void* k_norm;
  Type norm_type;
  float eps;
  void* q_out;  // [t][hq][d]
  void* k;      // [blocks][hkv][block_size][d]
  void* v;
  Type kv_type;
  float k_scale, v_scale;
  const int64_t* slots;
  int heads, kv_heads, head_dim, rotary_dim, block_size;
  uint8_t* k_blocks;  // nvfp4: E4M3 block scales [blocks][hkv][block_size][d / 16]; else null
  uint8_t* v_blocks;
};

// One token and the query heads of some KV heads, or some tokens and those of one KV head. Its segments may be computed
// by several threads; then their results wait in `partial` for attention_merge.
struct AttentionItem {
  int sequence, kv_head, kv_heads;  // the first KV head, and how many
  int row;       // first token row in q
  int tokens;    // of this item
  int position;  // of the first token
  int first_segment, end_segment;
  float* partial;  // or null: one call takes all segments and finishes
};

struct Attention {
  const void* q;  // [t][hq][d]
  Type type;
  void* out;  // [t][hq * d]
  Type out_type;
  const void* k;
  const void* v;
  Type kv_type;
  float k_scale, v_scale, scale;
  const int32_t* block_tables;
  int table_stride;
  int heads, kv_heads, head_dim, block_size;
  int window;  // 0: none
  const uint8_t* k_blocks;  // as in Rope
  const uint8_t* v_blocks;
};

constexpr int kSegment = 256;       // KV positions between two merges, always starting at a multiple of it
constexpr int kTile = 64;           // of these, widened together for many rows
constexpr int kAttentionRows = 64;  // query rows (tokens x heads of one group) that share a widened tile
static constexpr int round16(int x) { return (x + 15) / 16 * 16; }
static constexpr int round_chunk(int d) { return (d + 63) / 64 * 64; }
// floats of scratch one attention item needs, and of its results for one segment
static constexpr size_t attention_scratch(int rows, int d) {
  return static_cast<size_t>(round16(rows)) * (3 * round_chunk(d) + kSegment + 4) + 2 * static_cast<size_t>(kTile) * round_chunk(d);
}
static constexpr size_t attention_partial(int rows, int dp) { return round16(2 * rows) + static_cast<size_t>(rows) * dp; }

// One ISA's kernels. Every function works on [begin, end) of its outermost axis and touches nothing else, so any split
// over threads gives the same bits.
struct Kernels {
  const char* isa;
  bool pairs;                    // bfloat16 activations are multiplied as such
  int max_rows;                  // rows of x that share one decoded weight
  int (*block_width)(int rows);  // stored width of a block of 1..max_rows rows
  void (*pack_x)(const PackX&, int begin, int end);                 // blocks of rows
  void (*linear_nvfp4)(const LinearNVFP4&, int begin, int end);     // panels
  void (*widen)(const Widen&, int begin, int end);                  // rows
  void (*linear_dense)(const LinearDense&, int begin, int end);     // output features
  void (*rms_norm)(const RMSNorm&, int begin, int end);             // tokens
  void (*silu_mul)(const SiluMul&, int begin, int end);             // tokens
  void (*rope)(const Rope&, int begin, int end);                    // tokens
  void (*attention)(const Attention&, const AttentionItem&, int begin, int end, float* scratch);  // segments of one item
  void (*attention_merge)(const Attention&, const AttentionItem&, float* scratch);
  void (*quantize)(const PackX&, uint8_t* codes, uint8_t* scales);  // codes as codec.quantize_activation gives them
};

extern const Kernels kernels_portable;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512bf16;
#endif

}  // namespace nvfp4
