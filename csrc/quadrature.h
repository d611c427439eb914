// The inverse square root as a sum of inverses: x^(-1/2) = sum of weight_j / (x + node_j) on an interval.
//
// The integral x^(-1/2) = 2/pi times that of dt / (t^2 + x) over t > 0, with t = sqrt(lowest) sn(u) / cn(u) for the
// Jacobi functions of parameter 1 - lowest/highest, becomes one over a whole period of an analytic function of u,
// so the midpoint rule converges geometrically: the relative error on [lowest, highest] is near
// 4 exp(-2 pi^2 count / (ln(highest / lowest) + 3)) (Hale, Higham and Trefethen 2008, section 3). Weights and nodes are
// positive, so nothing cancels.
#pragma once

#include <cmath>

namespace gakernels {

constexpr int kMostNodes = 44;

struct Quadrature {
  int count;
  double nodes[kMostNodes], weights[kMostNodes];
};

// sn, cn and dn at u for parameter 1 - complement, by the arithmetic-geometric mean (Abramowitz and Stegun 16.4).
struct JacobiFunctions {
  double sn, cn, dn;

  JacobiFunctions(double u, double complement) {
    double a[16] = {1}, c[16] = {std::sqrt(1 - complement)}, b = std::sqrt(complement);
    int n = 0;
    while (c[n] > 1e-16 * a[n] && n + 1 < 16) {
      a[n + 1] = (a[n] + b) / 2;
      c[n + 1] = (a[n] - b) / 2;
      b = std::sqrt(a[n] * b);
      ++n;
    }
    double angle = std::ldexp(a[n] * u, n);
    for (; n > 0; --n) angle = (angle + std::asin(c[n] / a[n] * std::sin(angle))) / 2;
    sn = std::sin(angle);
    cn = std::cos(angle);
    dn = std::sqrt(cn * cn + complement * sn * sn);
  }
};

// The rule on [lowest, highest] with a relative error near 1e-9, well under float32 rounding.
inline Quadrature inverse_root_rule(double lowest, double highest) {
  const double pi = 3.14159265358979323846, complement = lowest / highest;
  const double terms = (std::log(4e9) * (3 - std::log(complement))) / (2 * pi * pi);
  Quadrature rule{};
  rule.count = static_cast<int>(std::ceil(terms));
  if (rule.count > kMostNodes) rule.count = kMostNodes;

  double mean = 1, other = std::sqrt(complement);
  while (mean - other > 1e-15 * mean) {
    const double next = (mean + other) / 2;
    other = std::sqrt(mean * other);
    mean = next;
  }
  const double period = pi / (2 * mean), step = period / rule.count;  // period: K for this parameter
  for (int j = 0; j < rule.count; ++j) {
    const double u = (j + 0.5) * step;
    double tangent, slope;  // sn / cn, and its derivative dn / cn^2
    if (2 * u <= period) {
      const JacobiFunctions at(u, complement);
      tangent = at.sn / at.cn;
      slope = at.dn / (at.cn * at.cn);
    } else {  // measured from the other end of the period, since cn would be a difference of nearly equal numbers
      const JacobiFunctions at(period - u, complement);
      tangent = at.cn / (std::sqrt(complement) * at.sn);
      slope = at.dn / (std::sqrt(complement) * at.sn * at.sn);
    }
    rule.nodes[j] = lowest * tangent * tangent;
    rule.weights[j] = 2 / pi * step * std::sqrt(lowest) * slope;
  }
  return rule;
}

}  // namespace gakernels
