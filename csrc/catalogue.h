// Every kernel that the sequences of polar.h can launch, with what a launch asks for.
#pragma once

#include <cstddef>
#include <string>
#include <typeinfo>
#include <vector>

#include "polar.h"

namespace gakernels {

struct KernelEntry {
  std::string symbol;  // the type's part of the mangled name of the CUDA function
  int threads, blocks;  // of a block; blocks of a multiprocessor that the registers are limited for
  std::size_t shared;  // bytes
};

template <class Kernel>
KernelEntry entry_of() {
  const std::string prefix = "N9gakernels", name = typeid(Kernel).name();
  const std::string symbol = name.substr(prefix.size(), name.size() - prefix.size() - 1);
  return {symbol, Kernel::kThreads, Kernel::kBlocks, Kernel::kShared};
}

template <class... Kernels>
std::vector<KernelEntry> entries_of(const KernelList<Kernels...>&) {
  return {entry_of<Kernels>()...};
}

}  // namespace gakernels
