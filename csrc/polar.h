// low_rank_polar (docs/numerics.md, docs/low_rank_polar.md): the sequence of kernels, for any launcher.
//
// A launcher has launch<Kernel>(grid, arguments). Nothing allocates or waits: the caller provides all memory, including
// a workspace of forward_bytes() or backward_bytes().
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "factor.h"
#include "outer_products.h"
#include "product.h"
#include "product64.h"
#include "quadrature.h"
#include "scale.h"
#include "wide_product.h"

namespace gakernels {

// Its square is eight roundings of a float64 trace, so that the r x r steps stay definite; float32 states hold less.
constexpr double kLeastDamping = 1.0 / (1 << 25);

struct Sizes {
  int batch, size, rank, steps;  // steps: K = 2 + 2 power_iterations
  double damping;
  int multiprocessors;  // of the device; determines the launch shapes
  bool exact;           // everything in float64, for a small damping; otherwise the tall matrices are float32

  std::int64_t tall() const { return static_cast<std::int64_t>(size) * rank; }
  std::int64_t square() const { return static_cast<std::int64_t>(rank) * rank; }
};

struct Forward {
  const float *states, *sketch;  // (batch, size, size), (size, rank)
  float *u, *v;                  // (batch, size, rank)
  void* inputs;                  // X_k (batch, steps, size, rank), float64 if exact, else float32
  double* transforms;            // W_k (batch, steps, rank, rank)
};

struct Backward {
  const float *grad_u, *grad_v;  // (batch, size, rank)
  const float *states, *sketch;
  const void* inputs;
  const double* transforms;
  float* grad_states;            // (batch, size, size)
};

template <class...>
struct KernelList {};

// Products in float64, by purpose; T: transposed. Scalar: the type of the tall matrices X, Y and G.
template <class Scalar>
using Gram = Product64<Scalar, true, Scalar, false, double, Form::kLower>;                  // X^T X
template <class Scalar>
using Inner = Product64<Scalar, true, Scalar, false, double, Form::kFull>;                  // G^T X
template <class Scalar>
using Transformed = Product64<Scalar, false, double, false, Scalar, Form::kFull>;           // X W
template <bool kTranspose>
using ExactProduct = Product64<float, kTranspose, double, false, double, Form::kFull>;      // S Y or S^T Y
using Square = Product64<double, false, double, false, double, Form::kFull>;                // W s; also X W in float64
using SquareMirror = Product64<double, false, double, false, double, Form::kMirror>;        // lower half of E W
using SquareTransposedMirror = Product64<double, false, double, true, double, Form::kMirror>;  // P W^T

using AllKernels =
    KernelList<Peaks, StateProduct<64, 32, false>, StateProduct<64, 32, true>, StateProduct<64, 64, false>,
               StateProduct<64, 64, true>, StateProduct<64, 128, false>, StateProduct<64, 128, true>,
               SplitFactor, WideProduct<false>, WideProduct<true>, OuterProducts<float>, Gram<float>, Inner<float>,
               Transformed<float>, Square, SquareMirror, SquareTransposedMirror, StepGradient<float>, SumParts,
               Factor<Inverse::kTransform>, Factor<Inverse::kNode>, ExactProduct<false>, ExactProduct<true>,
               Gram<double>, Inner<double>, StepGradient<double>, OuterProducts<double>, Widen, Narrow>;

// Allocates from a workspace piece by piece; without memory it only counts bytes.
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

// Scalar is the type of the tall matrices: float, with products on TF32 tensor cores, or double, all in float64.
template <class Launcher, class Scalar>
class Polar {
  static constexpr bool kExact = std::is_same_v<Scalar, double>;

 public:
  Polar(Launcher& launcher, const Sizes& sizes, unsigned char* memory)
      : launcher_(launcher), sizes_(sizes), arena_(memory) {
    sizes_.damping = std::max(sizes_.damping, kLeastDamping);
    const double square = sizes_.damping * sizes_.damping;
    shift_ = Quadrature{1, {square}, {1.0}};
    rule_ = inverse_root_rule(square, 1 + square);
    for (int j = 0; j < rule_.count; ++j) rule_.nodes[j] += square;
    // Enough blocks for the device, but no more partial sums than the next kernel can read quickly.
    const int tiles = (sizes_.rank + 63) / 64;
    while (splits_ < 4 && splits_ * sizes_.batch * tiles * (tiles + 1) / 2 < sizes_.multiprocessors &&
           sizes_.size % (2 * splits_ * 32) == 0) {
      splits_ *= 2;
    }
    group_ = std::max(1, std::min(sizes_.batch, 320 / rule_.count));
    grams_ = arena_.take<double>(sizes_.batch * splits_ * sizes_.square());
    nodes_ = arena_.take<double>(group_ * rule_.count * sizes_.square());
    if constexpr (kExact) {
      sketch_ = arena_.take<double>(sizes_.tall());
      basis_ = arena_.take<double>(sizes_.batch * sizes_.tall());
    } else {
      peaks_ = arena_.take<float>(static_cast<std::int64_t>(sizes_.batch) * kSlices);
      // The wide product pays off with two tiles per multiprocessor, and if a tile of 128 columns is not half empty.
      const std::int64_t rows = static_cast<std::int64_t>(sizes_.batch) * sizes_.size;
      if (sizes_.rank > 64 && rows >= 2 * sizes_.multiprocessors * 128) {
        parts_ = arena_.take<float>(2 * sizes_.batch * sizes_.tall());
      }
    }
  }

  std::int64_t forward_bytes() const { return arena_.used(); }

  void forward(const Forward& data) {
    if (sizes_.batch == 0) return;
    look_through(data.states);
    const Scalar* previous = widened(data.sketch, sketch_, sizes_.tall());
    const int last = sizes_.steps - 1;
    for (int k = 0; k <= last; ++k) {
      float* out = (last - k) % 2 == 0 ? data.v : data.u;  // alternate; the last two steps' outputs stay
      Scalar* x = static_cast<Scalar*>(data.inputs) + k * sizes_.tall();
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
      if constexpr (kExact) {
        transform_input(x, transform, basis_, 1, sizes_.tall());
        if (k >= last - 1) narrow(basis_, out);
        previous = basis_;
      } else {
        transform_input(x, transform, out, 1, sizes_.tall());
        previous = out;
      }
    }
  }

  // Takes the backward's workspace, in addition to the forward's.
  void prepare_backward() {
    const std::int64_t square = sizes_.batch * sizes_.square();
    gradients_ = arena_.take<Scalar>(sizes_.batch * sizes_.steps * sizes_.tall());
    bases_ = arena_.take<Scalar>(sizes_.batch * (sizes_.steps - 1) * sizes_.tall());
    upstream_ = arena_.take<Scalar>(sizes_.batch * sizes_.tall());
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
    const auto* inputs = static_cast<const Scalar*>(data.inputs);
    const Scalar* sketch = widened(data.sketch, sketch_, sizes_.tall());
    transform_input(inputs, data.transforms, bases_, last, last * sizes_.tall());
    const Scalar* upstream = widened(data.grad_v, upstream_, sizes_.batch * sizes_.tall());
    for (int k = last; k >= 0; --k) {
      const Scalar* x = inputs + k * sizes_.tall();
      const double* transform = data.transforms + k * sizes_.square();
      inner_product(upstream, x, k == last);
      if (k == last) {
        gram(x, sizes_.steps * sizes_.tall());
        root_gradient();
      } else {
        transform_gradient(transform);
      }
      Scalar* gradient = gradients_ + k * sizes_.tall();
      const std::int64_t tall = sizes_.steps * sizes_.tall(), square = sizes_.steps * sizes_.square();
      const typename StepGradient<Scalar>::Arguments step{
          upstream, x,      transform, q_,          gradient,    sizes_.tall(),
          tall,     square, tall,      sizes_.size, sizes_.rank, sizes_.damping * sizes_.damping};
      launcher_.template launch<StepGradient<Scalar>>(step.grid(sizes_.batch), step);
      if (k == 0) break;
      multiply(k % 2 == 0, data.states, gradient, sizes_.steps * sizes_.tall(), k == last ? data.grad_u : nullptr,
               upstream_, sizes_.tall());
      upstream = upstream_;
    }
    const typename OuterProducts<Scalar>::Arguments outer{
        peaks_, gradients_, bases_, sketch, data.grad_states, sizes_.size, sizes_.rank, sizes_.steps};
    launcher_.template launch<OuterProducts<Scalar>>(outer.grid(sizes_.batch), outer);
  }

 private:
  Index3 sum_grid(int batch) const {
    SumParts::Arguments arguments{};
    arguments.rank = sizes_.rank;
    return arguments.grid(batch);
  }

  // Float64 needs no powers of two: the square of a float32 number does not overflow.
  void look_through(const float* states) {
    if constexpr (!kExact) {
      const Peaks::Arguments arguments{states, peaks_, static_cast<std::int64_t>(sizes_.size) * sizes_.size};
      launcher_.template launch<Peaks>(arguments.grid(sizes_.batch), arguments);
    }
  }

  // A matrix in the type of the tall ones: the matrix itself, or a copy in `room`.
  const Scalar* widened(const float* from, Scalar* room, std::int64_t count) {
    if constexpr (kExact) {
      widen(from, room, count, false);
      return room;
    } else {
      return from;
    }
  }

  void widen(const float* from, double* to, std::int64_t count, bool add) {
    const Widen::Arguments arguments{from, to, count, add};
    launcher_.template launch<Widen>(arguments.grid(), arguments);
  }

  void narrow(const double* from, float* to) {
    const Narrow::Arguments arguments{from, to, sizes_.batch * sizes_.tall()};
    launcher_.template launch<Narrow>(arguments.grid(), arguments);
  }

  // out = S factor + addend, or with S^T; times 2^-e for float32 matrices. With an addend, `out` must have no gaps.
  void multiply(bool transpose, const float* states, const Scalar* factor, std::int64_t factor_stride,
                const float* addend, Scalar* out, std::int64_t out_stride) {
    if constexpr (kExact) {
      if (transpose) {
        launch_exact<ExactProduct<true>>(states, factor, factor_stride, out, out_stride);
      } else {
        launch_exact<ExactProduct<false>>(states, factor, factor_stride, out, out_stride);
      }
      if (addend != nullptr) widen(addend, out, sizes_.batch * sizes_.tall(), true);
    } else {
      multiply_by_parts(transpose, states, factor, factor_stride, addend, out, out_stride);
    }
  }

  template <class Kernel>
  void launch_exact(const float* states, const double* factor, std::int64_t factor_stride, double* out,
                    std::int64_t out_stride) {
    typename Kernel::Arguments arguments{};
    arguments.a = {states, static_cast<std::int64_t>(sizes_.size) * sizes_.size, 0};
    arguments.b = {factor, factor_stride, 0};
    arguments.out = out;
    arguments.out_matrix = out_stride;
    arguments.rows = arguments.depth = arguments.lda = sizes_.size;
    arguments.columns = arguments.ldb = sizes_.rank;
    arguments.alpha = 1;
    launcher_.template launch<Kernel>(arguments.grid(sizes_.batch, 1), arguments);
  }

  // With factors split into TF32 numbers, times 2^-e.
  void multiply_by_parts(bool transpose, const float* states, const float* factor, std::int64_t factor_stride,
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
  void gram(const Scalar* x, std::int64_t stride) {
    const std::int64_t rows = sizes_.size / splits_;
    typename Gram<Scalar>::Arguments arguments{};
    arguments.a = arguments.b = {x, stride, rows * sizes_.rank};
    launch_tall_inner<Gram<Scalar>>(arguments, rows);
  }

  // inner_ = G^T X, or its symmetric part
  void inner_product(const Scalar* upstream, const Scalar* x, bool symmetric) {
    const std::int64_t rows = sizes_.size / splits_;
    typename Inner<Scalar>::Arguments arguments{};
    arguments.a = {upstream, sizes_.tall(), rows * sizes_.rank};
    arguments.b = {x, sizes_.steps * sizes_.tall(), rows * sizes_.rank};
    launch_tall_inner<Inner<Scalar>>(arguments, rows);
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

  // W of any step but the last
  void launch_factor(double* transform) {
    const typename Factor<Inverse::kTransform>::Arguments arguments{
        grams_, transform, sizes_.steps * sizes_.square(), 0, sizes_.rank, splits_, false, shift_};
    launcher_.template launch<Factor<Inverse::kTransform>>(arguments.grid(sizes_.batch), arguments);
  }

  // The terms of the last step's inverse square root, for `count` matrices from `first` on.
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
  void transform_input(const Scalar* x, const double* transform, Scalar* y, int count, std::int64_t y_stride) {
    typename Transformed<Scalar>::Arguments arguments{};
    arguments.a = {x, sizes_.steps * sizes_.tall(), sizes_.tall()};
    arguments.b = {transform, sizes_.steps * sizes_.square(), sizes_.square()};
    arguments.out = y;
    arguments.out_matrix = y_stride;
    arguments.out_part = sizes_.tall();
    arguments.rows = sizes_.size;
    arguments.columns = arguments.depth = arguments.lda = arguments.ldb = sizes_.rank;
    arguments.alpha = 1;
    launcher_.template launch<Transformed<Scalar>>(arguments.grid(sizes_.batch, count), arguments);
  }

  // q_ = -2 W s W^T, s the symmetric part of the lower triangle of (G^T X) W with half of its diagonal
  void transform_gradient(const double* transform) {
    const Operand<double> w{transform, sizes_.steps * sizes_.square(), 0};
    square<SquareMirror>({inner_, sizes_.square(), 0}, w, symmetric_, sizes_.batch, 1, 0.5);
    square<Square>(w, {symmetric_, sizes_.square(), 0}, half_, sizes_.batch, 1, 1);
    square<SquareTransposedMirror>({half_, sizes_.square(), 0}, w, q_, sizes_.batch, 1, -2);
  }

  // q_ = -2 sum of R_j e R_j: the derivative of the sum of inverses that approximates the inverse square root
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
  float *peaks_ = nullptr, *parts_ = nullptr;
  Scalar *sketch_ = nullptr, *basis_ = nullptr, *gradients_ = nullptr, *bases_ = nullptr, *upstream_ = nullptr;
  double *grams_ = nullptr, *nodes_ = nullptr, *left_ = nullptr, *terms_ = nullptr;
  double *inner_ = nullptr, *symmetric_ = nullptr, *half_ = nullptr, *q_ = nullptr;
};

// Calls action(polar) with the sequences in the arithmetic that the sizes select.
template <class Launcher, class Action>
auto with_polar(Launcher& launcher, const Sizes& sizes, void* workspace, const Action& action) {
  auto* memory = static_cast<unsigned char*>(workspace);
  if (sizes.exact) {
    Polar<Launcher, double> polar(launcher, sizes, memory);
    return action(polar);
  }
  Polar<Launcher, float> polar(launcher, sizes, memory);
  return action(polar);
}

}  // namespace gakernels
