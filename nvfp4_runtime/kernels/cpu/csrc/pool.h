// Persistent threads that share one piece of work at a time. Workers spin briefly for the next piece (a decode step hands
// out some two hundred, microseconds apart), then sleep.
#pragma once
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace nvfp4 {

// How work is cut: into pieces of `grain` items; or, with `most`, of half of what a thread's share has left, in whole grains and at
// most so many items: long ones at first, and short ones at last, so that no thread waits long for another. One thread alone
// then takes all at once.
struct Pieces {
  int grain, most;
  Pieces(int items, int up_to = 0) : grain(items), most(up_to) {}
};

class Pool {
 public:
  using Work = void (*)(const void* context, int begin, int end, int thread);

  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return threads_; }

  // Calls work over [0, count) in pieces on all threads, and returns when all is done. Which thread takes which piece is
  // left to chance; kernels give the same bits for any split. One caller at a time.
  void run(Work work, const void* context, int count, Pieces pieces);

 private:
  struct Crew;
  void hire();

  const int threads_;
  std::unique_ptr<Crew> crew_;
};

}  // namespace nvfp4
