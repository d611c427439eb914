// A thread of a CUDA block: the basic operations of the kernels, as PTX.
#pragma once

#include "portable.h"

namespace gakernels {

class CudaThread {
 public:
  __device__ __forceinline__ int index() const { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ int lane() const { return static_cast<int>(threadIdx.x) % 32; }
  __device__ __forceinline__ int warp() const { return static_cast<int>(threadIdx.x) / 32; }
  __device__ __forceinline__ Index3 block() const {
    return {static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z)};
  }

  __device__ __forceinline__ unsigned char* shared() const {
    extern __shared__ __align__(1024) unsigned char memory[];
    return memory;
  }

  __device__ __forceinline__ void sync() const { __syncthreads(); }
  __device__ __forceinline__ void sync_warp() const { __syncwarp(); }
  __device__ __forceinline__ double shuffle(double value, int source) const {
    return __shfl_sync(0xffffffffu, value, source);
  }

  // 16 bytes from global to shared memory, or zeros; in order of arrival only after commit() and wait().
  __device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) const {
    const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
  }
  __device__ __forceinline__ void commit() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
  template <int kPending>
  __device__ __forceinline__ void wait() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
  }

  // Rounds to the 11 significant bits that the tensor cores read, ties away from zero.
  __device__ __forceinline__ static std::uint32_t to_tf32(float value) {
    std::uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return bits;
  }
  __device__ __forceinline__ static float from_bits(std::uint32_t bits) { return __uint_as_float(bits); }
  __device__ __forceinline__ static std::uint32_t to_bits(float value) { return __float_as_uint(value); }

  // c (16 x 8) += a (16 x 8) b (8 x 8), TF32 operands, float32 sums.
  __device__ __forceinline__ void multiply_add(float (&c)[4], const std::uint32_t (&a)[4],
                                               const std::uint32_t (&b)[2]) const {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }

  // c (16 x 8) += a (16 x 16) b (16 x 8) in float64.
  __device__ __forceinline__ void multiply_add(double (&c)[4], const double (&a)[8], const double (&b)[4]) const {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7, %8, %9, %10, %11}, {%12, %13, %14, %15}, {%0, %1, %2, %3};"
        : "+d"(c[0]), "+d"(c[1]), "+d"(c[2]), "+d"(c[3])
        : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(a[4]), "d"(a[5]), "d"(a[6]), "d"(a[7]), "d"(b[0]),
          "d"(b[1]), "d"(b[2]), "d"(b[3]));
#else  // sm_80 has only the 8 x 8 x 4 shape: the same fragments, quarter by quarter
    GAKERNELS_UNROLL
    for (int k = 0; k < 4; ++k) {
      GAKERNELS_UNROLL
      for (int half = 0; half < 2; ++half) {
        asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
                     : "+d"(c[2 * half]), "+d"(c[2 * half + 1])
                     : "d"(a[2 * k + half]), "d"(b[k]));
      }
    }
#endif
  }

  // c (64 x 128, over the four warps of a warpgroup) = or += a (64 x 8) b (8 x 128), TF32 operands, float32 sums. b is
  // in shared memory, laid out as a SwizzledTile; `inner` is the first of its eight inner indices. Between begin_wide()
  // and finish_wide() nothing else may touch c and a.
  __device__ __forceinline__ void multiply_wide(float (&c)[64], const std::uint32_t (&a)[4], const float* b, int inner,
                                                bool add) const {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr std::uint64_t kSwizzle128 = 1ull << 62, kRowGroup = 1024ull >> 4 << 32, kUnused = 1ull << 16;
    const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(b)) + 4 * inner;
    const std::uint64_t descriptor = kSwizzle128 | kRowGroup | kUnused | (address & 0x3ffff) >> 4;
    asm volatile(
        "{.reg .pred add; setp.ne.b32 add, %69, 0;"
        "wgmma.mma_async.sync.aligned.m64n128k8.f32.tf32.tf32 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, add, 1, 1;}"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
          "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]),
          "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
          "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]),
          "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]),
          "+f"(c[40]), "+f"(c[41]), "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]),
          "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]),
          "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor), "r"(static_cast<int>(add)));
#else  // the same tile with warp-level instructions
    const Lane mine(lane());
    GAKERNELS_UNROLL
    for (int j = 0; j < 16; ++j) {
      std::uint32_t right[2];
      GAKERNELS_UNROLL
      for (int e = 0; e < 2; ++e) {
        right[e] = to_bits(b[SwizzledTile::offset(8 * j + mine.group, inner + mine.member + 4 * e)]);
      }
      float part[4];
      GAKERNELS_UNROLL
      for (int e = 0; e < 4; ++e) part[e] = add ? c[4 * j + e] : 0;
      multiply_add(part, a, right);
      GAKERNELS_UNROLL
      for (int e = 0; e < 4; ++e) c[4 * j + e] = part[e];
    }
#endif
  }
  __device__ __forceinline__ void begin_wide() const {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
  }
  // Waits for c. It is an operand, so that the compiler does not move a use of it before the wait.
  __device__ __forceinline__ void finish_wide(float (&c)[64]) const {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile(
        "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
          "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]),
          "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
          "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]),
          "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]),
          "+f"(c[40]), "+f"(c[41]), "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]),
          "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]),
          "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63])
        :
        : "memory");
#endif
  }
  // Makes this thread's writes to shared memory visible to multiply_wide after the next barrier.
  __device__ __forceinline__ void publish() const {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
  }
};

}  // namespace gakernels
