// All kernels of one ISA. CMake compiles this file once per ISA with that ISA's flags and NVFP4_ISA set to its name.
// Everything but the table has internal linkage, and no standard C++ header is included: see types.h.
#include "types.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(NVFP4_NEON)
#include <arm_neon.h>
#endif

#define NVFP4_PASTE2(a, b) a##b
#define NVFP4_PASTE(a, b) NVFP4_PASTE2(a, b)
#define NVFP4_STRING2(a) #a
#define NVFP4_STRING(a) NVFP4_STRING2(a)

// Loops over registers must disappear: an array indexed at run time lives in memory. Compilers stop at 16 by themselves.
#define UNROLL _Pragma("GCC unroll 32")
#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace nvfp4 {
namespace {

#if defined(__AVX512F__)
#include "simd_avx512.h"
#if defined(__AVX512BF16__)
constexpr Operand kSixteenBit = Operand::pairs;
constexpr int kBlockRows = 24;
#else
constexpr Operand kSixteenBit = Operand::digits;
constexpr int kBlockRows = 16;
#endif
// totals that fit beside the decoded weights
constexpr int kFloatRows = 16, kDigitRows = 16, kPairRows = 12;
constexpr int kDenseN = 4, kDenseM = 6;  // tile of the plain kernel
constexpr int kDenseFirst = 4;           // up to so many rows meet weights straight from memory
#elif defined(__AVX2__)
#include "simd_avx2.h"
constexpr Operand kSixteenBit = Operand::digits;
constexpr int kFloatRows = 4, kBlockRows = 4, kDigitRows = 4, kPairRows = 4;  // each takes two of 16 registers, and decoding five
constexpr int kDenseN = 2, kDenseM = 2, kDenseFirst = 4;
#elif defined(NVFP4_NEON)  // not __ARM_NEON, which every 64-bit ARM compiler defines for the portable variant too
#include "simd_neon.h"
constexpr Operand kSixteenBit = Operand::digits;
constexpr int kFloatRows = 4, kBlockRows = 4, kDigitRows = 4, kPairRows = 4;  // each takes four of 32 registers, and decoding ten or more
constexpr int kDenseN = 2, kDenseM = 2, kDenseFirst = 4;
#else
#include "simd_portable.h"
constexpr Operand kSixteenBit = Operand::floats;
constexpr int kFloatRows = 4, kBlockRows = 4, kDigitRows = 4, kPairRows = 4;
constexpr int kDenseN = 2, kDenseM = 2, kDenseFirst = 4;
#endif

#include "simd_math.h"

// Rows of plain weights that meet up to kDenseFirst rows of x together. One row's chain of FP32 multiply-adds gives 8 bytes of
// BF16 a cycle, 18 to 22 GB/s on Emerald Rapids even from cache: no more than a core has from memory there, so that the two
// add up. On Zen 3 two chains take 40 GB/s from cache and what memory has, four no more. A chain of pairs takes twice the bytes.
constexpr int rows_side_by_side([[maybe_unused]] int m) {
#if defined(__AVX512F__) && !defined(__AVX512BF16__)
  return m == 1 ? 4 : 2;
#elif defined(__AVX2__) && !defined(__AVX512F__)
  return m == 1 ? 2 : 1;
#else
  return 1;
#endif
}

// Places of a weight that a thread reads side by side, and for how many rows of x at most it looks ahead in them; more are
// bound by arithmetic. See linear_nvfp4.h.
#if defined(__AVX512F__) && !defined(__AVX512BF16__)
constexpr int kStreams = 4, kStreamedRows = 3;
#elif defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kStreams = 1, kStreamedRows = 1;
#else
constexpr int kStreams = 1, kStreamedRows = 0;
#endif

constexpr int max_rows(Operand o) {
  return o == Operand::floats ? kFloatRows : o == Operand::pairs ? kPairRows : o == Operand::digits ? kDigitRows : kBlockRows;
}
int block_width(Operand operand, int rows);

#include "rows.h"

#include "kv.h"

#include "activations.h"
#include "attention.h"
#include "linear_nvfp4.h"
#include "linear_plain.h"
#include "search.h"
#include "quantize.h"
#include "rope.h"
#include "latent.h"
#include "mamba2.h"
#include "between.h"
#include "delta.h"

int rows_that_share(Operand o) { return max_rows(o); }
size_t packed_words(Operand o, int m, int k) {
  const int most = max_rows(o), blocks = (m + most - 1) / most;
  return static_cast<size_t>(blocks) * most * (k / kGroup) * words_per_group(o);
}

#if defined(__AMX_BF16__)
#include "linear_amx.h"
#else
constexpr auto packed_words_amx = packed_words;
constexpr auto pack_x_amx = pack_x;
constexpr auto linear_nvfp4_amx = linear_nvfp4;
#endif

}  // namespace

const Kernels NVFP4_PASTE(kernels_, NVFP4_ISA) = {
    NVFP4_STRING(NVFP4_ISA), kPairs, kSixteenBit, rows_that_share, packed_words_amx, kStreams, kStreamedRows, pack_x_amx,
    linear_nvfp4_amx, kDenseFirst, kDenseM, pack_plain, linear_plain, convert, rms_norm, silu_mul, rope, attention, attention_merge, latent,
    mamba2_steps, mamba2_conv, mamba2_scan, mamba2_norm, delta_scan, relu_squared, weigh, latent_prepare, latent_queries,
    quantize, quantize_weight,
};

}  // namespace nvfp4
