#include "packed.h"

#include "context.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

namespace nvfp4 {
namespace {

constexpr size_t kHugePage = size_t{2} << 20, kLine = 64;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kRun = 0;  // every weight by itself: reads beyond its end are seen
#else
constexpr size_t kRun = 16 * kHugePage;
#endif
constexpr uint64_t kLowNibbles = 0x0f0f0f0f0f0f0f0full, kEvenBytes = 0x00ff00ff00ff00ffull;
constexpr uint64_t kHighNibbles = 0x0000f0f00000f0f0ull, kLowWords = 0x0000ffff0000ffffull;

// Eight bytes of codes as stored (k, k + 1 in a byte) to the two times four bytes of a panel (k, k + 4 in a byte).
inline uint64_t arrange(uint64_t stored) {
  const uint64_t even = stored & kLowNibbles, odd = stored >> 4 & kLowNibbles;  // bytes of each half: k 0 2 4 6, 1 3 5 7
  // low 16 bits of each half: k (0, 4) (2, 6) and (1, 5) (3, 7)
  const uint64_t e = (even | even >> 12 & kHighNibbles) & kLowWords, o = (odd | odd >> 12 & kHighNibbles) & kLowWords;
  const uint64_t spread_e = (e | e << 8) & kEvenBytes, spread_o = (o | o << 8) & kEvenBytes;
  return spread_e | spread_o << 8;
}

struct Packing {
  const std::vector<NVFP4Rows>& parts;
  uint8_t* panels;
  int n, k;
  bool e8m0;
  std::atomic<int64_t> bad{-1};  // row * groups + group of a NaN scale

  struct Row {
    const uint8_t *codes, *scales;
  };
  Row row(int r) const {
    for (const NVFP4Rows& part : parts) {
      if (r < part.n) {
        const size_t i = static_cast<size_t>(r);
        return {part.codes + i * (k / 2), part.scales + i * (k / (e8m0 ? 32 : 16))};
      }
      r -= part.n;
    }
    return {nullptr, nullptr};
  }

  static void work(const void* context, int begin, int end, int) {
    auto* self = static_cast<Packing*>(const_cast<void*>(context));
    for (int p = begin; p < end; p++) self->panel(p);
  }

  void panel(int p) {
    const int groups = k / kGroup, count = std::min(kPanel, n - p * kPanel);
    uint8_t* out = panels + p * panel_bytes(k);
    if (count < kPanel || k % 64) std::memset(out, 0, panel_bytes(k));
    Row rows[kPanel];
    for (int r = 0; r < count; r++) rows[r] = row(p * kPanel + r);
    for (int g = 0; g < groups; g++) {
      uint8_t* block = out + static_cast<size_t>(g / 4) * kBlockBytes;
      uint8_t* scales = block + 16 * (g % 4);
      uint8_t* codes = block + 64 + 128 * (g % 4);
      for (int r = 0; r < count; r++) {
        uint8_t scale = rows[r].scales[e8m0 ? g / 2 : g];
        uint64_t stored;
        std::memcpy(&stored, rows[r].codes + static_cast<size_t>(g) * 8, 8);
        if (e8m0) {
          if (scale == 0xff) bad = static_cast<int64_t>(p * kPanel + r) * groups + g;
        } else {
          if ((scale & 0x7f) == 0x7f) bad = static_cast<int64_t>(p * kPanel + r) * groups + g;
          if (scale & 0x80) stored ^= 0x8888888888888888ull;  // a negative scale: the codes carry the sign
          scale &= 0x7f;
        }
        scales[r] = scale;
        const uint64_t arranged = arrange(stored);
        std::memcpy(codes + 4 * r, &arranged, 4);
        std::memcpy(codes + 64 + 4 * r, reinterpret_cast<const char*>(&arranged) + 4, 4);
      }
    }
  }
};

constexpr size_t rounded(size_t size, size_t to) { return (size + to - 1) / to * to; }

// In huge pages where it fills one; `size` becomes what was allocated.
void* allocate(size_t& size) {
  const size_t alignment = size >= kHugePage ? kHugePage : kLine;
  size = rounded(size, alignment);
  void* data = std::aligned_alloc(alignment, size);
  if (!data) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (alignment == kHugePage) (void)madvise(data, size, MADV_HUGEPAGE);
#endif
  return data;
}

}  // namespace

Scratch::~Scratch() { std::free(data_); }

void* Scratch::bytes(size_t size) {
  if (size > size_) {
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
    data_ = allocate(size);
    size_ = size;
  }
  return data_;
}

std::shared_ptr<uint8_t> Arena::bytes(size_t size) {
  if (!run_ || rounded(size, kLine) > size_ - used_) {
    size_t whole = std::max({size, kRun, size_t{1}});
    run_ = std::shared_ptr<uint8_t>(static_cast<uint8_t*>(allocate(whole)), std::free);
    size_ = whole;
    used_ = 0;
  }
  const std::shared_ptr<uint8_t> part(run_, run_.get() + used_);
  used_ += rounded(size, kLine);
  return part;
}

PackedNVFP4::PackedNVFP4(Pool& pool, Arena& arena, const std::vector<NVFP4Rows>& parts, const float* row_scale,
                         const float* bias, int k_in, Numerics numerics_in, float input_scale_in, bool e8m0_in)
    : numerics(numerics_in), input_scale(input_scale_in), e8m0(e8m0_in) {
  k = k_in;
  for (const NVFP4Rows& part : parts) n += part.n;
  bytes = panel_bytes(k) * panels();
  panels_ = arena.bytes(bytes);
  Packing packing{parts, panels_.get(), n, k, e8m0};
  pool.run(Packing::work, &packing, panels(), std::max(1, static_cast<int>((size_t{1} << 20) / panel_bytes(k))));
  const int64_t bad = packing.bad;
  if (bad >= 0)
    throw std::invalid_argument("block scale [" + std::to_string(bad / (k / kGroup)) + ", " +
                                std::to_string(bad % (k / kGroup) / (e8m0 ? 2 : 1)) +
                                "] is NaN; expected finite values: quantise the layer again");
  const int padded = panels() * kPanel;
  row_scales_ = scale_memory_.floats(padded);
  biases_ = bias ? bias_memory_.floats(padded) : nullptr;
  for (int r = 0; r < padded; r++) {
    row_scales_[r] = r < n ? row_scale[r] * (e8m0 ? 1.f : 256.f) : 0.f;  // 2^8: load_scales gives 2^-8 of E4M3
    if (biases_) biases_[r] = r < n ? bias[r] : 0.f;
  }
  bytes += static_cast<size_t>(padded) * sizeof(float) * (bias ? 2 : 1);
}

void PackedNVFP4::run(Context& context, const void* x, Type type, int m, void* out, Type out_type) const {
  context.linear_nvfp4(*this, x, type, m, out, out_type);
}

void PlainWeight::run(Context& context, const void* x, Type type, int m, void* out, Type out_type) const {
  context.linear_plain(weight, x, type, m, out, out_type);
}

}  // namespace nvfp4
