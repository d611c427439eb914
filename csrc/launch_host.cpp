#include "launch.h"

#include <exception>
#include <string>

#include "emulated_thread.h"

namespace gakernels {
namespace {

std::string failure;

// Runs every block of every launch to its end, in an order of threads that each launch draws anew.
class EmulatedLauncher {
 public:
  template <class Kernel>
  void launch(Index3 grid, const typename Kernel::Arguments& arguments) {
    if (status_ != 0) return;
    static unsigned seed = 0;
    EmulatedBlock block(Kernel::kThreads, Kernel::kShared, seed++);
    try {
      for (int z = 0; z < grid.z; ++z) {
        for (int y = 0; y < grid.y; ++y) {
          for (int x = 0; x < grid.x; ++x) {
            block.run({x, y, z}, [&](EmulatedThread& thread) { Kernel::run(thread, arguments); });
          }
        }
      }
    } catch (const std::exception& error) {
      failure = error.what();
      status_ = 1;
    }
  }

  int status() const { return status_; }

 private:
  int status_ = 0;
};

}  // namespace

std::int64_t forward_workspace(const Sizes& sizes) {
  EmulatedLauncher none;
  return with_polar(none, sizes, nullptr, [](auto& polar) { return polar.forward_bytes(); });
}

std::int64_t backward_workspace(const Sizes& sizes) {
  EmulatedLauncher none;
  return with_polar(none, sizes, nullptr, [](auto& polar) { return polar.backward_bytes(); });
}

int run_forward(const Sizes& sizes, const Forward& data, void* workspace, void*) {
  EmulatedLauncher launcher;
  with_polar(launcher, sizes, workspace, [&data](auto& polar) { polar.forward(data); });
  return launcher.status();
}

int run_backward(const Sizes& sizes, const Backward& data, void* workspace, void*) {
  EmulatedLauncher launcher;
  with_polar(launcher, sizes, workspace, [&data](auto& polar) { polar.backward(data); });
  return launcher.status();
}

const char* describe(int) { return failure.c_str(); }

const char* architectures() { return "host"; }

}  // namespace gakernels
