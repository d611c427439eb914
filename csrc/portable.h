// Lets one source compile to a CUDA kernel (nvcc) or to a host function (any C++17 compiler).
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define GAKERNELS_INLINE __device__ __forceinline__
#define GAKERNELS_UNROLL _Pragma("unroll")
#define GAKERNELS_UNROLL_TWICE _Pragma("unroll 2")
#else
#define GAKERNELS_INLINE inline
#define GAKERNELS_UNROLL
#define GAKERNELS_UNROLL_TWICE
#endif

namespace gakernels {

// Position of a block in its grid, or the size of a grid.
struct Index3 {
  int x, y, z;
};

// A fragment of a 16 x 8 tile (rows first), as mma.m16n8 instructions distribute it over the 32 lanes of a warp
// (PTX ISA, "Matrix Fragments for mma.m16n8k8" and "... .f64"): lane = 4 * group + member.
struct Lane {
  int group;   // row of the left operand, column of the right one
  int member;  // inner index of both operands, pair of columns of the result

  GAKERNELS_INLINE explicit Lane(int lane) : group(lane / 4), member(lane % 4) {}
};

// A tile of kRows x 32 floats in shared memory, laid out as an operand of `wgmma` with 128-byte swizzling: rows of 128
// bytes, starting at a multiple of 1024 bytes; a row's eight parts of 16 bytes are permuted depending on the row.
struct SwizzledTile {
  static constexpr int kRows = 128, kColumns = 32, kFloats = kRows * kColumns;

  GAKERNELS_INLINE static int offset(int row, int column) {
    return row * kColumns + (column / 4 ^ row % 8) * 4 + column % 4;
  }
};

}  // namespace gakernels
