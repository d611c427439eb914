// Products with S for many states: the scheme of product.h on `wgmma`, the only instruction that reaches Hopper's full
// rate.
//
// `wgmma` reads its right operand from shared memory, and TF32 numbers only with the inner index last. So a kernel
// transposes the right factor first and splits it into high and low parts; S is split in registers, as in product.h.
#pragma once

#include <cstddef>

#include "portable.h"
#include "scale.h"

namespace gakernels {

// parts (batch, 2, rank, size): the high and the low TF32 parts of the transposed factor (size, rank).
struct SplitFactor {
  static constexpr int kSide = 32, kThreads = 256, kBlocks = 4;
  static constexpr std::size_t kShared = sizeof(float) * kSide * (kSide + 1);

  struct Arguments {
    const float* factor;
    float* parts;
    std::int64_t factor_stride;  // between matrices
    int size, rank;

    Index3 grid(int batch) const { return {size / kSide, rank / kSide, batch}; }
  };

  template <class Thread>
  GAKERNELS_INLINE static void run(Thread& thread, const Arguments& arguments) {
    const Index3 block = thread.block();
    const int size = arguments.size, rank = arguments.rank, column = thread.index() % kSide;
    auto* tile = reinterpret_cast<float*>(thread.shared());
    const float* from = arguments.factor + block.z * arguments.factor_stride +
                        static_cast<std::int64_t>(block.x) * kSide * rank + block.y * kSide;
    for (int row = thread.index() / kSide; row < kSide; row += kThreads / kSide) {
      tile[row * (kSide + 1) + column] = from[row * rank + column];
    }
    thread.sync();
    const std::int64_t matrix = static_cast<std::int64_t>(rank) * size;
    float* to = arguments.parts + 2 * block.z * matrix + static_cast<std::int64_t>(block.y) * kSide * size +
                block.x * kSide;
    for (int row = thread.index() / kSide; row < kSide; row += kThreads / kSide) {
      const float value = tile[column * (kSide + 1) + row];
      const float high = Thread::from_bits(Thread::to_tf32(value));
      to[static_cast<std::int64_t>(row) * size + column] = high;
      to[matrix + static_cast<std::int64_t>(row) * size + column] = Thread::from_bits(Thread::to_tf32(value - high));
    }
  }
};

// out = 2^-e S factor (+ addend), or with S^T, with 128 rows per block: 64 for each of two warpgroups.
template <bool kTranspose>
struct WideProduct {
  static constexpr int kRows = 128, kDepth = SwizzledTile::kColumns, kStages = 3;
  static constexpr int kThreads = 256, kBlocks = 1;
  static constexpr int kLeading = kTranspose ? kRows + 8 : kDepth + 4;  // 32 banks, as in product.h
  static constexpr int kFloatsA = (kTranspose ? kDepth : kRows) * kLeading;
  // The tiles of the right factor come first: they must be aligned to 1024 bytes.
  static constexpr int kTiles = kStages * 2 * SwizzledTile::kFloats;
  static constexpr std::size_t kShared = sizeof(float) * (kTiles + kStages * kFloatsA);

  struct Arguments {
    const float* states;  // (batch, size, size)
    const float* peaks;   // (batch, kSlices)
    const float* parts;   // of the factor, written by SplitFactor
    const float* addend;  // (batch, size, rank), or null
    float* out;           // (size, rank) of the first matrix
    std::int64_t out_stride;
    int size, rank;

    Index3 grid(int batch) const { return {size / kRows, 1, batch}; }
  };

  template <class Thread>
  GAKERNELS_INLINE static void run(Thread& thread, const Arguments& arguments) {
    const Index3 block = thread.block();
    const int chunks = arguments.size / kDepth;
    const float scale = power_of_two(thread, arguments.peaks, block.z);
    auto* tiles = reinterpret_cast<float*>(thread.shared());
    float* rows = tiles + kTiles;
    GAKERNELS_UNROLL
    for (int stage = 0; stage < kStages - 1; ++stage) {
      if (stage < chunks) load(thread, arguments, stage, tiles, rows);
      thread.commit();
    }
    float sums[64] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
      thread.template wait<kStages - 2>();
      thread.publish();
      thread.sync();
      if (chunk + kStages - 1 < chunks) load(thread, arguments, chunk + kStages - 1, tiles, rows);
      thread.commit();
      const int stage = chunk % kStages;
      add_chunk(thread, rows + stage * kFloatsA, tiles + stage * 2 * SwizzledTile::kFloats, scale, sums);
    }
    store(thread, arguments, sums);
  }

 private:
  template <class Thread>
  GAKERNELS_INLINE static void load(Thread& thread, const Arguments& arguments, int chunk, float* tiles, float* rows) {
    const Index3 block = thread.block();
    const int size = arguments.size, first = block.x * kRows, stage = chunk % kStages;
    const std::int64_t corner = kTranspose ? static_cast<std::int64_t>(chunk) * kDepth * size + first
                                           : static_cast<std::int64_t>(first) * size + chunk * kDepth;
    const float* states = arguments.states + static_cast<std::int64_t>(block.z) * size * size + corner;
    constexpr int kWidth = (kTranspose ? kRows : kDepth) / 4;
    for (int i = thread.index(); i < kRows * kDepth / 4; i += kThreads) {
      const int row = i / kWidth, column = i % kWidth * 4;
      thread.copy_async(rows + stage * kFloatsA + row * kLeading + column,
                        states + static_cast<std::int64_t>(row) * size + column, true);
    }
    const std::int64_t matrix = static_cast<std::int64_t>(arguments.rank) * size;
    const float* parts = arguments.parts + 2 * block.z * matrix + chunk * kDepth;
    for (int i = thread.index(); i < 2 * SwizzledTile::kFloats / 4; i += kThreads) {
      const int part = i / (SwizzledTile::kFloats / 4), row = i / (kDepth / 4) % SwizzledTile::kRows;
      const int column = i % (kDepth / 4) * 4;
      const bool valid = row < arguments.rank;
      const float* from = parts + part * matrix + static_cast<std::int64_t>(row) * size + column;
      thread.copy_async(tiles + (stage * 2 + part) * SwizzledTile::kFloats + SwizzledTile::offset(row, column),
                        valid ? from : parts, valid);
    }
  }

  template <class Thread>
  GAKERNELS_INLINE static void add_chunk(Thread& thread, const float* a, const float* tiles, float scale,
                                         float (&sums)[64]) {
    const Lane lane(thread.lane());
    const int row = 16 * thread.warp() + lane.group;
    std::uint32_t high[kDepth / 8][4], low[kDepth / 8][4];
    GAKERNELS_UNROLL
    for (int step = 0; step < kDepth / 8; ++step) {
      GAKERNELS_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int m = row + 8 * (e % 2), inner = 8 * step + lane.member + 4 * (e / 2);
        const float value = scale * (kTranspose ? a[inner * kLeading + m] : a[m * kLeading + inner]);
        high[step][e] = Thread::to_tf32(value);
        low[step][e] = Thread::to_tf32(value - Thread::from_bits(high[step][e]));
      }
    }
    float part[64];
    thread.begin_wide();
    GAKERNELS_UNROLL
    for (int step = 0; step < kDepth / 8; ++step) {
      thread.multiply_wide(part, low[step], tiles, 8 * step, step > 0);
      thread.multiply_wide(part, high[step], tiles + SwizzledTile::kFloats, 8 * step, true);
      thread.multiply_wide(part, high[step], tiles, 8 * step, true);
    }
    thread.finish_wide(part);
    GAKERNELS_UNROLL
    for (int i = 0; i < 64; ++i) sums[i] += part[i];
  }

  template <class Thread>
  GAKERNELS_INLINE static void store(Thread& thread, const Arguments& arguments, const float (&sums)[64]) {
    const Index3 block = thread.block();
    const Lane lane(thread.lane());
    const int rank = arguments.rank;
    float* out = arguments.out + block.z * arguments.out_stride;
    const float* addend = arguments.addend;
    if (addend != nullptr) addend += static_cast<std::int64_t>(block.z) * arguments.size * rank;
    GAKERNELS_UNROLL
    for (int i = 0; i < 64; ++i) {
      const int row = block.x * kRows + 16 * thread.warp() + lane.group + 8 * (i % 4 / 2);
      const int column = i / 4 * 8 + 2 * lane.member + i % 2;
      if (column >= rank) continue;
      const std::int64_t at = static_cast<std::int64_t>(row) * rank + column;
      out[at] = addend == nullptr ? sums[i] : sums[i] + addend[at];
    }
  }
};

}  // namespace gakernels
