// Inverts shifted Gram matrices by Cholesky factorisation, with one thread block per matrix and shift.
#pragma once

#include <cstddef>

#include "portable.h"
#include "quadrature.h"

namespace gakernels {

// What is computed from A = X^T X + shift I = L L^T.
enum class Inverse {
  kTransform,  // W = L^(-T): X W has the span and the product of X A^(-1/2), in another basis
  kNode,       // factor A^(-1), a term of the inverse square root
};

// The lower triangle as 16 x 16 tiles in shared memory. L overwrites A, and L^(-1) overwrites L.
template <Inverse kInverse>
struct Factor {
  static constexpr int kSide = 16, kMostTiles = 8, kWarps = 8;
  static constexpr int kThreads = 32 * kWarps, kBlocks = 2;
  static constexpr int kLeading = kSide + 4;  // half a warp reads a fragment from 16 different banks
  static constexpr int kTile = kSide * kLeading;
  static constexpr std::size_t kShared = sizeof(double) * kTile * (kMostTiles * (kMostTiles + 1) / 2);

  struct Arguments {
    const double* gram;    // (batch, parts, rank, rank): partial sums of X^T X, lower triangle
    double* out;           // (rank, rank) of the first matrix and node
    std::int64_t out_matrix, out_part;
    int rank, parts;
    bool square_root;      // use the root of the weights: terms of the derivative have one on each side
    Quadrature rule;       // for the Gram matrix divided by its trace; kTransform: one node, weight 1

    Index3 grid(int batch) const { return {rule.count, 1, batch}; }
  };

  template <class Thread>
  GAKERNELS_INLINE static void run(Thread& thread, const Arguments& arguments) {
    const Index3 block = thread.block();
    const int rank = arguments.rank, tiles = rank / kSide;
    auto* a = reinterpret_cast<double*>(thread.shared());
    load(thread, arguments, a);
    thread.sync();
    double trace = 0;
    for (int i = 0; i < rank; ++i) trace += a[offset(i / kSide, i / kSide) + i % kSide * (kLeading + 1)];
    double* out = arguments.out + block.z * arguments.out_matrix + block.x * arguments.out_part;
    // The transform of a zero matrix is zero; a NaN or infinity anywhere makes it NaN.
    if (!(trace > 0 && trace <= 1e300)) {
      const double value = trace == 0 ? 0 : (trace - trace) / (trace - trace);
      for (int i = thread.index(); i < rank * rank; i += kThreads) out[i] = value;
      return;
    }
    const double shift = trace * arguments.rule.nodes[block.x];
    thread.sync();
    // No barrier needed: a lane that factorises the first tile reads the entry that it shifted; other reads come later.
    for (int i = thread.index(); i < rank; i += kThreads) {
      a[offset(i / kSide, i / kSide) + i % kSide * (kLeading + 1)] += shift;
    }
    factorise(thread, a, tiles, shift);
    invert(thread, a, tiles);
    if constexpr (kInverse == Inverse::kTransform) {
      for (int i = thread.index(); i < rank * rank; i += kThreads) {
        const int row = i / rank, column = i % rank;
        out[i] = row > column ? 0 : a[offset(column / kSide, row / kSide) + column % kSide * kLeading + row % kSide];
      }
    } else {
      double weight = arguments.rule.weights[block.x] * sqrt(trace);
      if (arguments.square_root) weight = sqrt(weight);
      multiply_with_transposed(thread, a, tiles, weight, out);
    }
  }

 private:
  GAKERNELS_INLINE static int offset(int i, int j) { return (i * (i + 1) / 2 + j) * kTile; }

  template <class Thread>
  GAKERNELS_INLINE static void load(Thread& thread, const Arguments& arguments, double* a) {
    const int rank = arguments.rank, size = rank * rank;
    const double* gram = arguments.gram + static_cast<std::int64_t>(thread.block().z) * arguments.parts * size;
    for (int i = thread.index(); i < size; i += kThreads) {
      const int row = i / rank, column = i % rank;
      if (row / kSide < column / kSide) continue;
      double sum = 0;
      for (int part = 0; part < arguments.parts; ++part) sum += gram[static_cast<std::int64_t>(part) * size + i];
      a[offset(row / kSide, column / kSide) + row % kSide * kLeading + column % kSide] = sum;
    }
  }

  // Goes along the diagonal tile by tile. While seven warps update the rest, warp 0 factorises the next tile.
  template <class Thread>
  GAKERNELS_INLINE static void factorise(Thread& thread, double* a, int tiles, double shift) {
    const int warp = thread.warp();
    if (warp == 0) invert_diagonal(thread, a, shift);
    thread.sync();
    for (int k = 0; k + 1 < tiles; ++k) {
      for (int i = k + 1 + warp; i < tiles; i += kWarps) {  // L_ik = A_ik L_kk^(-T)
        Tile sums = {};
        add_product<false, true>(thread, sums, a + offset(i, k), a + offset(k, k), 1.0);
        thread.sync_warp();
        store(thread, sums, a + offset(i, k));
      }
      thread.sync();
      if (warp == 0) {
        update(thread, a, k + 1, k + 1, k);
        thread.sync_warp();
        invert_diagonal(thread, a + offset(k + 1, k + 1), shift);
      } else {
        int turn = 0;
        for (int i = k + 2; i < tiles; ++i) {
          for (int j = k + 1; j <= i; ++j, ++turn) {
            if (turn % (kWarps - 1) == warp - 1) update(thread, a, i, j, k);
          }
        }
      }
      thread.sync();
    }
  }

  // A_ij -= L_ik L_jk^T
  template <class Thread>
  GAKERNELS_INLINE static void update(Thread& thread, double* a, int i, int j, int k) {
    Tile sums;
    fetch(thread, sums, a + offset(i, j));
    add_product<false, true>(thread, sums, a + offset(i, k), a + offset(j, k), -1.0);
    store(thread, sums, a + offset(i, j));
  }

  // Replaces the lower triangle of one tile by its L^(-1), by elimination on [A | I]: lanes 0-15 hold the rows of A,
  // lanes 16-31 those of the identity. A pivot of a matrix plus shift I is at least shift. One that rounding took far
  // below that is noise, and so is its column: divided by the root of a small number, it would grow from tile to tile.
  template <class Thread>
  GAKERNELS_INLINE static void invert_diagonal(Thread& thread, double* tile, double shift) {
    const int lane = thread.lane(), row = lane % kSide, half = lane - row;
    double values[kSide];
    GAKERNELS_UNROLL
    for (int j = 0; j < kSide; ++j) {
      values[j] = half == 0 ? tile[(j <= row ? row : j) * kLeading + (j <= row ? j : row)] : (j == row ? 1.0 : 0.0);
    }
    thread.sync_warp();
    GAKERNELS_UNROLL
    for (int j = 0; j < kSide; ++j) {
      double pivot = thread.shuffle(values[j], j);
      const bool noise = pivot < shift / 2;
      pivot = pivot > shift ? pivot : shift;
      const double inverse = 1.0 / sqrt(pivot);
      double entry = inverse * thread.shuffle(values[j], row);  // an entry of L, from the lane that holds this row of A
      if (row <= j || noise) entry = 0;
      GAKERNELS_UNROLL
      for (int k = 0; k < kSide; ++k) {  // the pivot row of A has entries from j on, the identity's up to j
        const double other = inverse * thread.shuffle(values[k], half + j);
        values[k] = row == j ? other : values[k] - entry * other;
      }
    }
    if (half != 0) {
      GAKERNELS_UNROLL
      for (int j = 0; j < kSide; ++j) tile[row * kLeading + j] = j <= row ? values[j] : 0.0;
    }
    thread.sync_warp();
  }

  // L^(-1), one row of tiles at a time: (L^(-1))_ij = sum over k from j to i - 1 of (-L_ii^(-1) L_ik) (L^(-1))_kj.
  template <class Thread>
  GAKERNELS_INLINE static void invert(Thread& thread, double* a, int tiles) {
    const int warp = thread.warp();
    for (int i = 1; i < tiles; ++i) {
      Tile sums = {};
      if (warp < i) {
        add_product<false, false>(thread, sums, a + offset(i, i), a + offset(i, warp), -1.0);
        thread.sync_warp();
        store(thread, sums, a + offset(i, warp));
      }
      thread.sync();
      if (warp < i) {
        clear(sums);
        for (int k = warp; k < i; ++k) {
          add_product<false, false>(thread, sums, a + offset(i, k), a + offset(k, warp), 1.0);
        }
      }
      thread.sync();
      if (warp < i) store(thread, sums, a + offset(i, warp));
    }
    thread.sync();
  }

  // out = weight L^(-T) L^(-1), both triangles.
  template <class Thread>
  GAKERNELS_INLINE static void multiply_with_transposed(Thread& thread, const double* a, int tiles, double weight,
                                                        double* out) {
    const Lane lane(thread.lane());
    const int rank = tiles * kSide;
    int turn = 0;
    for (int j = 0; j < tiles; ++j) {  // longest sums first
      for (int i = j; i < tiles; ++i, ++turn) {
        if (turn % kWarps != thread.warp()) continue;
        Tile sums = {};
        for (int k = i; k < tiles; ++k) {
          add_product<true, false>(thread, sums, a + offset(k, i), a + offset(k, j), 1.0);
        }
        GAKERNELS_UNROLL
        for (int n = 0; n < 2; ++n) {
          GAKERNELS_UNROLL
          for (int e = 0; e < 4; ++e) {
            const int row = i * kSide + lane.group + 8 * (e / 2), column = j * kSide + 8 * n + 2 * lane.member + e % 2;
            // a diagonal tile computes both of its triangles itself; they agree to the last bit
            out[row * rank + column] = weight * sums[n][e];
            if (i != j) out[column * rank + row] = weight * sums[n][e];
          }
        }
      }
    }
  }

  using Tile = double[2][4];  // 16 x 16, as two fragments of 16 x 8

  GAKERNELS_INLINE static void clear(Tile& sums) {
    GAKERNELS_UNROLL
    for (int n = 0; n < 2; ++n) {
      GAKERNELS_UNROLL
      for (int e = 0; e < 4; ++e) sums[n][e] = 0;
    }
  }

  // sums += sign op(a) op(b)
  template <bool kTransposeA, bool kTransposeB, class Thread>
  GAKERNELS_INLINE static void add_product(Thread& thread, Tile& sums, const double* a, const double* b, double sign) {
    const Lane lane(thread.lane());
    double left[8], right[4];
    GAKERNELS_UNROLL
    for (int e = 0; e < 8; ++e) {
      const int row = lane.group + 8 * (e % 2), inner = lane.member + 4 * (e / 2);
      left[e] = sign * (kTransposeA ? a[inner * kLeading + row] : a[row * kLeading + inner]);
    }
    GAKERNELS_UNROLL
    for (int n = 0; n < 2; ++n) {
      GAKERNELS_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int inner = lane.member + 4 * e, column = 8 * n + lane.group;
        right[e] = kTransposeB ? b[column * kLeading + inner] : b[inner * kLeading + column];
      }
      thread.multiply_add(sums[n], left, right);
    }
  }

  template <class Thread>
  GAKERNELS_INLINE static void fetch(Thread& thread, Tile& sums, const double* tile) {
    const Lane lane(thread.lane());
    GAKERNELS_UNROLL
    for (int n = 0; n < 2; ++n) {
      GAKERNELS_UNROLL
      for (int e = 0; e < 4; ++e) {
        sums[n][e] = tile[(lane.group + 8 * (e / 2)) * kLeading + 8 * n + 2 * lane.member + e % 2];
      }
    }
  }

  template <class Thread>
  GAKERNELS_INLINE static void store(Thread& thread, const Tile& sums, double* tile) {
    const Lane lane(thread.lane());
    GAKERNELS_UNROLL
    for (int n = 0; n < 2; ++n) {
      GAKERNELS_UNROLL
      for (int e = 0; e < 4; ++e) {
        tile[(lane.group + 8 * (e / 2)) * kLeading + 8 * n + 2 * lane.member + e % 2] = sums[n][e];
      }
    }
  }
};

}  // namespace gakernels
