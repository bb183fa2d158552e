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

// How the NVFP4 kernel takes its activations: rows in blocks of up to max_rows(operand); block b covers rows
// b * max_rows .. and lies at x + b * max_rows * (k / 16) * words_per_group. Per group of 16 k it holds 32-bit words
// [words][width], width >= its rows (padded rows are zero):
//   floats  16 FP32 values
//   pairs   8 pairs of bfloat16, in the order decode_pair gives weights; for an ISA that multiplies them
//   digits  x = scale * (256 high + low): 4 words of high bytes, 4 of low, -12 * their sum, scale / 2
//   int8    4 words of bytes, start, base                                                            (W4A8)
//   nvfp4   the same with twice the E2M1 value as the byte                                           (W4A4)
// start and base hold a block scale (1 + j / 8) * 2^e in a way that leaves nothing but additions to the kernel: base is the
// float (1.5 * 2^23 + 8 j) * 2^e, and start its bits less 12 * the sum of the bytes. Dot products added to start's bits, seen
// as a float, less base, are the group's sum times 2^e, exactly. base's lowest byte is 8 j. NaN: base is NaN.
// The variant for AMX packs digits and bytes otherwise where it multiplies by tiles: linear_amx.h.
enum class Operand : int { floats = 0, pairs = 1, digits = 2, int8 = 3, nvfp4 = 4 };
static constexpr int words_per_group(Operand o) {
  return o == Operand::floats ? 16 : o == Operand::pairs ? 8 : o == Operand::digits ? 10 : 6;
}
constexpr int kMostRows = 24;

struct PackX {
  const void* x;  // [m][k] of `type`
  Type type;
  int m, k;
  Operand operand;
  float input_scale;  // > 0 for nvfp4
  uint32_t* packed;
};

struct LinearNVFP4 {
  const uint8_t* weights;
  bool e8m0;               // block scales are E8M0 (MXFP4, each byte twice), not E4M3
  const float* row_scale;  // fp32 [n padded to 16]: what multiplies each sum once; times 2^8 for E4M3
  const float* bias;       // fp32 [n padded to 16] or null
  const uint32_t* x;       // from PackX
  Operand operand;
  int m, n, k;
  void* out;  // [m][n]
  Type out_type;
  bool ask;  // for weights far ahead, where one row of x meets them: some processors' own prefetchers do worse
};

// Plain and FP8 weights, read where they lie. Activations come in panels of `width` rows (the last one may be lower):
// [panel][vector][row] of 64 bytes, zero beyond k. A vector is 16 floats, or 32 bfloat16 on an ISA that multiplies pairs,
// in the order in which the ISA decodes weights of this type (see linear_plain.h).
struct PackPlain {
  const void* x;  // [m][k] of `type`
  Type type;
  Type weight_type;
  int m, k, width;
  void* packed;
};

struct LinearPlain {
  const void* weights;  // [n][k]
  Type weight_type;     // f32, bf16, fp16 or e4m3
  const float* scale;   // e4m3: [ceil(n / scale_rows)][ceil(k / scale_k)], else null
  int scale_rows, scale_k;
  const float* bias;  // fp32 [n] or null
  const void* x;      // from PackPlain
  bool pairs;         // x holds bfloat16
  int width;          // rows of a panel of x
  int m, n, k;
  void* out;  // [m][n]
  Type out_type;
};

constexpr int kPlainChunk = 64;  // k are packed in multiples of this
static constexpr int plain_vectors(int k, bool pairs) { return (k + kPlainChunk - 1) / kPlainChunk * (pairs ? 2 : 4); }
// bytes of scratch linear_plain needs: 16 rows of weights, decoded
static constexpr size_t plain_scratch(int k, bool pairs) { return static_cast<size_t>(16 * 64) * plain_vectors(k, pairs); }

// How block scales are chosen; see nvfp4/block_scales.py.
enum class BlockScales : int { max = 0, mse = 1, four_over_six = 2 };

// Weights quantised at load, bit for bit as nvfp4/fp8.py and nvfp4/codec.py do.
struct QuantizeWeight {
  const void* w;  // [n][k] of `type`
  Type type;
  int n, k;
  uint8_t* codes;         // e4m3: [n][k]; nvfp4: [n][k / 2]; null: only row_amax
  float* row_amax;        // [n]; NaN where a row holds NaN or infinity
  uint8_t* block_scales;  // nvfp4: e4m3 [n][k / 16]; null: FP8 under row_amax / 448
  float scale_2;          // nvfp4
  BlockScales method;     // nvfp4
  const float* importance;  // fp32 [k] or null: what each input's squared error counts
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

enum class Gate { silu, gelu_tanh, clamped };  // nvfp4_runtime/config.py: Gate
struct SiluMul {
  const void* x;  // [t][2 * width]
  void* out;      // [t][width]
  Type type;
  Type out_type;
  int width;
  Gate gate = Gate::silu;
  float alpha = 0.f, limit = 0.f;
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
  const float* sinks;  // [hq] or null: one more score of each head, without a value
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

// One decoding step of multi-head latent attention, absorbed; see MLAKernel in kernels/ops.py. Queries are plain floats of
// `type`, as is the cache.
struct Latent {
  const void* q_nope;  // [b][heads][rank]
  const void* q_rope;  // [b][heads][rope]
  const void* cache;   // [blocks][block_size][rank + rope]
  Type type;
  void* out;  // [b][heads][rank]
  Type out_type;
  const int32_t* block_tables;
  int table_stride;
  const int32_t* seq_lens;
  int heads, rank, rope, block_size;
  float scale;
  int groups;  // of kLatentHeads heads, per sequence: an item is one sequence and one group
};

constexpr int kLatentHeads = 8;  // of an item
constexpr int kLatentTile = 32;  // keys, from a multiple of it on
// floats of scratch an item needs
static constexpr size_t latent_scratch(int rank, int rope) {
  return kLatentHeads * (2 * static_cast<size_t>(round16(rank + rope)) + kLatentTile);
}

// Mamba-2's convolution, scan and gated norm; see Mamba2Kernel in kernels/ops.py. All float32 but gate, xbc, dt, b and `out`.
//
// The gated delta rule (DeltaKernel) has the same convolution, steps and decays, and other names: heads are value heads,
// groups key heads, `state` is a key's width; its channels go queries, keys, values. There is no d, no gate, and there is b.
struct Mamba2 {
  const void *gate, *xbc, *dt;  // [t][inner], or null; [t][conv_dim]; [t][heads]: of `type`
  size_t xbc_row, dt_row;       // elements between their tokens; the gate's lie as xbc's
  Type type;
  const float* dt_bias;      // [heads]
  const float* a;            // [heads], negative
  float min_step;
  const float* conv_weight;  // [conv_width][conv_dim], oldest first
  const float* conv_bias;    // [conv_dim]
  const float* d;            // [heads]
  const float* norm;         // [inner]
  float eps;
  float* conv_state;         // [slots][conv_width - 1][conv_dim]
  float* ssm_state;          // [slots][heads][head_dim][state]
  const int64_t* slots;      // per sequence
  const int64_t* positions;  // per token
  const int32_t* cu_seqlens;
  int heads, head_dim, state, groups, conv_width;
  void* out;  // [t][inner] of out_type
  Type out_type;
  int pieces;     // of kConvPiece channels: an item of the convolution is one sequence and one piece
  float* mixed;   // [t][conv_dim], what the convolution gives and the scan reads
  float* steps;   // [t][heads]: max(softplus(dt + dt_bias), min_step)
  float* decays;  // [t][heads]: exp(step * a)
  float* y;       // [t][inner], what the scan gives and the norm reads; the delta rule's result
  const void* b;  // [t][heads] of `type`: its sigmoid is how much of a value is written
  int inner() const { return heads * head_dim; }
  int conv_dim() const { return inner() + 2 * groups * state; }
  // Mamba-2's input: [t][inner + conv_dim + heads], the gate, the convolution's input, the steps.
  void split(const void* projected, int num_heads, int dim, int state_size, int num_groups) {
    heads = num_heads;
    head_dim = dim;
    state = state_size;
    groups = num_groups;
    const size_t bytes = type == Type::f32 ? 4 : 2;
    gate = projected;
    xbc = static_cast<const char*>(gate) + static_cast<size_t>(inner()) * bytes;
    dt = static_cast<const char*>(xbc) + static_cast<size_t>(conv_dim()) * bytes;
    xbc_row = dt_row = static_cast<size_t>(inner()) + static_cast<size_t>(conv_dim()) + static_cast<size_t>(heads);
  }
};

constexpr int kConvPiece = 256;

}  // namespace nvfp4
#include "layer_types.h"
namespace nvfp4 {

// One ISA's kernels. Every function works on [begin, end) of its outermost axis and touches nothing else, so any split
// over threads gives the same bits.
struct Kernels {
  const char* isa;
  bool pairs;                // bfloat16 is multiplied as such
  Operand sixteen_bit;       // what W4A16 makes of bfloat16 activations; FP32 ones stay as they are
  int (*max_rows)(Operand);  // rows of x that share one decoded weight
  size_t (*packed_words)(Operand, int m, int k);  // that so many rows need, packed
  int streams;        // places of a weight that one call reads side by side; 1: it goes through its items in order
  int streamed_rows;  // up to so many rows of x, of NVFP4 weights; of plain ones up to plain_first
  void (*pack_x)(const PackX&, int begin, int end);                 // blocks of rows
  void (*linear_nvfp4)(const LinearNVFP4&, int begin, int end);     // panels
  int plain_first, plain_width;  // rows of x: up to plain_first make one panel; more make panels of up to plain_width
  void (*pack_plain)(const PackPlain&, int begin, int end);  // panels
  void (*linear_plain)(const LinearPlain&, int begin, int end, void* scratch);  // groups of 16 output features
  void (*convert)(const void* from, Type, void* to, Type to_type, int count);
  void (*rms_norm)(const RMSNorm&, int begin, int end);             // tokens
  void (*silu_mul)(const SiluMul&, int begin, int end);             // tokens
  void (*rope)(const Rope&, int begin, int end);                    // tokens
  void (*attention)(const Attention&, const AttentionItem&, int begin, int end, float* scratch);  // segments of one item
  void (*attention_merge)(const Attention&, const AttentionItem&, float* scratch);
  void (*latent)(const Latent&, int begin, int end, float* scratch);  // items
  void (*mamba2_steps)(const Mamba2&, int begin, int end);            // tokens
  void (*mamba2_conv)(const Mamba2&, int begin, int end);             // items
  void (*mamba2_scan)(const Mamba2&, int begin, int end);             // sequences x heads
  void (*mamba2_norm)(const Mamba2&, int begin, int end);             // tokens
  void (*delta_scan)(const Mamba2&, int begin, int end);              // sequences x value heads
  void (*relu_squared)(const ReluSquared&, int begin, int end);       // tokens
  void (*weigh)(const Weigh&, int begin, int end);                    // tokens
  void (*latent_prepare)(const LatentPrepare&, int begin, int end);   // tokens
  void (*latent_queries)(const LatentQueries&, int begin, int end);   // tokens
  void (*quantize)(const PackX&, uint8_t* codes, uint8_t* scales);  // codes as codec.quantize_activation gives them
  void (*quantize_weight)(const QuantizeWeight&, int begin, int end);  // rows
};

extern const Kernels kernels_portable;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx2vnni;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512bf16;
extern const Kernels kernels_amx;
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
extern const Kernels kernels_dotprod;
#endif

}  // namespace nvfp4
