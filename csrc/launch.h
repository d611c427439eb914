// The functions behind the Python bindings, the same for a GPU and for its emulation.
#pragma once

#include <cstdint>

#include "polar.h"

namespace gakernels {

// Bytes of workspace that run_forward and run_backward need.
std::int64_t forward_workspace(const Sizes& sizes);
std::int64_t backward_workspace(const Sizes& sizes);

// Launch everything on the stream and return at once: 0, or the code of the first launch that failed.
int run_forward(const Sizes& sizes, const Forward& data, void* workspace, void* stream);
int run_backward(const Sizes& sizes, const Backward& data, void* workspace, void* stream);

const char* describe(int code);
const char* architectures();  // that this build has machine code for, separated by commas, such as "90a"

}  // namespace gakernels
