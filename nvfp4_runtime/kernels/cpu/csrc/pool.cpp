#include "pool.h"

#include <pthread.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace nvfp4 {
namespace {

constexpr int kSpins = 4000;  // some 100 to 200 microseconds: the gap between two ops of a step

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A forked child has none of its parent's threads: every fork starts a new era, and pools hire again in it.
std::atomic<unsigned> era{0};
void next_era() { era.fetch_add(1, std::memory_order_relaxed); }
const int at_fork = pthread_atfork(nullptr, nullptr, next_era);

}  // namespace

struct Pool::Crew {
  unsigned born = 0;
  std::vector<std::thread> threads;
  std::mutex mutex;
  std::condition_variable wake;
  int sleeping = 0;  // under mutex
  std::atomic<bool> closing{false};

  alignas(64) std::atomic<uint64_t> ticket{0};  // a new piece of work is posted
  // Each thread owns a run of neighbouring pieces, so that it reads one stream; who is done first helps the others.
  struct alignas(64) Share {
    std::atomic<int> next{0};
    int end = 0;
  };
  std::vector<Share> shares;
  // A worker counts itself in before it looks whether work is open; the caller closes the work before it looks for
  // workers. Both are sequentially consistent, so either the worker sees "closed" or the caller waits for it. A worker
  // that the system never ran in time is not waited for: the caller has done its share.
  alignas(64) std::atomic<int> inside{0};
  std::atomic<bool> open{false};
  Work work = nullptr;
  const void* context = nullptr;
  int grain = 1, most = 0;

  explicit Crew(int size) : shares(static_cast<size_t>(size)) {}

  void divide(int count, Pieces cut) {
    grain = cut.grain;
    most = cut.most;
    const int size = static_cast<int>(shares.size()), pieces = (count + grain - 1) / grain;
    int begin = 0;
    for (int i = 0; i < size; i++) {
      Share& share = shares[static_cast<size_t>(i)];
      share.next.store(begin, std::memory_order_relaxed);
      begin = static_cast<int>(static_cast<int64_t>(pieces) * (i + 1) / size) * grain;
      share.end = begin < count ? begin : count;
    }
  }

  void take(int thread) {
    const int size = static_cast<int>(shares.size());
    for (int i = 0; i < size; i++) {
      Share& share = shares[static_cast<size_t>((thread + i) % size)];
      for (int begin = share.next.load(std::memory_order_relaxed); begin < share.end;) {
        const int left = share.end - begin, half = left / 2 < most ? left / 2 : most;
        const int items = half > grain ? (half + grain - 1) / grain * grain : grain, end = items < left ? begin + items : share.end;
        if (!share.next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
        work(context, begin, end, thread);
        begin = share.next.load(std::memory_order_relaxed);
      }
    }
  }

  void live(int thread) {
    uint64_t seen = 0;
    for (;;) {
      int spins = 0;
      while (ticket.load(std::memory_order_acquire) == seen && spins < kSpins) {
        relax();
        spins++;
      }
      if (ticket.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex);
        sleeping++;
        wake.wait(lock, [&] { return ticket.load(std::memory_order_acquire) != seen; });
        sleeping--;
      }
      seen = ticket.load(std::memory_order_acquire);
      if (closing) return;
      inside.fetch_add(1);
      if (open.load()) take(thread);
      inside.fetch_sub(1);
    }
  }

  void post() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      ticket.fetch_add(1, std::memory_order_release);
      if (!sleeping) return;
    }
    wake.notify_all();
  }
};

Pool::Pool(int threads) : threads_(threads < 1 ? 1 : threads) { (void)at_fork; }

Pool::~Pool() {
  if (!crew_) return;
  if (crew_->born != era.load(std::memory_order_relaxed)) {
    (void)crew_.release();  // the threads are another process's; joining them would never end
    return;
  }
  crew_->closing = true;
  crew_->post();
  for (auto& t : crew_->threads) t.join();
}

void Pool::hire() {
  const unsigned now = era.load(std::memory_order_relaxed);
  if (crew_ && crew_->born == now) return;
  (void)crew_.release();
  crew_ = std::make_unique<Crew>(threads_);
  crew_->born = now;
  for (int i = 1; i < threads_; i++) crew_->threads.emplace_back([crew = crew_.get(), i] { crew->live(i); });
}

void Pool::run(Work work, const void* context, int count, Pieces pieces) {
  if (count <= 0) return;
  const int grain = threads_ == 1 && pieces.most ? count : pieces.grain;
  if (threads_ == 1 || count <= grain) {
    for (int begin = 0; begin < count; begin += grain) work(context, begin, begin + grain < count ? begin + grain : count, 0);
    return;
  }
  hire();
  Crew& crew = *crew_;
  crew.work = work;
  crew.context = context;
  crew.divide(count, pieces);
  crew.open.store(true);
  crew.post();
  crew.take(0);
  crew.open.store(false);
  for (int spins = 0; crew.inside.load() != 0; spins++) {
    relax();
    if (spins > kSpins) std::this_thread::yield();  // more threads than cores: let the last one finish
  }
}

}  // namespace nvfp4
