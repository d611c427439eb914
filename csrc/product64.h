// Products in float64 on FP64 tensor cores, of matrices with `rank` columns: Gram matrices, X W, and r x r factors; and
// if everything is computed in float64, the products with S.
#pragma once

#include <cstddef>

#include "portable.h"

namespace gakernels {

// Location of an operand: one matrix per state of the batch and per part (partial sums, nodes, steps).
template <class Scalar>
struct Operand {
  const Scalar* data;
  std::int64_t matrix, part;  // distances, in scalars
};

// One 64 x 64 tile of a b, where the operands are float32 or float64 in memory and float64 in the product. A transposed
// operand is stored with its inner index first (a) or last (b). Each of four warps computes a 32 x 32 part.
template <class ScalarA, bool kTransposeA, class ScalarB, bool kTransposeB>
struct Product64Tile {
  static constexpr int kSide = 64, kDepth = 32, kStages = 2, kThreads = 128;
  // Padded so that reading a fragment hits different banks: 32 of four bytes, or 16 of eight for half a warp.
  template <class Scalar, bool kInnerLast>
  static constexpr int leading() {
    return kInnerLast ? kDepth + 4 : kSide + (sizeof(Scalar) == 4 ? 8 : 4);
  }
  static constexpr int kLeadingA = leading<ScalarA, !kTransposeA>(), kLeadingB = leading<ScalarB, kTransposeB>();
  static constexpr std::size_t kBytesA = sizeof(ScalarA) * kLeadingA * (kTransposeA ? kDepth : kSide);
  static constexpr std::size_t kBytesB = sizeof(ScalarB) * kLeadingB * (kTransposeB ? kSide : kDepth);
  static constexpr std::size_t kShared = kStages * (kBytesA + kBytesB);

  using Sums = double[2][4][4];

  // `source` gives the chunks: a(chunk) and b(chunk), with leading dimensions lda() and ldb(). Rows of a from
  // source.rows() on and columns of b from source.columns() on count as zero.
  template <class Thread, class Source>
  GAKERNELS_INLINE static void multiply(Thread& thread, const Source& source, int chunks, Sums& sums) {
    unsigned char* memory = thread.shared();
    load(thread, source, 0, memory);
    thread.commit();
    for (int chunk = 0; chunk < chunks; ++chunk) {
      if (chunk + 1 < chunks) load(thread, source, chunk + 1, memory + (chunk + 1) % 2 * (kBytesA + kBytesB));
      thread.commit();
      thread.template wait<1>();
      thread.sync();
      const unsigned char* stage = memory + chunk % 2 * (kBytesA + kBytesB);
      add_chunk(thread, reinterpret_cast<const ScalarA*>(stage), reinterpret_cast<const ScalarB*>(stage + kBytesA),
                sums);
      thread.sync();
    }
  }

  // Calls store(row, column, first, second) for every pair of neighbouring columns of the tile.
  template <class Thread, class Store>
  GAKERNELS_INLINE static void for_each_pair(Thread& thread, const Sums& sums, const Store& store) {
    const Lane lane(thread.lane());
    const int row = thread.warp() / 2 * 32 + lane.group, column = thread.warp() % 2 * 32 + 2 * lane.member;
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
  GAKERNELS_INLINE static void load(Thread& thread, const Source& source, int chunk, unsigned char* stage) {
    copy<ScalarA, kTransposeA ? kDepth : kSide, kTransposeA ? kSide : kDepth, kLeadingA, kTransposeA>(
        thread, source.a(chunk), source.lda(), source.rows(), reinterpret_cast<ScalarA*>(stage));
    copy<ScalarB, kTransposeB ? kSide : kDepth, kTransposeB ? kDepth : kSide, kLeadingB, !kTransposeB>(
        thread, source.b(chunk), source.ldb(), source.columns(), reinterpret_cast<ScalarB*>(stage + kBytesA));
  }

  // A tile of kRows x kColumns as stored in memory; `limit` bounds its columns or its rows.
  template <class Scalar, int kRows, int kColumns, int kLeading, bool kLimitColumns, class Thread>
  GAKERNELS_INLINE static void copy(Thread& thread, const Scalar* from, int leading, int limit, Scalar* to) {
    constexpr int kPerCopy = 16 / sizeof(Scalar), kWidth = kColumns / kPerCopy;
    for (int i = thread.index(); i < kRows * kWidth; i += kThreads) {
      const int row = i / kWidth, column = i % kWidth * kPerCopy;
      const bool valid = (kLimitColumns ? column : row) < limit;
      thread.copy_async(to + row * kLeading + column,
                        valid ? from + static_cast<std::int64_t>(row) * leading + column : from, valid);
    }
  }

  template <class Thread>
  GAKERNELS_INLINE static void add_chunk(Thread& thread, const ScalarA* a, const ScalarB* b, Sums& sums) {
    const Lane lane(thread.lane());
    const int row = thread.warp() / 2 * 32 + lane.group, column = thread.warp() % 2 * 32 + lane.group;
    GAKERNELS_UNROLL
    for (int step = 0; step < kDepth; step += 16) {
      const int k = step + lane.member;
      double left[2][8], right[4][4];
      GAKERNELS_UNROLL
      for (int i = 0; i < 2; ++i) {
        GAKERNELS_UNROLL
        for (int e = 0; e < 8; ++e) {
          const int m = row + 16 * i + 8 * (e % 2), inner = k + 4 * (e / 2);
          left[i][e] = static_cast<double>(kTransposeA ? a[inner * kLeadingA + m] : a[m * kLeadingA + inner]);
        }
      }
      GAKERNELS_UNROLL
      for (int j = 0; j < 4; ++j) {
        GAKERNELS_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int n = column + 8 * j, inner = k + 4 * e;
          right[j][e] = static_cast<double>(kTransposeB ? b[n * kLeadingB + inner] : b[inner * kLeadingB + n]);
        }
      }
      GAKERNELS_UNROLL
      for (int i = 0; i < 2; ++i) {
        GAKERNELS_UNROLL
        for (int j = 0; j < 4; ++j) thread.multiply_add(sums[i][j], left[i], right[j]);
      }
    }
  }
};

// Which tiles of the result are computed, and how they are stored.
enum class Form {
  kFull,    // alpha a b
  kLower,   // alpha a b, tiles of the lower triangle only
  kMirror,  // alpha times the lower triangle of a b, copied to the upper one
};

// out (rows x columns, row-major) = alpha a b for every matrix (grid z) and part (grid y).
template <class ScalarA, bool kTransposeA, class ScalarB, bool kTransposeB, class Out, Form kForm>
struct Product64 {
  using Tile = Product64Tile<ScalarA, kTransposeA, ScalarB, kTransposeB>;
  static constexpr int kThreads = Tile::kThreads, kBlocks = 2;
  static constexpr std::size_t kShared = Tile::kShared;

  struct Arguments {
    Operand<ScalarA> a;
    Operand<ScalarB> b;
    Out* out;
    std::int64_t out_matrix, out_part;
    int rows, columns, depth;  // depth: a multiple of 32
    int lda, ldb;
    double alpha;

    Index3 grid(int batch, int parts) const {
      const int across = (columns + Tile::kSide - 1) / Tile::kSide, down = (rows + Tile::kSide - 1) / Tile::kSide;
      return {kForm == Form::kFull ? across * down : down * (down + 1) / 2, parts, batch};
    }
  };

  template <class Thread>
  GAKERNELS_INLINE static void run(Thread& thread, const Arguments& arguments) {
    const Index3 block = thread.block();
    const Source source(arguments, block);
    typename Tile::Sums sums = {};
    Tile::multiply(thread, source, arguments.depth / Tile::kDepth, sums);
    Out* out = arguments.out + block.z * arguments.out_matrix + block.y * arguments.out_part;
    const int rows = arguments.rows, columns = arguments.columns;
    Tile::for_each_pair(thread, sums, [&](int row, int column, double left, double right) {
      const int m = source.row + row, n = source.column + column;
      if (m >= rows || n >= columns) return;
      left *= arguments.alpha;
      right *= arguments.alpha;
      if constexpr (kForm == Form::kMirror) {
        if (n <= m) out[m * columns + n] = out[n * columns + m] = left;
        if (n + 1 <= m) out[m * columns + n + 1] = out[(n + 1) * columns + m] = right;
      } else {
        out[static_cast<std::int64_t>(m) * columns + n] = static_cast<Out>(left);
        out[static_cast<std::int64_t>(m) * columns + n + 1] = static_cast<Out>(right);
      }
    });
  }

 private:
  struct Source {
    const Arguments& arguments;
    int row, column;  // of the tile
    const ScalarA* first_a;
    const ScalarB* first_b;

    GAKERNELS_INLINE Source(const Arguments& all, const Index3& block) : arguments(all) {
      if constexpr (kForm == Form::kFull) {
        const int across = (all.columns + Tile::kSide - 1) / Tile::kSide;
        row = block.x / across * Tile::kSide;
        column = block.x % across * Tile::kSide;
      } else {
        int i = 0, j = block.x;
        while (j > i) j -= ++i;
        row = i * Tile::kSide;
        column = j * Tile::kSide;
      }
      first_a = all.a.data + block.z * all.a.matrix + block.y * all.a.part +
                (kTransposeA ? row : static_cast<std::int64_t>(row) * all.lda);
      first_b = all.b.data + block.z * all.b.matrix + block.y * all.b.part +
                (kTransposeB ? static_cast<std::int64_t>(column) * all.ldb : column);
    }

    GAKERNELS_INLINE const ScalarA* a(int chunk) const {
      return first_a + static_cast<std::int64_t>(chunk) * Tile::kDepth * (kTransposeA ? arguments.lda : 1);
    }
    GAKERNELS_INLINE const ScalarB* b(int chunk) const {
      return first_b + static_cast<std::int64_t>(chunk) * Tile::kDepth * (kTransposeB ? 1 : arguments.ldb);
    }
    GAKERNELS_INLINE int lda() const { return arguments.lda; }
    GAKERNELS_INLINE int ldb() const { return arguments.ldb; }
    GAKERNELS_INLINE int rows() const { return arguments.rows - row; }
    GAKERNELS_INLINE int columns() const { return arguments.columns - column; }
  };
};

// dX = G W^T + X Q + weight tr(Q) X: the backward of f(X) = X W, where Q is twice the gradient of the Gram matrix.
template <class Scalar>
struct StepGradient {
  using Tile = Product64Tile<Scalar, false, double, true>;
  static constexpr int kThreads = Tile::kThreads, kBlocks = 2;
  static constexpr std::size_t kShared = Tile::kShared;

  struct Arguments {
    const Scalar *upstream, *x;    // G, X (size, rank) of the first matrix
    const double *transform, *q;   // W, Q (rank, rank) of the first matrix
    Scalar* out;                   // dX
    std::int64_t upstream_matrix, x_matrix, transform_matrix, out_matrix;  // distances; Q has no gaps
    int size, rank;
    double weight;

    Index3 grid(int batch) const { return {size / Tile::kSide, (rank + Tile::kSide - 1) / Tile::kSide, batch}; }
  };

  template <class Thread>
  GAKERNELS_INLINE static void run(Thread& thread, const Arguments& arguments) {
    const Index3 block = thread.block();
    const int rank = arguments.rank;
    const Source source(arguments, block);
    typename Tile::Sums sums = {};
    Tile::multiply(thread, source, 2 * (rank / Tile::kDepth), sums);
    const double* q = arguments.q + static_cast<std::int64_t>(block.z) * rank * rank;
    double trace = 0;
    for (int i = 0; i < rank; ++i) trace += q[i * (rank + 1)];
    const double factor = arguments.weight * trace;
    const Scalar* x = arguments.x + block.z * arguments.x_matrix;
    Scalar* out = arguments.out + block.z * arguments.out_matrix;
    Tile::for_each_pair(thread, sums, [&](int row, int column, double left, double right) {
      const int n = source.column + column;
      if (n >= rank) return;
      const std::int64_t at = static_cast<std::int64_t>(source.row + row) * rank + n;
      out[at] = static_cast<Scalar>(left + factor * x[at]);
      out[at + 1] = static_cast<Scalar>(right + factor * x[at + 1]);
    });
  }

 private:
  struct Source {
    int row, column, rank;  // of the tile; rank of the matrices
    const Scalar *upstream, *x;
    const double *transform, *q;

    GAKERNELS_INLINE Source(const Arguments& all, const Index3& block)
        : row(block.x * Tile::kSide), column(block.y * Tile::kSide), rank(all.rank) {
      const std::int64_t across = static_cast<std::int64_t>(row) * rank;
      const std::int64_t down = static_cast<std::int64_t>(column) * rank;
      upstream = all.upstream + block.z * all.upstream_matrix + across;
      x = all.x + block.z * all.x_matrix + across;
      transform = all.transform + block.z * all.transform_matrix + down;
      q = all.q + static_cast<std::int64_t>(block.z) * rank * rank + down;
    }

    GAKERNELS_INLINE const Scalar* a(int chunk) const {
      const int per_segment = rank / Tile::kDepth;
      return (chunk < per_segment ? upstream : x) + chunk % per_segment * Tile::kDepth;
    }
    GAKERNELS_INLINE const double* b(int chunk) const {
      const int per_segment = rank / Tile::kDepth;
      return (chunk < per_segment ? transform : q) + chunk % per_segment * Tile::kDepth;
    }
    GAKERNELS_INLINE int lda() const { return rank; }
    GAKERNELS_INLINE int ldb() const { return rank; }
    GAKERNELS_INLINE int rows() const { return Tile::kSide; }
    GAKERNELS_INLINE int columns() const { return rank - column; }
  };
};

// out (r x r) = alpha times the sum of the parts, or of its symmetric part.
struct SumParts {
  static constexpr int kThreads = 256, kBlocks = 4;
  static constexpr std::size_t kShared = 0;

  struct Arguments {
    const double* parts;  // (batch, count, rank, rank)
    double* out;
    std::int64_t out_matrix;
    int rank, count;
    bool symmetric;
    double alpha;

    Index3 grid(int batch) const { return {(rank * rank + kThreads - 1) / kThreads, 1, batch}; }
  };

  template <class Thread>
  GAKERNELS_INLINE static void run(Thread& thread, const Arguments& arguments) {
    const Index3 block = thread.block();
    const int rank = arguments.rank, at = block.x * kThreads + thread.index();
    if (at >= rank * rank) return;
    const int mirrored = at % rank * rank + at / rank;
    const double* part = arguments.parts + static_cast<std::int64_t>(block.z) * arguments.count * rank * rank;
    double sum = 0;
    for (int i = 0; i < arguments.count; ++i, part += rank * rank) {
      sum += arguments.symmetric ? (part[at] + part[mirrored]) / 2 : part[at];
    }
    arguments.out[block.z * arguments.out_matrix + at] = arguments.alpha * sum;
  }
};

// to = from, or to += from.
struct Widen {
  static constexpr int kThreads = 256, kBlocks = 4;
  static constexpr std::size_t kShared = 0;

  struct Arguments {
    const float* from;
    double* to;
    std::int64_t count;
    bool add;

    Index3 grid() const { return {static_cast<int>((count + kThreads - 1) / kThreads), 1, 1}; }
  };

  template <class Thread>
  GAKERNELS_INLINE static void run(Thread& thread, const Arguments& arguments) {
    const std::int64_t at = static_cast<std::int64_t>(thread.block().x) * kThreads + thread.index();
    if (at >= arguments.count) return;
    const double value = arguments.from[at];
    arguments.to[at] = arguments.add ? arguments.to[at] + value : value;
  }
};

// to = from, rounded.
struct Narrow {
  static constexpr int kThreads = 256, kBlocks = 4;
  static constexpr std::size_t kShared = 0;

  struct Arguments {
    const double* from;
    float* to;
    std::int64_t count;

    Index3 grid() const { return {static_cast<int>((count + kThreads - 1) / kThreads), 1, 1}; }
  };

  template <class Thread>
  GAKERNELS_INLINE static void run(Thread& thread, const Arguments& arguments) {
    const std::int64_t at = static_cast<std::int64_t>(thread.block().x) * kThreads + thread.index();
    if (at < arguments.count) arguments.to[at] = static_cast<float>(arguments.from[at]);
  }
};

}  // namespace gakernels
