// What this machine can do at best: bytes read from memory and multiply-adds, per second. Measured, never looked up.
#pragma once
#include <cstddef>
#include <string>
#include <vector>

namespace nvfp4 {

// A rate over many short windows of one measurement, in units per second (bytes or operations).
struct Rate {
  double median, low, high;  // of the windows: 50th, 10th and 90th percentile
  std::string how;           // the arrangement or instruction that gave it
};

// Peaks that `measure_peak` can measure on this CPU, of "vnni", "bf16" and "fma".
std::vector<std::string> peak_kinds();

// Bytes per second that `threads` threads read from a huge-page buffer of `bytes` in all, each its own part from front to
// back; several arrangements share `seconds`, and the fastest median wins. Throws std::invalid_argument on bad numbers.
Rate measure_read_bandwidth(int threads, size_t bytes, double seconds);

// Operations per second (a multiply-add is two) of one instruction on registers. Throws std::invalid_argument when the
// CPU lacks the instruction.
Rate measure_peak(const std::string& kind, int threads, double seconds);

}  // namespace nvfp4
