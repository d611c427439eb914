"""x^(-1/2) as a sum of w / (x + s), with the best poles for the spectrum that a damping allows."""

import functools
import math

MARGIN = 1.1  # of the interval of the poles at both ends, where the derivative errs most


@functools.cache
def inverse_root_poles(
    damping: float, error: float, largest_condition: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Poles s and weights w with x^(-1/2) = sum of w / (x + s) to a relative error, for x in damping^2 + [0, 1].

    The best rational function of this form is Zolotarev's; this is method 3 of Hale, Higham and Trefethen (2008), in
    Jacobi's elliptic functions of modulus^2 = 1 - ratio, with ratio = lower / upper end. The error of N poles is about
    4 exp(-2 pi^2 N / ln(16 / ratio)). Where 1 / ratio is over `largest_condition`, the formula holds on the upper part.
    """
    upper = MARGIN * (1 + damping**2)
    ratio = max(damping**2 / MARGIN / upper, 1 / largest_condition)
    count = math.ceil(math.log(4 / error) * math.log(16 / ratio) / (2 * math.pi**2))
    root = math.sqrt(ratio)
    step = math.pi / (2 * _arithmetic_geometric_mean(1.0, root)) / count  # of the period K
    poles, weights = [], []
    for j in range(count):
        tangent = _tangent(step * (min(j, count - 1 - j) + 0.5), root)
        slope = math.sqrt((1 + tangent**2) * (1 + ratio * tangent**2))
        if 2 * j + 1 > count:  # the other half, by reflection
            tangent, slope = 1 / (root * tangent), slope / (root * tangent**2)
        poles.append(upper * ratio * tangent**2)
        weights.append(math.sqrt(upper * ratio) * 2 / math.pi * step * slope)
    return tuple(poles), tuple(weights)


def _tangent(u: float, root: float) -> float:
    """sn(u) / cn(u) of modulus^2 = 1 - root^2: by Jacobi's imaginary transformation -i sn(i u) of modulus `root`.

    Landen's transformation makes the modulus smaller until the function is a hyperbolic sine. Nothing cancels for u up
    to half of the period.
    """
    if root < 1e-16:
        return math.sinh(u)
    smaller = (root / (1 + math.sqrt((1 - root) * (1 + root)))) ** 2
    tangent = _tangent(u / (1 + smaller), smaller)
    return (1 + smaller) * tangent / (1 - smaller * tangent**2)


def _arithmetic_geometric_mean(a: float, b: float) -> float:
    while abs(a - b) > 1e-15 * a:
        a, b = (a + b) / 2, math.sqrt(a * b)
    return a
