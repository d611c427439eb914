// The Python module. Addresses and the stream are integers, so no torch headers are needed.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "catalogue.h"
#include "launch.h"

namespace {

using gakernels::Sizes;
using Address = std::uintptr_t;

template <class Scalar>
Scalar* at(Address address) {
  return reinterpret_cast<Scalar*>(address);
}

struct LaunchError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void check(int code) {
  if (code != 0) throw LaunchError(gakernels::describe(code));
}

}  // namespace

PYBIND11_MODULE(GAKERNELS_MODULE, module) {
  module.doc() = "Kernels of low_rank_polar. Every address points to contiguous device memory.";
  module.attr("architectures") = gakernels::architectures();
  pybind11::register_local_exception<LaunchError>(module, "LaunchError", PyExc_RuntimeError);

  pybind11::class_<Sizes>(module, "Sizes", pybind11::module_local())
      .def(pybind11::init([](int batch, int size, int rank, int steps, double damping, int multiprocessors,
                             bool exact) {
             return Sizes{batch, size, rank, steps, damping, multiprocessors, exact};
           }),
           pybind11::arg("batch"), pybind11::arg("size"), pybind11::arg("rank"), pybind11::arg("steps"),
           pybind11::arg("damping"), pybind11::arg("multiprocessors"), pybind11::arg("exact"));
  module.def(
      "inverse_root_rule",
      [](double lowest, double highest) {
        const gakernels::Quadrature rule = gakernels::inverse_root_rule(lowest, highest);
        return std::pair(std::vector<double>(rule.nodes, rule.nodes + rule.count),
                         std::vector<double>(rule.weights, rule.weights + rule.count));
      },
      pybind11::arg("lowest"), pybind11::arg("highest"), "Nodes and weights of x^(-1/2) = sum of weight / (x + node).");
  module.def(
      "kernels",
      [] {
        pybind11::list all;
        for (const auto& entry : gakernels::entries_of(gakernels::AllKernels{})) {
          all.append(pybind11::make_tuple(entry.symbol, entry.threads, entry.blocks, entry.shared));
        }
        return all;
      },
      "Part of the mangled name, threads, blocks per multiprocessor and shared memory of every kernel.");
  module.def("forward_workspace", &gakernels::forward_workspace, "Bytes of workspace that `forward` needs.");
  module.def("backward_workspace", &gakernels::backward_workspace, "Bytes of workspace that `backward` needs.");

  module.def(
      "forward",
      [](const Sizes& sizes, Address states, Address sketch, Address u, Address v, Address inputs, Address transforms,
         Address workspace, Address stream) {
        check(gakernels::run_forward(sizes,
                                     {at<const float>(states), at<const float>(sketch), at<float>(u), at<float>(v),
                                      at<void>(inputs), at<double>(transforms)},
                                     at<void>(workspace), at<void>(stream)));
      },
      pybind11::arg("sizes"), pybind11::kw_only(), pybind11::arg("states"), pybind11::arg("sketch"),
      pybind11::arg("u"), pybind11::arg("v"), pybind11::arg("inputs"), pybind11::arg("transforms"),
      pybind11::arg("workspace"), pybind11::arg("stream"),
      "Launches the forward; raises LaunchError if a launch fails.");

  module.def(
      "backward",
      [](const Sizes& sizes, Address grad_u, Address grad_v, Address states, Address sketch, Address inputs,
         Address transforms, Address grad_states, Address workspace, Address stream) {
        check(gakernels::run_backward(sizes,
                                      {at<const float>(grad_u), at<const float>(grad_v), at<const float>(states),
                                       at<const float>(sketch), at<const void>(inputs), at<const double>(transforms),
                                       at<float>(grad_states)},
                                      at<void>(workspace), at<void>(stream)));
      },
      pybind11::arg("sizes"), pybind11::kw_only(), pybind11::arg("grad_u"), pybind11::arg("grad_v"),
      pybind11::arg("states"), pybind11::arg("sketch"), pybind11::arg("inputs"), pybind11::arg("transforms"),
      pybind11::arg("grad_states"), pybind11::arg("workspace"), pybind11::arg("stream"),
      "Launches the backward; raises LaunchError if a launch fails.");
}
