// From a kernel over [begin, end) to pieces for the pool's threads. Included by the files of Context only.
#pragma once
#include <algorithm>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "pool.h"
#include "types.h"

namespace nvfp4 {

// A host may have set flush-to-zero on its own thread; ours have not, and rows must not depend on who computes them.
class [[maybe_unused]] PlainFloats {
 public:
#if defined(__x86_64__)
  PlainFloats() : saved_(_mm_getcsr()) {
    if (saved_ & 0x8040) _mm_setcsr(saved_ & ~0x8040u);
  }
  ~PlainFloats() {
    if (saved_ & 0x8040) _mm_setcsr(saved_);
  }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  PlainFloats() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    if (saved_ & kFlush) set(saved_ & ~kFlush);
  }
  ~PlainFloats() {
    if (saved_ & kFlush) set(saved_);
  }

 private:
  static constexpr uint64_t kFlush = 1u << 24;
  static void set(uint64_t fpcr) { asm volatile("msr fpcr, %0" : : "r"(fpcr)); }
  uint64_t saved_;
#endif
};

constexpr int kPlainRowsAtOnce = 512;  // prefill rows kept packed for plain weights: 512 x 2048 x 2 bytes = 2 MiB
constexpr size_t kPieceBytes = 96 * 1024;  // weights a thread takes at a time

// Pieces of `unit_bytes` items for `threads`: small enough to balance, large enough to be worth a hand-over.
inline int grain_of(int count, size_t unit_bytes, int threads) {
  const int by_size = static_cast<int>(std::max<size_t>(1, kPieceBytes / std::max<size_t>(1, unit_bytes)));
  const int by_balance = std::max(1, count / (4 * threads));
  return std::min(by_size, by_balance);
}

template <class Args, void (*Kernels::*kernel)(const Args&, int, int)>
struct Call {
  const Kernels* kernels;
  const Args* args;
  static void work(const void* context, int begin, int end, int) {
    const PlainFloats guard;
    const auto* call = static_cast<const Call*>(context);
    (call->kernels->*kernel)(*call->args, begin, end);
  }
};

template <class Args, void (*Kernels::*kernel)(const Args&, int, int)>
void parallel(Pool& pool, const Kernels& kernels, const Args& args, int count, Pieces pieces) {
  const Call<Args, kernel> call{&kernels, &args};
  pool.run(Call<Args, kernel>::work, &call, count, pieces);
}

// Rows a thread takes of an op that does little per row: about 16 KiB at a time.
inline int row_grain(size_t row_bytes) { return static_cast<int>(std::max<size_t>(1, 16384 / std::max<size_t>(1, row_bytes))); }

}  // namespace nvfp4
