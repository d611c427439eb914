#include "launch.h"

#include <cuda_runtime.h>

#include "cuda_thread.cuh"

namespace gakernels {
namespace {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocks)
    run(const __grid_constant__ typename Kernel::Arguments arguments) {
  CudaThread thread;
  Kernel::run(thread, arguments);
}

// Launches kernels on a stream; does nothing after a failure.
class StreamLauncher {
 public:
  explicit StreamLauncher(void* stream) : stream_(static_cast<cudaStream_t>(stream)) {}

  template <class Kernel>
  void launch(Index3 grid, const typename Kernel::Arguments& arguments) {
    constexpr std::size_t kDefaultLimit = 48 << 10;
    if (status_ != cudaSuccess) return;
    if (Kernel::kShared > kDefaultLimit) {
      status_ = cudaFuncSetAttribute(run<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::kShared);
      if (status_ != cudaSuccess) return;
    }
    run<Kernel><<<dim3(grid.x, grid.y, grid.z), Kernel::kThreads, Kernel::kShared, stream_>>>(arguments);
    status_ = cudaGetLastError();
  }

  int status() const { return static_cast<int>(status_); }

 private:
  cudaStream_t stream_;
  cudaError_t status_ = cudaSuccess;
};

}  // namespace

std::int64_t forward_workspace(const Sizes& sizes) {
  StreamLauncher none(nullptr);
  return with_polar(none, sizes, nullptr, [](auto& polar) { return polar.forward_bytes(); });
}

std::int64_t backward_workspace(const Sizes& sizes) {
  StreamLauncher none(nullptr);
  return with_polar(none, sizes, nullptr, [](auto& polar) { return polar.backward_bytes(); });
}

int run_forward(const Sizes& sizes, const Forward& data, void* workspace, void* stream) {
  StreamLauncher launcher(stream);
  with_polar(launcher, sizes, workspace, [&data](auto& polar) { polar.forward(data); });
  return launcher.status();
}

int run_backward(const Sizes& sizes, const Backward& data, void* workspace, void* stream) {
  StreamLauncher launcher(stream);
  with_polar(launcher, sizes, workspace, [&data](auto& polar) { polar.backward(data); });
  return launcher.status();
}

const char* describe(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

const char* architectures() { return GAKERNELS_ARCHITECTURES; }

}  // namespace gakernels
