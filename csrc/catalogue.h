// Every kernel that the sequences in polar.h can launch, with its launch requirements.
#pragma once

#include <cstddef>
#include <string>
#include <typeinfo>
#include <vector>

#include "polar.h"

namespace gakernels {

struct KernelEntry {
  std::string symbol;  // the part of the CUDA function's mangled name that comes from the type
  int threads, blocks;  // threads per block; blocks per multiprocessor, for which registers are limited
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
