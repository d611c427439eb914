// low_rank_polar (docs/numerics.md, docs/cuda.md): the sequence of kernels, for any launcher.
//
// A launcher has launch<Kernel>(grid, arguments). Nothing is allocated and nothing waits: all memory is the caller's,
// the workspace as large as forward_bytes() or backward_bytes() says.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "factor.h"
#include "product.h"
#include "product64.h"
#include "quadrature.h"
#include "scale.h"
#include "wide_product.h"

namespace gakernels {

constexpr double kLeastDamping = 1.0 / (1 << 23);  // float32 states hold nothing smaller; the r x r steps stay definite

struct Sizes {
  int batch, size, rank, steps;  // steps: K = 2 + 2 power_iterations
  double damping;
  int multiprocessors;  // of the device; the shapes of the launches follow from it

  std::int64_t tall() const { return static_cast<std::int64_t>(size) * rank; }
  std::int64_t square() const { return static_cast<std::int64_t>(rank) * rank; }
};

struct Forward {
  const float *states, *sketch;  // (batch, size, size), (size, rank)
  float *u, *v;                  // (batch, size, rank)
  float* inputs;                 // X_k (batch, steps, size, rank)
  double* transforms;            // W_k (batch, steps, rank, rank)
};

struct Backward {
  const float *grad_u, *grad_v;  // (batch, size, rank)
  const float *states, *sketch, *inputs;
  const double* transforms;
  float* grad_states;            // (batch, size, size)
};

template <class...>
struct KernelList {};

// Products in float64 by what they are for; T: transposed.
using Gram = Product64<float, true, float, false, double, Form::kLower>;                    // X^T X
using Inner = Product64<float, true, float, false, double, Form::kFull>;                    // G^T X
using Transformed = Product64<float, false, double, false, float, Form::kFull>;             // X W
using Square = Product64<double, false, double, false, double, Form::kFull>;                // W s
using SquareMirror = Product64<double, false, double, false, double, Form::kMirror>;        // lower half of E W
using SquareTransposedMirror = Product64<double, false, double, true, double, Form::kMirror>;  // P W^T

using AllKernels =
    KernelList<Peaks, StateProduct<64, 32, false>, StateProduct<64, 32, true>, StateProduct<64, 64, false>,
               StateProduct<64, 64, true>, StateProduct<64, 128, false>, StateProduct<64, 128, true>,
               SplitFactor, WideProduct<false>, WideProduct<true>, OuterProducts, Gram, Inner, Transformed,
               Square, SquareMirror, SquareTransposedMirror, StepGradient, SumParts, Factor<Inverse::kTransform>,
               Factor<Inverse::kNode>>;

// Hands out a workspace piece by piece; without memory it only counts.
class Arena {
 public:
  explicit Arena(unsigned char* memory) : memory_(memory) {}

  template <class Scalar>
  Scalar* take(std::int64_t count) {
    auto* piece = memory_ == nullptr ? nullptr : reinterpret_cast<Scalar*>(memory_ + used_);
    used_ += (count * static_cast<std::int64_t>(sizeof(Scalar)) + 255) / 256 * 256;
    return piece;
  }
  std::int64_t used() const { return used_; }

 private:
  unsigned char* memory_;
  std::int64_t used_ = 0;
};

template <class Launcher>
class Polar {
 public:
  Polar(Launcher& launcher, const Sizes& sizes, unsigned char* memory)
      : launcher_(launcher), sizes_(sizes), arena_(memory) {
    sizes_.damping = std::max(sizes_.damping, kLeastDamping);
    const double square = sizes_.damping * sizes_.damping;
    shift_ = Quadrature{1, {square}, {1.0}};
    rule_ = inverse_root_rule(square, 1 + square);
    for (int j = 0; j < rule_.count; ++j) rule_.nodes[j] += square;
    // Enough blocks for the device, but no more partial sums than the next kernel reads quickly.
    const int tiles = (sizes_.rank + 63) / 64;
    while (splits_ < 4 && splits_ * sizes_.batch * tiles * (tiles + 1) / 2 < sizes_.multiprocessors &&
           sizes_.size % (2 * splits_ * 32) == 0) {
      splits_ *= 2;
    }
    group_ = std::max(1, std::min(sizes_.batch, 320 / rule_.count));
    peaks_ = arena_.take<float>(static_cast<std::int64_t>(sizes_.batch) * kSlices);
    grams_ = arena_.take<double>(sizes_.batch * splits_ * sizes_.square());
    // With two tiles for every multiprocessor the wide product pays, and a tile of 128 columns is not half empty.
    if (sizes_.rank > 64 && static_cast<std::int64_t>(sizes_.batch) * sizes_.size >= 2 * sizes_.multiprocessors * 128) {
      parts_ = arena_.take<float>(2 * sizes_.batch * sizes_.tall());
    }
    nodes_ = arena_.take<double>(group_ * rule_.count * sizes_.square());
  }

  std::int64_t forward_bytes() const { return arena_.used(); }

  void forward(const Forward& data) {
    if (sizes_.batch == 0) return;
    look_through(data.states);
    const int last = sizes_.steps - 1;
    for (int k = 0; k <= last; ++k) {
      float* y = (last - k) % 2 == 0 ? data.v : data.u;  // the two take turns; the last two stay
      const float* previous = k == 0 ? data.sketch : ((last - k) % 2 == 0 ? data.u : data.v);
      float* x = data.inputs + k * sizes_.tall();
      double* transform = data.transforms + k * sizes_.square();
      multiply(k % 2 == 1, data.states, previous, k == 0 ? 0 : sizes_.tall(), nullptr, x,
               sizes_.steps * sizes_.tall());
      gram(x, sizes_.steps * sizes_.tall());
      if (k < last) {
        launch_factor(transform);
      } else {
        for (int first = 0; first < sizes_.batch; first += group_) {
          const int count = std::min(group_, sizes_.batch - first);
          launch_nodes(first, count, false);
          launcher_.template launch<SumParts>(sum_grid(count),
                                              {nodes_, transform + first * sizes_.steps * sizes_.square(),
                                               sizes_.steps * sizes_.square(), sizes_.rank, rule_.count, false, 1.0});
        }
      }
      transform_input(x, transform, y, 1, sizes_.tall());
    }
  }

  // Takes the workspace of the backward, beyond that of the forward.
  void prepare_backward() {
    const std::int64_t square = sizes_.batch * sizes_.square();
    gradients_ = arena_.take<float>(sizes_.batch * sizes_.steps * sizes_.tall());
    bases_ = arena_.take<float>(sizes_.batch * (sizes_.steps - 1) * sizes_.tall());
    upstream_ = arena_.take<float>(sizes_.batch * sizes_.tall());
    inner_ = arena_.take<double>(square);
    symmetric_ = arena_.take<double>(square);
    half_ = arena_.take<double>(square);
    q_ = arena_.take<double>(square);
    left_ = arena_.take<double>(group_ * rule_.count * sizes_.square());
    terms_ = arena_.take<double>(group_ * rule_.count * sizes_.square());
  }

  std::int64_t backward_bytes() {
    prepare_backward();
    return arena_.used();
  }

  void backward(const Backward& data) {
    if (sizes_.batch == 0) return;
    prepare_backward();
    look_through(data.states);
    const int last = sizes_.steps - 1;
    transform_input(data.inputs, data.transforms, bases_, last, last * sizes_.tall());
    const float* upstream = data.grad_v;
    for (int k = last; k >= 0; --k) {
      const float* x = data.inputs + k * sizes_.tall();
      const double* transform = data.transforms + k * sizes_.square();
      inner_product(upstream, x, k == last);
      if (k == last) {
        gram(x, sizes_.steps * sizes_.tall());
        root_gradient();
      } else {
        transform_gradient(transform);
      }
      float* gradient = gradients_ + k * sizes_.tall();
      const StepGradient::Arguments step{upstream, x, transform, q_, gradient, sizes_.tall(),
                                         sizes_.steps * sizes_.tall(), sizes_.steps * sizes_.square(),
                                         sizes_.steps * sizes_.tall(), sizes_.size, sizes_.rank,
                                         sizes_.damping * sizes_.damping};
      launcher_.template launch<StepGradient>(step.grid(sizes_.batch), step);
      if (k == 0) break;
      multiply(k % 2 == 0, data.states, gradient, sizes_.steps * sizes_.tall(), k == last ? data.grad_u : nullptr,
               upstream_, sizes_.tall());
      upstream = upstream_;
    }
    const OuterProducts::Arguments outer{peaks_,           gradients_,  bases_,      data.sketch,
                                         data.grad_states, sizes_.size, sizes_.rank, sizes_.steps};
    launcher_.template launch<OuterProducts>(outer.grid(sizes_.batch), outer);
  }

 private:
  Index3 sum_grid(int batch) const {
    SumParts::Arguments arguments{};
    arguments.rank = sizes_.rank;
    return arguments.grid(batch);
  }

  void look_through(const float* states) {
    const Peaks::Arguments arguments{states, peaks_, static_cast<std::int64_t>(sizes_.size) * sizes_.size};
    launcher_.template launch<Peaks>(arguments.grid(sizes_.batch), arguments);
  }

  // out = 2^-e S factor + addend, or with S^T
  void multiply(bool transpose, const float* states, const float* factor, std::int64_t factor_stride,
                const float* addend, float* out, std::int64_t out_stride) {
    if (sizes_.rank == 32) {
      choose<64, 32>(transpose, states, factor, factor_stride, addend, out, out_stride);
    } else if (sizes_.rank == 64) {
      choose<64, 64>(transpose, states, factor, factor_stride, addend, out, out_stride);
    } else if (parts_ == nullptr) {
      choose<64, 128>(transpose, states, factor, factor_stride, addend, out, out_stride);
    } else if (transpose) {
      launch_wide<WideProduct<true>>(states, factor, factor_stride, addend, out, out_stride);
    } else {
      launch_wide<WideProduct<false>>(states, factor, factor_stride, addend, out, out_stride);
    }
  }

  template <int kRows, int kColumns>
  void choose(bool transpose, const float* states, const float* factor, std::int64_t factor_stride,
              const float* addend, float* out, std::int64_t out_stride) {
    if (transpose) {
      launch_product<StateProduct<kRows, kColumns, true>>(states, factor, factor_stride, addend, out, out_stride);
    } else {
      launch_product<StateProduct<kRows, kColumns, false>>(states, factor, factor_stride, addend, out, out_stride);
    }
  }

  template <class Kernel>
  void launch_product(const float* states, const float* factor, std::int64_t factor_stride, const float* addend,
                      float* out, std::int64_t out_stride) {
    const typename Kernel::Arguments arguments{states, peaks_,        factor,     addend,      out,
                                               factor_stride, out_stride, sizes_.size, sizes_.rank};
    launcher_.template launch<Kernel>(arguments.grid(sizes_.batch), arguments);
  }

  template <class Kernel>
  void launch_wide(const float* states, const float* factor, std::int64_t factor_stride, const float* addend,
                   float* out, std::int64_t out_stride) {
    const SplitFactor::Arguments split{factor, parts_, factor_stride, sizes_.size, sizes_.rank};
    launcher_.template launch<SplitFactor>(split.grid(sizes_.batch), split);
    const typename Kernel::Arguments arguments{states, peaks_,     parts_,      addend,
                                               out,    out_stride, sizes_.size, sizes_.rank};
    launcher_.template launch<Kernel>(arguments.grid(sizes_.batch), arguments);
  }

  // Partial sums of X^T X, lower triangle.
  void gram(const float* x, std::int64_t stride) {
    const std::int64_t rows = sizes_.size / splits_;
    typename Gram::Arguments arguments{};
    arguments.a = arguments.b = {x, stride, rows * sizes_.rank};
    launch_tall_inner<Gram>(arguments, rows);
  }

  // inner_ = G^T X, or its symmetric part
  void inner_product(const float* upstream, const float* x, bool symmetric) {
    const std::int64_t rows = sizes_.size / splits_;
    typename Inner::Arguments arguments{};
    arguments.a = {upstream, sizes_.tall(), rows * sizes_.rank};
    arguments.b = {x, sizes_.steps * sizes_.tall(), rows * sizes_.rank};
    launch_tall_inner<Inner>(arguments, rows);
    launcher_.template launch<SumParts>(
        sum_grid(sizes_.batch), {grams_, inner_, sizes_.square(), sizes_.rank, splits_, symmetric, 1.0});
  }

  template <class Kernel>
  void launch_tall_inner(typename Kernel::Arguments& arguments, std::int64_t rows) {
    arguments.out = grams_;
    arguments.out_matrix = splits_ * sizes_.square();
    arguments.out_part = sizes_.square();
    arguments.rows = arguments.columns = arguments.lda = arguments.ldb = sizes_.rank;
    arguments.depth = static_cast<int>(rows);
    arguments.alpha = 1;
    launcher_.template launch<Kernel>(arguments.grid(sizes_.batch, splits_), arguments);
  }

  // W of a step but the last
  void launch_factor(double* transform) {
    const typename Factor<Inverse::kTransform>::Arguments arguments{
        grams_, transform, sizes_.steps * sizes_.square(), 0, sizes_.rank, splits_, false, shift_};
    launcher_.template launch<Factor<Inverse::kTransform>>(arguments.grid(sizes_.batch), arguments);
  }

  // The terms of the inverse square root of the last step, for `count` matrices from `first` on.
  void launch_nodes(int first, int count, bool square_root) {
    const typename Factor<Inverse::kNode>::Arguments arguments{grams_ + first * splits_ * sizes_.square(),
                                                               nodes_,
                                                               rule_.count * sizes_.square(),
                                                               sizes_.square(),
                                                               sizes_.rank,
                                                               splits_,
                                                               square_root,
                                                               rule_};
    launcher_.template launch<Factor<Inverse::kNode>>(arguments.grid(count), arguments);
  }

  // Y_k = X_k W_k for `count` steps
  void transform_input(const float* x, const double* transform, float* y, int count, std::int64_t y_stride) {
    typename Transformed::Arguments arguments{};
    arguments.a = {x, sizes_.steps * sizes_.tall(), sizes_.tall()};
    arguments.b = {transform, sizes_.steps * sizes_.square(), sizes_.square()};
    arguments.out = y;
    arguments.out_matrix = y_stride;
    arguments.out_part = sizes_.tall();
    arguments.rows = sizes_.size;
    arguments.columns = arguments.depth = arguments.lda = arguments.ldb = sizes_.rank;
    arguments.alpha = 1;
    launcher_.template launch<Transformed>(arguments.grid(sizes_.batch, count), arguments);
  }

  // q_ = -2 W s W^T, s the symmetric part of the lower triangle of (G^T X) W with half of its diagonal
  void transform_gradient(const double* transform) {
    const Operand<double> w{transform, sizes_.steps * sizes_.square(), 0};
    square<SquareMirror>({inner_, sizes_.square(), 0}, w, symmetric_, sizes_.batch, 1, 0.5);
    square<Square>(w, {symmetric_, sizes_.square(), 0}, half_, sizes_.batch, 1, 1);
    square<SquareTransposedMirror>({half_, sizes_.square(), 0}, w, q_, sizes_.batch, 1, -2);
  }

  // q_ = -2 sum of R_j e R_j: the derivative of the sum of inverses that stands for the inverse square root
  void root_gradient() {
    const std::int64_t matrix = rule_.count * sizes_.square();
    for (int first = 0; first < sizes_.batch; first += group_) {
      const int count = std::min(group_, sizes_.batch - first);
      const Operand<double> nodes{nodes_, matrix, sizes_.square()};
      launch_nodes(first, count, true);
      square<Square>(nodes, {inner_ + first * sizes_.square(), sizes_.square(), 0}, left_, count, rule_.count, 1);
      square<SquareMirror>({left_, matrix, sizes_.square()}, nodes, terms_, count, rule_.count, -2);
      launcher_.template launch<SumParts>(sum_grid(count), {terms_, q_ + first * sizes_.square(), sizes_.square(),
                                                            sizes_.rank, rule_.count, false, 1.0});
    }
  }

  template <class Kernel>
  void square(const Operand<double>& a, const Operand<double>& b, double* out, int batch, int parts, double alpha) {
    typename Kernel::Arguments arguments{};
    arguments.a = a;
    arguments.b = b;
    arguments.out = out;
    arguments.out_matrix = parts * sizes_.square();
    arguments.out_part = sizes_.square();
    arguments.rows = arguments.columns = arguments.depth = arguments.lda = arguments.ldb = sizes_.rank;
    arguments.alpha = alpha;
    launcher_.template launch<Kernel>(arguments.grid(batch, parts), arguments);
  }

  Launcher& launcher_;
  Sizes sizes_;
  Arena arena_;
  Quadrature shift_, rule_;
  int splits_ = 1, group_ = 1;
  float *peaks_ = nullptr, *gradients_ = nullptr, *bases_ = nullptr, *upstream_ = nullptr, *parts_ = nullptr;
  double *grams_ = nullptr, *nodes_ = nullptr, *left_ = nullptr, *terms_ = nullptr;
  double *inner_ = nullptr, *symmetric_ = nullptr, *half_ = nullptr, *q_ = nullptr;
};

}  // namespace gakernels
