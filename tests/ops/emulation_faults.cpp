// Kernels that fail in a thread of the emulation (csrc/emulated_thread.h), launched as those of csrc/ are.

#include <new>
#include <pybind11/pybind11.h>
#include <stdexcept>
#include <string>

#include "emulated_launcher.h"

namespace {

struct Faulty {
  static constexpr int kThreads = 128;
  static constexpr std::size_t kShared = 0;
  struct Arguments {
    std::string fault;
  };

  template <class Thread>
  static void run(Thread& thread, const Arguments& arguments) {
    thread.sync();
    if (thread.index() == 70 && thread.block().x == 1) {
      if (arguments.fault == "exception") throw std::invalid_argument("thrown in a thread");
      if (arguments.fault == "memory") throw std::bad_alloc();
      if (arguments.fault == "barrier") return;
    }
    thread.sync();
  }
};

// What the launcher says of a fault in the second of three blocks; nothing if there is none.
std::string launch(const std::string& fault) {
  gakernels::EmulatedLauncher launcher;
  launcher.launch<Faulty>({3, 1, 1}, {fault});
  return launcher.status() == 0 ? "" : gakernels::EmulatedLauncher::failure;
}

// The same without the launcher.
void run(const std::string& fault) {
  gakernels::EmulatedBlock block(Faulty::kThreads, Faulty::kShared, 0);
  block.run({1, 0, 0}, [&](gakernels::EmulatedThread& thread) { Faulty::run(thread, {fault}); });
}

}  // namespace

PYBIND11_MODULE(GAKERNELS_MODULE, module) {
  module.def("launch", &launch);
  module.def("run", &run);
}
