#include "launch.h"

#include "emulated_launcher.h"

namespace gakernels {

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

const char* describe(int) { return EmulatedLauncher::failure.c_str(); }

const char* architectures() { return "host"; }

}  // namespace gakernels
