// The power of two that scales the largest entry of a state to [0.5, 1), so that no square overflows.
#pragma once

#include "portable.h"

namespace gakernels {

constexpr int kSlices = 32;  // blocks that scan a state, one for each lane that reads their results

// peaks (batch, kSlices): the largest absolute value in each slice of a state.
struct Peaks {
  static constexpr int kThreads = 256, kBlocks = 4;
  static constexpr std::size_t kShared = kThreads * sizeof(float);

  struct Arguments {
    const float* states;  // (batch, entries)
    float* peaks;
    std::int64_t entries;  // of one state, a multiple of 4 * kSlices

    Index3 grid(int batch) const { return {kSlices, 1, batch}; }
  };

  template <class Thread>
  GAKERNELS_INLINE static void run(Thread& thread, const Arguments& arguments) {
    const Index3 block = thread.block();
    const std::int64_t count = arguments.entries / kSlices;
    const float* slice = arguments.states + block.z * arguments.entries + block.x * count;
    float peak = 0;
    for (std::int64_t i = 4 * thread.index(); i < count; i += 4 * kThreads) {
      const Four four = *reinterpret_cast<const Four*>(slice + i);
      peak = larger(larger(peak, larger(four.x, -four.x)), larger(four.y, -four.y));
      peak = larger(larger(peak, larger(four.z, -four.z)), larger(four.w, -four.w));
    }
    auto* all = reinterpret_cast<float*>(thread.shared());
    all[thread.index()] = peak;
    for (int half = kThreads / 2; half > 0; half /= 2) {
      thread.sync();
      if (thread.index() < half) all[thread.index()] = larger(all[thread.index()], all[thread.index() + half]);
    }
    if (thread.index() == 0) arguments.peaks[block.z * kSlices + block.x] = all[0];
  }

 private:
  struct alignas(16) Four {
    float x, y, z, w;
  };
  GAKERNELS_INLINE static float larger(float a, float b) { return b > a ? b : a; }  // ignores a NaN in b
};

// 2^-e for the state `index`, where e is the binary exponent of its peak, within [-120, 120]. Called by whole warps.
template <class Thread>
GAKERNELS_INLINE float power_of_two(Thread& thread, const float* peaks, int index) {
  double peak = peaks[static_cast<std::int64_t>(index) * kSlices + thread.lane()];
  GAKERNELS_UNROLL
  for (int step = 16; step > 0; step /= 2) {
    const double other = thread.shuffle(peak, thread.lane() ^ step);
    peak = other > peak ? other : peak;
  }
  int exponent = static_cast<int>(Thread::to_bits(static_cast<float>(peak)) >> 23) - 126;
  exponent = exponent < -120 ? -120 : (exponent > 120 ? 120 : exponent);
  return Thread::from_bits(static_cast<std::uint32_t>(127 - exponent) << 23);
}

}  // namespace gakernels
