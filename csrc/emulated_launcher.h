// Launches kernels on the host, one block after another.
#pragma once

#include <exception>
#include <string>

#include "emulated_thread.h"

namespace gakernels {

// Runs every block of every launch to completion; each launch draws a new order of threads. After a failure, launches
// do nothing.
class EmulatedLauncher {
 public:
  inline static std::string failure;  // the most recent failure of any launcher

  template <class Kernel>
  void launch(Index3 grid, const typename Kernel::Arguments& arguments) {
    if (status_ != 0) return;
    static unsigned seed = 0;
    try {
      EmulatedBlock block(Kernel::kThreads, Kernel::kShared, seed++);
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

}  // namespace gakernels
