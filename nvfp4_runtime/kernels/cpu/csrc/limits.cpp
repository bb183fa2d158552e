#include "limits.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <new>
#include <stdexcept>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#define NVFP4_TARGET(isa) __attribute__((target(isa)))
#endif

namespace nvfp4 {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kPieceBytes = size_t{256} << 10;  // read between two looks at the clock: about 10 us
constexpr double kWindow = 0.005;                  // seconds over which a rate is taken; a preemption spoils a few of them
constexpr int kMaxThreads = 1024;

volatile uint64_t sink;  // results end here, so that no loop is dead

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Memory of whole huge pages where the system grants them. It must be written before it is read: untouched pages all
// show the same page of zeros, which would be read from cache.
class Buffer {
 public:
  explicit Buffer(size_t size) : size_(size + kHugePage) {
    map_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map_ == MAP_FAILED) throw std::bad_alloc();
    const auto address = reinterpret_cast<uintptr_t>(map_);
    data_ = reinterpret_cast<uint8_t*>((address + kHugePage - 1) / kHugePage * kHugePage);
#if defined(MADV_HUGEPAGE)
    (void)madvise(data_, size, MADV_HUGEPAGE);
#endif
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { munmap(map_, size_); }
  uint8_t* data() const { return data_; }

 private:
  void* map_;
  size_t size_;
  uint8_t* data_;
};

double percentile(const std::vector<double>& sorted, double share) {
  return sorted[static_cast<size_t>(share * static_cast<double>(sorted.size() - 1) + 0.5)];
}

// Every thread repeats `piece(thread)` for `seconds`; the rate in each window counts the pieces of all threads that end
// in it, one that began earlier by the part inside. `prepare(thread)` runs first, then all start together.
Rate run(int threads, double seconds, double units_per_piece, const std::function<void(int)>& prepare,
         const std::function<void(int)>& piece) {
  std::vector<std::vector<double>> ends(static_cast<size_t>(threads));
  std::atomic<int> waiting{threads};
  std::vector<std::thread> workers;
  const auto work = [&](int thread) {
    auto& mine = ends[static_cast<size_t>(thread)];
    mine.reserve(1 << 18);
    prepare(thread);
    piece(thread);
    waiting.fetch_sub(1);
    while (waiting.load() > 0) std::this_thread::yield();
    const double stop = now() + seconds;
    mine.push_back(now());
    while (mine.back() < stop) {
      piece(thread);
      mine.push_back(now());
    }
  };
  for (int t = 1; t < threads; t++) workers.emplace_back(work, t);
  work(0);
  for (auto& worker : workers) worker.join();

  double begin = 0, end = 1e300;  // while every thread was at it
  for (const auto& mine : ends) {
    begin = std::max(begin, mine.front());
    end = std::min(end, mine.back());
  }
  const int windows = std::max(1, static_cast<int>((end - begin) / kWindow));
  const double width = (end - begin) / windows;
  std::vector<double> rates(static_cast<size_t>(windows), 0.0);
  for (const auto& mine : ends)
    for (size_t i = 1; i < mine.size(); i++) {
      const double from = mine[i - 1], to = mine[i];
      const int first = std::max(0, static_cast<int>((from - begin) / width));
      for (int w = first; w < windows && begin + w * width < to; w++) {
        const double inside = std::min(to, begin + (w + 1) * width) - std::max(from, begin + w * width);
        if (inside > 0) rates[static_cast<size_t>(w)] += units_per_piece * inside / (to - from) / width;
      }
    }
  std::sort(rates.begin(), rates.end());
  return {percentile(rates, 0.5), percentile(rates, 0.1), percentile(rates, 0.9), ""};
}

void check(int threads, double seconds) {
  if (threads < 1 || threads > kMaxThreads)
    throw std::invalid_argument("threads must be 1 to " + std::to_string(kMaxThreads) + ", found " +
                                std::to_string(threads));
  if (!(seconds > 0) || seconds > 600)
    throw std::invalid_argument("seconds must be above 0 and at most 600, found " + std::to_string(seconds));
}

// --- reading: `streams` places `stride` bytes apart, `bytes` of each, in cache lines ---

using Read = void (*)(const uint8_t* from, size_t stride, int streams, size_t bytes, size_t ahead);

void read_portable(const uint8_t* from, size_t stride, int streams, size_t bytes, size_t ahead) {
  uint64_t sums[8] = {};
  for (size_t o = 0; o < bytes; o += 64)
    for (int s = 0; s < streams; s++) {
      const uint8_t* at = from + static_cast<size_t>(s) * stride + o;
      if (ahead) __builtin_prefetch(at + ahead);
      for (int i = 0; i < 8; i++) {
        uint64_t word;
        std::memcpy(&word, at + 8 * i, 8);
        sums[i] ^= word;
      }
    }
  for (int i = 1; i < 8; i++) sums[0] ^= sums[i];
  sink = sums[0];
}

#if defined(__x86_64__)
NVFP4_TARGET("avx2")
void read_avx2(const uint8_t* from, size_t stride, int streams, size_t bytes, size_t ahead) {
  __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
  for (size_t o = 0; o < bytes; o += 128)
    for (int s = 0; s < streams; s++) {
      const uint8_t* at = from + static_cast<size_t>(s) * stride + o;
      if (ahead) {
        _mm_prefetch(reinterpret_cast<const char*>(at + ahead), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(at + ahead + 64), _MM_HINT_T0);
      }
      const auto* v = reinterpret_cast<const __m256i*>(at);
      a = _mm256_xor_si256(a, _mm256_load_si256(v));
      b = _mm256_xor_si256(b, _mm256_load_si256(v + 1));
      c = _mm256_xor_si256(c, _mm256_load_si256(v + 2));
      d = _mm256_xor_si256(d, _mm256_load_si256(v + 3));
    }
  a = _mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_xor_si256(c, d));
  sink = static_cast<uint64_t>(_mm256_extract_epi64(a, 0) ^ _mm256_extract_epi64(a, 3));
}

NVFP4_TARGET("avx512f")
void read_avx512(const uint8_t* from, size_t stride, int streams, size_t bytes, size_t ahead) {
  __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
  for (size_t o = 0; o < bytes; o += 256)
    for (int s = 0; s < streams; s++) {
      const uint8_t* at = from + static_cast<size_t>(s) * stride + o;
      if (ahead)
        for (int i = 0; i < 4; i++) _mm_prefetch(reinterpret_cast<const char*>(at + ahead + 64 * i), _MM_HINT_T0);
      a = _mm512_xor_si512(a, _mm512_load_si512(at));
      b = _mm512_xor_si512(b, _mm512_load_si512(at + 64));
      c = _mm512_xor_si512(c, _mm512_load_si512(at + 128));
      d = _mm512_xor_si512(d, _mm512_load_si512(at + 192));
    }
  a = _mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d));
  sink = static_cast<uint64_t>(_mm512_reduce_add_epi64(a));
}
#endif

Read best_read() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return read_avx512;
  if (__builtin_cpu_supports("avx2")) return read_avx2;
#endif
  return read_portable;
}

// --- arithmetic: 16 independent accumulators cover latency 4 on two ports twice over; they start unequal, so that no
// compiler may merge them ---

constexpr int kChains = 16, kRounds = 4000;

#if defined(__x86_64__)
NVFP4_TARGET("avx512f,avx512vnni")
void peak_vnni() {
  __m512i sum[kChains];
  const __m512i x = _mm512_set1_epi32(static_cast<int>(sink) | 0x01020304), y = _mm512_set1_epi32(0x05060708);
#pragma GCC unroll 16
  for (int i = 0; i < kChains; i++) sum[i] = _mm512_set1_epi32(i);
  for (int r = 0; r < kRounds; r++) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; i++) sum[i] = _mm512_dpbusd_epi32(sum[i], x, y);
  }
#pragma GCC unroll 16
  for (int i = 1; i < kChains; i++) sum[0] = _mm512_xor_si512(sum[0], sum[i]);
  sink = static_cast<uint64_t>(_mm512_reduce_add_epi64(sum[0]));
}

NVFP4_TARGET("avx512f,avx512bf16")
void peak_bf16() {
  __m512 sum[kChains];
  const __m512i ones = _mm512_set1_epi32(static_cast<int>(sink & 1) | 0x3f803f80);
  __m512bh x, y;
  std::memcpy(&x, &ones, sizeof x);
  std::memcpy(&y, &ones, sizeof y);
#pragma GCC unroll 16
  for (int i = 0; i < kChains; i++) sum[i] = _mm512_set1_ps(static_cast<float>(i));
  for (int r = 0; r < kRounds; r++) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; i++) sum[i] = _mm512_dpbf16_ps(sum[i], x, y);
  }
#pragma GCC unroll 16
  for (int i = 1; i < kChains; i++) sum[0] = _mm512_add_ps(sum[0], sum[i]);
  sink = static_cast<uint64_t>(_mm512_reduce_add_ps(sum[0]));
}

NVFP4_TARGET("avx512f")
void peak_fma512() {
  __m512 sum[kChains];
  const __m512 x = _mm512_set1_ps(static_cast<float>(sink & 1)), y = _mm512_set1_ps(0.5f);
#pragma GCC unroll 16
  for (int i = 0; i < kChains; i++) sum[i] = _mm512_set1_ps(static_cast<float>(i));
  for (int r = 0; r < kRounds; r++) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; i++) sum[i] = _mm512_fmadd_ps(x, y, sum[i]);
  }
#pragma GCC unroll 16
  for (int i = 1; i < kChains; i++) sum[0] = _mm512_add_ps(sum[0], sum[i]);
  sink = static_cast<uint64_t>(_mm512_reduce_add_ps(sum[0]));
}

// 12 chains: with the two factors they fill 14 of the 16 registers.
NVFP4_TARGET("avx2,fma")
void peak_fma256() {
  constexpr int chains = 12;
  __m256 sum[chains];
  const __m256 x = _mm256_set1_ps(static_cast<float>(sink & 1)), y = _mm256_set1_ps(0.5f);
#pragma GCC unroll 12
  for (int i = 0; i < chains; i++) sum[i] = _mm256_set1_ps(static_cast<float>(i));
  for (int r = 0; r < kRounds; r++) {
#pragma GCC unroll 12
    for (int i = 0; i < chains; i++) sum[i] = _mm256_fmadd_ps(x, y, sum[i]);
  }
#pragma GCC unroll 12
  for (int i = 1; i < chains; i++) sum[0] = _mm256_add_ps(sum[0], sum[i]);
  float lanes[8];
  _mm256_storeu_ps(lanes, sum[0]);
  sink = static_cast<uint64_t>(lanes[0] + lanes[7]);
}
#endif

struct Peak {
  void (*piece)();
  double operations;  // of one piece
  const char* how;
};

// piece is null where the CPU lacks the instruction
Peak find_peak(const std::string& kind) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const double rounds = kRounds;
  if (__builtin_cpu_supports("avx512f")) {
    if (kind == "vnni" && __builtin_cpu_supports("avx512vnni"))
      return {peak_vnni, rounds * kChains * 128, "vpdpbusd zmm"};
    if (kind == "bf16" && __builtin_cpu_supports("avx512bf16")) return {peak_bf16, rounds * kChains * 64, "vdpbf16ps zmm"};
    if (kind == "fma") return {peak_fma512, rounds * kChains * 32, "vfmadd ps zmm"};
  }
  if (kind == "fma" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return {peak_fma256, rounds * 12 * 16, "vfmadd ps ymm"};
#endif
  (void)kind;
  return {nullptr, 0, ""};
}

}  // namespace

std::vector<std::string> peak_kinds() {
  std::vector<std::string> kinds;
  for (const char* kind : {"vnni", "bf16", "fma"})
    if (find_peak(kind).piece) kinds.emplace_back(kind);
  return kinds;
}

Rate measure_read_bandwidth(int threads, size_t bytes, double seconds) {
  check(threads, seconds);
  const size_t part = bytes / static_cast<size_t>(threads) / kHugePage * kHugePage;  // each thread's own
  if (part < 4 * kHugePage)
    throw std::invalid_argument("at least 8 MiB a thread are needed to measure memory and not caches, found " +
                                std::to_string(bytes) + " bytes for " + std::to_string(threads) + " threads");
  const Buffer buffer(part * static_cast<size_t>(threads));
  const Read read = best_read();
  struct Arrangement {
    int streams;
    size_t ahead;
  };
  const Arrangement arrangements[] = {{1, 0}, {1, 4096}, {2, 1024}, {4, 1024}};
  std::vector<size_t> at(static_cast<size_t>(threads));
  Rate best{};
  for (const auto& a : arrangements) {
    const size_t stride = part / static_cast<size_t>(a.streams), step = kPieceBytes / static_cast<size_t>(a.streams);
    const bool first = &a == arrangements;
    const auto prepare = [&](int t) {
      if (first) std::memset(buffer.data() + static_cast<size_t>(t) * part, t + 1, part);  // by who reads it: its node
      at[static_cast<size_t>(t)] = 0;
    };
    const auto piece = [&](int t) {
      size_t& o = at[static_cast<size_t>(t)];
      // A prefetch reads up to 5 KiB past the piece; at the very end that is unmapped or the next part, and harmless.
      read(buffer.data() + static_cast<size_t>(t) * part + o, stride, a.streams, step, a.ahead);
      o = o + 2 * step <= stride ? o + step : 0;
    };
    Rate rate = run(threads, seconds / 4, static_cast<double>(kPieceBytes), prepare, piece);
    if (rate.median > best.median) {
      best = rate;
      best.how = std::to_string(a.streams) + (a.streams == 1 ? " stream" : " streams") + " a thread" +
                 (a.ahead ? ", prefetch " + std::to_string(a.ahead) : "");
    }
  }
  return best;
}

Rate measure_peak(const std::string& kind, int threads, double seconds) {
  check(threads, seconds);
  const Peak peak = find_peak(kind);
  if (!peak.piece) {
    std::string known;
    for (const auto& name : peak_kinds()) known += (known.empty() ? "" : ", ") + name;
    throw std::invalid_argument("the peak '" + kind + "' cannot be measured on this CPU; it has " +
                                (known.empty() ? "none of vnni, bf16, fma" : known));
  }
  Rate rate = run(threads, seconds, peak.operations, [](int) {}, [&](int) { peak.piece(); });
  rate.how = peak.how;
  return rate;
}

}  // namespace nvfp4
