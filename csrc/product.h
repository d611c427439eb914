// Products of float32 matrices on TF32 tensor cores, to float32 accuracy.
//
// Each factor is split into two TF32 numbers, x = high + low to 2^-23, and three of the four products are formed
// ("TF32x3"; low * low is below the rounding). Tensor cores truncate sums instead of rounding them, so they only sum
// 32 terms at a time; these partial sums are added up with rounding outside.
#pragma once

#include <cstddef>

#include "portable.h"
#include "scale.h"

namespace gakernels {

// One kRows x kColumns tile of a b: a (rows x depth) and b (depth x columns) go through shared memory in chunks.
// A transposed operand is stored with its inner index first (a) or last (b). Each warp computes a 32 x 32 part.
template <int kRows, int kColumns, bool kTransposeA, bool kTransposeB>
struct ProductTile {
  static constexpr int kDepth = 32, kStages = 3;
  static constexpr int kThreads = kRows * kColumns / 32;
  static constexpr int kWarpColumns = kColumns / 32;
  // Rows in shared memory are padded so that reading a fragment hits 32 different banks.
  static constexpr int kLeadingA = kTransposeA ? kRows + 8 : kDepth + 4;
  static constexpr int kLeadingB = kTransposeB ? kDepth + 4 : kColumns + 8;
  static constexpr int kFloatsA = (kTransposeA ? kDepth : kRows) * kLeadingA;
  static constexpr int kFloatsB = (kTransposeB ? kColumns : kDepth) * kLeadingB;
  static constexpr std::size_t kShared = sizeof(float) * kStages * (kFloatsA + kFloatsB);

  using Sums = float[2][4][4];

  // `source` gives the chunks: a(chunk) and b(chunk), with leading dimensions lda() and ldb(); columns of b from
  // source.columns() on count as zero. a is multiplied by `scale`.
  template <class Thread, class Source>
  GAKERNELS_INLINE static void multiply(Thread& thread, const Source& source, int chunks, float scale, Sums& sums) {
    auto* memory = reinterpret_cast<float*>(thread.shared());
    GAKERNELS_UNROLL
    for (int stage = 0; stage < kStages - 1; ++stage) {
      if (stage < chunks) load(thread, source, stage, memory + stage * (kFloatsA + kFloatsB));
      thread.commit();
    }
    for (int chunk = 0; chunk < chunks; ++chunk) {
      thread.template wait<kStages - 2>();
      thread.sync();
      const int next = chunk + kStages - 1;
      if (next < chunks) load(thread, source, next, memory + next % kStages * (kFloatsA + kFloatsB));
      thread.commit();
      const float* a = memory + chunk % kStages * (kFloatsA + kFloatsB);
      add_chunk(thread, a, a + kFloatsA, scale, sums);
    }
  }

  // Calls store(row, column, first, second) for every pair of neighbouring columns of the tile.
  template <class Thread, class Store>
  GAKERNELS_INLINE static void for_each_pair(Thread& thread, const Sums& sums, const Store& store) {
    const Lane lane(thread.lane());
    const int row = thread.warp() / kWarpColumns * 32 + lane.group;
    const int column = thread.warp() % kWarpColumns * 32 + 2 * lane.member;
    GAKERNELS_UNROLL
    for (int i = 0; i < 2; ++i) {
      GAKERNELS_UNROLL
      for (int j = 0; j < 4; ++j) {
        GAKERNELS_UNROLL
        for (int half = 0; half < 2; ++half) {
          store(row + 16 * i + 8 * half, column + 8 * j, sums[i][j][2 * half], sums[i][j][2 * half + 1]);
        }
      }
    }
  }

 private:
  template <class Thread, class Source>
  GAKERNELS_INLINE static void load(Thread& thread, const Source& source, int chunk, float* stage) {
    constexpr int kWidthA = (kTransposeA ? kRows : kDepth) / 4, kWidthB = (kTransposeB ? kDepth : kColumns) / 4;
    const float* a = source.a(chunk);
    for (int i = thread.index(); i < kRows * kDepth / 4; i += kThreads) {
      const int row = i / kWidthA, column = i % kWidthA * 4;
      thread.copy_async(stage + row * kLeadingA + column, a + static_cast<std::int64_t>(row) * source.lda() + column,
                        true);
    }
    const float* b = source.b(chunk);
    for (int i = thread.index(); i < kColumns * kDepth / 4; i += kThreads) {
      const int row = i / kWidthB, column = i % kWidthB * 4;
      const bool valid = (kTransposeB ? row : column) < source.columns();
      thread.copy_async(stage + kFloatsA + row * kLeadingB + column,
                        valid ? b + static_cast<std::int64_t>(row) * source.ldb() + column : b, valid);
    }
  }

  template <class Thread>
  GAKERNELS_INLINE static void add_chunk(Thread& thread, const float* a, const float* b, float scale, Sums& sums) {
    const Lane lane(thread.lane());
    const int row = thread.warp() / kWarpColumns * 32 + lane.group;
    const int column = thread.warp() % kWarpColumns * 32 + lane.group;
    Sums part = {};
    GAKERNELS_UNROLL_TWICE  // unrolling all four steps would need more than 128 registers
    for (int step = 0; step < kDepth; step += 8) {
      const int k = step + lane.member;
      std::uint32_t a_high[2][4], a_low[2][4], b_high[4][2], b_low[4][2];
      GAKERNELS_UNROLL
      for (int i = 0; i < 2; ++i) {
        GAKERNELS_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int m = row + 16 * i + 8 * (e % 2), inner = k + 4 * (e / 2);
          split<Thread>(scale * (kTransposeA ? a[inner * kLeadingA + m] : a[m * kLeadingA + inner]), a_high[i][e],
                        a_low[i][e]);
        }
      }
      GAKERNELS_UNROLL
      for (int j = 0; j < 4; ++j) {
        GAKERNELS_UNROLL
        for (int e = 0; e < 2; ++e) {
          const int n = column + 8 * j, inner = k + 4 * e;
          split<Thread>(kTransposeB ? b[n * kLeadingB + inner] : b[inner * kLeadingB + n], b_high[j][e], b_low[j][e]);
        }
      }
      add(thread, part, a_low, b_high);  // small products first
      add(thread, part, a_high, b_low);
      add(thread, part, a_high, b_high);
    }
    GAKERNELS_UNROLL
    for (int i = 0; i < 2; ++i) {
      GAKERNELS_UNROLL
      for (int j = 0; j < 4; ++j) {
        GAKERNELS_UNROLL
        for (int e = 0; e < 4; ++e) sums[i][j][e] += part[i][j][e];
      }
    }
  }

  template <class Thread>
  GAKERNELS_INLINE static void split(float value, std::uint32_t& high, std::uint32_t& low) {
    high = Thread::to_tf32(value);
    low = Thread::to_tf32(value - Thread::from_bits(high));
  }

  template <class Thread>
  GAKERNELS_INLINE static void add(Thread& thread, Sums& sums, const std::uint32_t (&a)[2][4],
                                   const std::uint32_t (&b)[4][2]) {
    GAKERNELS_UNROLL
    for (int i = 0; i < 2; ++i) {
      GAKERNELS_UNROLL
      for (int j = 0; j < 4; ++j) thread.multiply_add(sums[i][j], a[i], b[j]);
    }
  }
};

// out = 2^-e S factor (+ addend), or with S^T: the product of a step. Columns of a tile beyond the rank are not stored.
template <int kRows, int kColumns, bool kTranspose>
struct StateProduct {
  using Tile = ProductTile<kRows, kColumns, kTranspose, false>;
  static constexpr int kThreads = Tile::kThreads, kBlocks = kThreads <= 256 ? 2 : 1;
  static constexpr std::size_t kShared = Tile::kShared;

  struct Arguments {
    const float* states;  // (batch, size, size)
    const float* peaks;   // (batch, kSlices)
    const float* factor;  // (size, rank) of the first matrix
    const float* addend;  // (batch, size, rank), or null
    float* out;           // (size, rank) of the first matrix
    std::int64_t factor_stride, out_stride;  // between matrices
    int size, rank;

    Index3 grid(int batch) const { return {size / kRows, 1, batch}; }
  };

  template <class Thread>
  GAKERNELS_INLINE static void run(Thread& thread, const Arguments& arguments) {
    const Index3 block = thread.block();
    const int size = arguments.size, rank = arguments.rank;
    const int first = block.x * kRows;
    const float scale = power_of_two(thread, arguments.peaks, block.z);
    const Source source{arguments.states + static_cast<std::int64_t>(block.z) * size * size +
                            (kTranspose ? first : static_cast<std::int64_t>(first) * size),
                        arguments.factor + block.z * arguments.factor_stride, size, rank};
    typename Tile::Sums sums = {};
    Tile::multiply(thread, source, size / Tile::kDepth, scale, sums);

    float* out = arguments.out + block.z * arguments.out_stride;
    const float* addend = arguments.addend;
    if (addend != nullptr) addend += static_cast<std::int64_t>(block.z) * size * rank;
    Tile::for_each_pair(thread, sums, [&](int row, int column, float left, float right) {
      if (column >= rank) return;
      const std::int64_t at = static_cast<std::int64_t>(first + row) * rank + column;
      out[at] = addend == nullptr ? left : left + addend[at];
      out[at + 1] = addend == nullptr ? right : right + addend[at + 1];
    });
  }

 private:
  struct Source {
    const float *states, *factor;
    int size, rank;

    GAKERNELS_INLINE const float* a(int chunk) const {
      return states + static_cast<std::int64_t>(chunk) * Tile::kDepth * (kTranspose ? size : 1);
    }
    GAKERNELS_INLINE const float* b(int chunk) const {
      return factor + static_cast<std::int64_t>(chunk) * Tile::kDepth * rank;
    }
    GAKERNELS_INLINE int lda() const { return size; }
    GAKERNELS_INLINE int ldb() const { return rank; }
    GAKERNELS_INLINE int columns() const { return rank; }
  };
};

}  // namespace gakernels
