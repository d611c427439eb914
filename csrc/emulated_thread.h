// A thread of a CUDA block on the host, so that the kernels run unchanged without a GPU.
//
// The threads of a block are fibers of one host thread; they switch at barriers and at warp-wide operations. Where
// possible, the emulation is stricter than the hardware: shared memory starts as NaN, and every block draws at random
// the order of its threads, whether asynchronous copies arrive at once or only when they are waited for, and whether
// one warp lags behind. A barrier that not all threads reach is an error. Products of TF32 numbers are exact; their
// sums are truncated, not rounded, as on a tensor core.
#pragma once

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstddef>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <ucontext.h>
#include <utility>
#include <vector>

#include "portable.h"

namespace gakernels {

// longjmp of the C library. With _FORTIFY_SOURCE, which some distributions set, the name longjmp refers to a function
// that treats a jump to another stack as an error and aborts.
[[noreturn]] void jump(std::jmp_buf place, int value) __asm__("_longjmp");

class EmulatedBlock;

// Counts arrivals, and starts again when all have arrived.
struct Barrier {
  int expected = 0, arrived = 0;
  std::int64_t generation = 0;
};

// The data that the lanes of a warp exchange: a value, or the fragments of c (16 x 8) += a (16 x kDepth) b.
struct Exchange {
  double value[32], c[32][4], a[32][8], b[32][4];

  template <int kDepth>
  [[gnu::noinline]] void multiply() {
    for (int row = 0; row < 16; ++row) {
      double sums[8];
      for (int n = 0; n < 8; ++n) sums[n] = c[4 * (row % 8) + n / 2][2 * (row / 8) + n % 2];
      for (int k = 0; k < kDepth; ++k) {
        const double left = a[4 * (row % 8) + k % 4][row / 8 + 2 * (k / 4)];
        for (int n = 0; n < 8; ++n) sums[n] += left * b[4 * n + k % 4][k / 4];
      }
      for (int n = 0; n < 8; ++n) c[4 * (row % 8) + n / 2][2 * (row / 8) + n % 2] = sums[n];
    }
  }
};

struct EmulatedWarp {
  Barrier barrier;
  Exchange sides[2];  // used in turn, so that a fast lane can't overwrite what a slow one still reads
};

class EmulatedThread {
 public:
  int index() const { return index_; }
  int lane() const { return index_ % 32; }
  int warp() const { return index_ / 32; }
  Index3 block() const;
  unsigned char* shared() const;

  void sync();
  void sync_warp() { arrive(own_warp().barrier); }
  [[gnu::noinline]] double shuffle(double value, int source) {
    auto& side = own_warp().sides[turn_++ % 2];
    side.value[lane()] = value;
    sync_warp();
    return side.value[source];
  }

  void copy_async(void* to, const void* from, bool valid);
  void commit() {
    groups_.push_back(std::move(copies_));
    copies_.clear();
  }
  template <int kPending>
  void wait() {
    while (groups_.size() > kPending) {
      for (const auto& [to, from] : groups_.front()) copy(to, from);
      groups_.pop_front();
    }
  }

  static std::uint32_t to_tf32(float value) {
    const std::uint32_t bits = to_bits(value);
    return std::isfinite(value) ? (bits + 0x1000u) & ~0x1fffu : bits;
  }
  static float from_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  static std::uint32_t to_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
  }

  [[gnu::noinline]] void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    auto& side = own_warp().sides[turn_++ % 2];
    for (int i = 0; i < 4; ++i) side.c[lane()][i] = c[i];
    for (int i = 0; i < 4; ++i) side.a[lane()][i] = as_read(a[i]);
    for (int i = 0; i < 2; ++i) side.b[lane()][i] = as_read(b[i]);
    arrive(own_warp().barrier, [&side] { side.multiply<8>(); });
    for (int i = 0; i < 4; ++i) c[i] = cut_off(side.c[lane()][i]);
  }

  [[gnu::noinline]] void multiply_add(double (&c)[4], const double (&a)[8], const double (&b)[4]) {
    auto& side = own_warp().sides[turn_++ % 2];
    std::memcpy(side.c[lane()], c, sizeof c);
    std::memcpy(side.a[lane()], a, sizeof a);
    std::memcpy(side.b[lane()], b, sizeof b);
    arrive(own_warp().barrier, [&side] { side.multiply<16>(); });
    std::memcpy(c, side.c[lane()], sizeof c);
  }

  [[gnu::noinline]] void multiply_wide(float (&c)[64], const std::uint32_t (&a)[4], const float* b, int inner,
                                       bool add) {
    const Lane mine(lane());
    for (int j = 0; j < 16; ++j) {
      std::uint32_t right[2];
      for (int e = 0; e < 2; ++e) {
        right[e] = to_bits(b[SwizzledTile::offset(8 * j + mine.group, inner + mine.member + 4 * e)]);
      }
      float part[4];
      for (int e = 0; e < 4; ++e) part[e] = add ? c[4 * j + e] : 0;
      multiply_add(part, a, right);
      for (int e = 0; e < 4; ++e) c[4 * j + e] = part[e];
    }
  }
  void begin_wide() {}
  void finish_wide(float (&)[64]) {}
  void publish() {}

 private:
  friend class EmulatedBlock;
  using Group = std::vector<std::pair<void*, const void*>>;

  EmulatedWarp& own_warp() const;
  void arrive(Barrier& barrier) {
    arrive(barrier, [] {});
  }
  // The last thread to arrive does the common work.
  template <class Work>
  void arrive(Barrier& barrier, const Work& work);

  static void copy(void* to, const void* from) { from ? std::memcpy(to, from, 16) : std::memset(to, 0, 16); }

  // The low 13 bits of an operand are not read.
  static float as_read(std::uint32_t bits) { return from_bits(bits & ~0x1fffu); }
  static float cut_off(double value) {
    const auto rounded = static_cast<float>(value);
    return std::fabs(rounded) > std::fabs(value) && std::isfinite(value) ? std::nextafter(rounded, 0.0f) : rounded;
  }

  EmulatedBlock* block_ = nullptr;
  int index_ = 0;
  unsigned turn_ = 0;
  Group copies_;
  std::deque<Group> groups_;
  const Barrier* waits_for_ = nullptr;
  std::int64_t seen_ = 0;
  bool done_ = false;
  std::jmp_buf place_;
  ucontext_t start_;
};

// Runs the threads of a block as fibers, one block after another.
class EmulatedBlock {
 public:
  // Not a power of two: otherwise the stacks of all threads would share the same few cache lines.
  static constexpr std::size_t kStack = (32 << 10) + 576;

  EmulatedBlock(int threads, std::size_t shared, unsigned seed)
      : threads_(threads), warps_(threads / 32), order_(threads), shared_(shared + 1024),
        stacks_(threads * kStack), bytes_(shared), random_(seed) {
    std::iota(order_.begin(), order_.end(), 0);
    for (int i = 0; i < threads; ++i) {
      threads_[i].block_ = this;
      threads_[i].index_ = i;
    }
  }

  void run(Index3 position, const std::function<void(EmulatedThread&)>& kernel) {
    position_ = position;
    kernel_ = &kernel;
    barrier_ = {static_cast<int>(threads_.size()), 0, 0};
    for (auto& warp : warps_) warp.barrier = {32, 0, 0};
    const double nan = std::numeric_limits<double>::quiet_NaN();
    for (std::size_t i = 0; i + sizeof nan <= bytes_; i += sizeof nan) std::memcpy(shared() + i, &nan, sizeof nan);
    std::shuffle(order_.begin(), order_.end(), random_);
    copies_at_once_ = random_() % 2 == 0;
    slow_warp_ = random_() % 32 == 0 ? static_cast<int>(random_() % warps_.size()) : -1;
    for (auto& thread : threads_) begin(thread);
    while (pass()) {
    }
  }

 private:
  friend class EmulatedThread;

  unsigned char* shared() {
    const auto address = reinterpret_cast<std::uintptr_t>(shared_.data());
    return shared_.data() + (1024 - address % 1024) % 1024;
  }

  void begin(EmulatedThread& thread) {
    thread.done_ = false;
    thread.waits_for_ = nullptr;
    thread.turn_ = 0;
    getcontext(&thread.start_);
    thread.start_.uc_stack.ss_sp = stacks_.data() + thread.index_ * kStack;
    thread.start_.uc_stack.ss_size = kStack;
    thread.start_.uc_link = nullptr;
    const auto address = reinterpret_cast<std::uintptr_t>(&thread);
    makecontext(&thread.start_, reinterpret_cast<void (*)()>(enter), 2, static_cast<unsigned>(address >> 32),
                static_cast<unsigned>(address));
    if (_setjmp(home_) == 0) setcontext(&thread.start_);
  }

  // The first entry stops at once: later switches are jumps, which are far cheaper than context switches.
  static void enter(unsigned high, unsigned low) {
    auto& thread = *reinterpret_cast<EmulatedThread*>(static_cast<std::uintptr_t>(high) << 32 | low);
    leave(thread);
    try {
      (*thread.block_->kernel_)(thread);
    } catch (...) {  // an exception can't leave the fiber's stack
      thread.block_->failure_ = std::current_exception();
    }
    thread.done_ = true;
    jump(thread.block_->home_, 1);
  }

  static void leave(EmulatedThread& thread) {
    if (_setjmp(thread.place_) == 0) jump(thread.block_->home_, 1);
  }

  [[gnu::noinline]] void resume(EmulatedThread& thread) {
    if (_setjmp(home_) == 0) jump(thread.place_, 1);
  }

  // Runs every thread up to its next barrier, those of a slow warp only now and then. False when all are done.
  bool pass() {
    bool moved = false, finished = true;
    const bool waiting = ++passes_ % 8 != 0;
    for (const int index : order_) {
      auto& thread = threads_[index];
      if (thread.done_) continue;
      finished = false;
      if (thread.waits_for_ != nullptr && thread.waits_for_->generation == thread.seen_) continue;
      moved = true;
      if (waiting && thread.warp() == slow_warp_) continue;
      thread.waits_for_ = nullptr;
      resume(thread);
      if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
    }
    if (!finished && !moved) throw std::runtime_error("a barrier was not reached by all threads");
    return !finished;
  }

  std::vector<EmulatedThread> threads_;
  std::vector<EmulatedWarp> warps_;
  std::vector<int> order_;
  std::vector<unsigned char> shared_, stacks_;
  std::size_t bytes_;
  std::mt19937 random_;
  bool copies_at_once_ = false;
  int slow_warp_ = -1;
  unsigned passes_ = 0;
  Index3 position_{};
  Barrier barrier_;
  const std::function<void(EmulatedThread&)>* kernel_ = nullptr;
  std::exception_ptr failure_;  // the kernel's exception, on its way out of a fiber
  std::jmp_buf home_;
};

inline Index3 EmulatedThread::block() const { return block_->position_; }
inline unsigned char* EmulatedThread::shared() const { return block_->shared(); }
inline EmulatedWarp& EmulatedThread::own_warp() const { return block_->warps_[warp()]; }
inline void EmulatedThread::sync() { arrive(block_->barrier_); }

inline void EmulatedThread::copy_async(void* to, const void* from, bool valid) {
  if (block_->copies_at_once_) {
    copy(to, valid ? from : nullptr);
  } else {
    copies_.push_back({to, valid ? from : nullptr});
  }
}

template <class Work>
void EmulatedThread::arrive(Barrier& barrier, const Work& work) {
  if (++barrier.arrived == barrier.expected) {
    work();
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  waits_for_ = &barrier;
  seen_ = barrier.generation;
  EmulatedBlock::leave(*this);
}

}  // namespace gakernels
