// The gradient of S: the sum of the outer products of all steps, as one product of inner size steps * rank.
#pragma once

#include <cstddef>
#include <type_traits>

#include "portable.h"
#include "product.h"
#include "product64.h"
#include "scale.h"

namespace gakernels {

// dS = the sum over the steps k of dX_k Y_(k-1)^T (k even) or Y_(k-1) dX_k^T (k odd); Y_(-1) is the sketch. With
// float32 matrices on TF32 tensor cores, where the steps used 2^-e S, it is multiplied by 2^-e.
template <class Scalar>
struct OuterProducts {
  static constexpr bool kExact = std::is_same_v<Scalar, double>;
  static constexpr int kTile = kExact ? 64 : 128;
  using Tile = std::conditional_t<kExact, Product64Tile<double, false, double, true>,
                                  ProductTile<128, 128, false, true>>;
  static constexpr int kThreads = Tile::kThreads, kBlocks = kExact ? 2 : 1;
  static constexpr std::size_t kShared = Tile::kShared;

  struct Arguments {
    const float* peaks;
    const Scalar* gradients;  // dX (batch, steps, size, rank)
    const Scalar* bases;      // Y_0, ..., Y_(steps - 2): (batch, steps - 1, size, rank)
    const Scalar* sketch;     // (size, rank)
    float* out;               // (batch, size, size)
    int size, rank, steps;

    Index3 grid(int batch) const { return {size / kTile, size / kTile, batch}; }
  };

  template <class Thread>
  GAKERNELS_INLINE static void run(Thread& thread, const Arguments& arguments) {
    const Index3 block = thread.block();
    const int size = arguments.size, chunks = arguments.steps * (arguments.rank / Tile::kDepth);
    const Source source{arguments, block};
    typename Tile::Sums sums = {};
    Scalar scale = 1;
    if constexpr (kExact) {
      Tile::multiply(thread, source, chunks, sums);
    } else {
      scale = power_of_two(thread, arguments.peaks, block.z);
      Tile::multiply(thread, source, chunks, 1.0f, sums);
    }
    float* out = arguments.out + static_cast<std::int64_t>(block.z) * size * size;
    Tile::for_each_pair(thread, sums, [&](int row, int column, Scalar left, Scalar right) {
      const std::int64_t at = static_cast<std::int64_t>(block.x * kTile + row) * size + block.y * kTile + column;
      out[at] = static_cast<float>(scale * left);
      out[at + 1] = static_cast<float>(scale * right);
    });
  }

 private:
  struct Source {
    const Arguments& arguments;
    const Index3 block;

    GAKERNELS_INLINE const Scalar* a(int chunk) const { return find(chunk, block.x, 0); }
    GAKERNELS_INLINE const Scalar* b(int chunk) const { return find(chunk, block.y, 1); }
    GAKERNELS_INLINE int lda() const { return arguments.rank; }
    GAKERNELS_INLINE int ldb() const { return arguments.rank; }
    GAKERNELS_INLINE int rows() const { return kTile; }
    GAKERNELS_INLINE int columns() const { return kTile; }

    // dX_k is the left factor in even steps and the right one in odd steps.
    GAKERNELS_INLINE const Scalar* find(int chunk, int tile, int side) const {
      const int per_step = arguments.rank / Tile::kDepth, k = chunk / per_step;
      const std::int64_t matrix = static_cast<std::int64_t>(arguments.size) * arguments.rank;
      const Scalar* base;
      if (k % 2 == side) {
        base = arguments.gradients + (static_cast<std::int64_t>(block.z) * arguments.steps + k) * matrix;
      } else if (k == 0) {
        base = arguments.sketch;
      } else {
        base = arguments.bases + (static_cast<std::int64_t>(block.z) * (arguments.steps - 1) + k - 1) * matrix;
      }
      return base + static_cast<std::int64_t>(tile) * kTile * arguments.rank + chunk % per_step * Tile::kDepth;
    }
  };
};

}  // namespace gakernels
