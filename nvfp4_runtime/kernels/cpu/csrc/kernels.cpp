// All kernels of one ISA. CMake compiles this file once per ISA with that ISA's flags and NVFP4_ISA set to its name.
// Everything but the table has internal linkage, and no standard C++ header is included: see types.h.
#include "types.h"

#if defined(__x86_64__)
#include <immintrin.h>
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
constexpr int kMaxRows = 16;  // two registers each: the group and the total (24 spills, and runs 12 % slower)
constexpr int kDenseN = 4, kDenseM = 6;  // tile of the plain kernel
constexpr int kDenseFirst = 8;           // rows of its first pass
#elif defined(__AVX2__)
#include "simd_avx2.h"
constexpr int kMaxRows = 4;  // each takes two of 16 registers, and decoding five
constexpr int kDenseN = 2, kDenseM = 2, kDenseFirst = 4;
#else
#include "simd_portable.h"
constexpr int kMaxRows = 4;
constexpr int kDenseN = 2, kDenseM = 2, kDenseFirst = 4;
#endif

#include "simd_math.h"

#include "rows.h"

#include "kv.h"

#include "attention.h"
#include "linear.h"
#include "rope.h"

}  // namespace

const Kernels NVFP4_PASTE(kernels_, NVFP4_ISA) = {
    NVFP4_STRING(NVFP4_ISA), kPairs, kMaxRows, block_width, pack_x,   linear_nvfp4, widen,
    linear_dense,            rms_norm, silu_mul, rope, attention, attention_merge, quantize,
};

}  // namespace nvfp4
