"""Sums of states: a state is a sum over tokens (equation 3), so contexts can be added, removed, weighted and faded.

All functions take and return states by adapted layer, compute in float64 and round once to the states' dtype.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gakernels.errors import InputError
from gakernels.fingerprint import tensor_fingerprint


@dataclass(frozen=True)
class Part:
    """A context whose state was added to another one.

    Attributes:
        fingerprint: fingerprint of its state (`state_fingerprint`).
        tokens: number of its tokens.
        weight: its current weight in the sum.
    """

    fingerprint: str
    tokens: int
    weight: float

    def faded(self, factor: float) -> "Part":
        """The same part after the whole sum has been multiplied by a factor."""
        return replace(self, weight=self.weight * factor)


def sum_states(parts: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """sum_i w_i S_i of states (..., d_r, d_r) by adapted layer; all weights are 1 if none are given.

    norm(a S) = norm(S) for a > 0, so only the ratios of the weights matter.

    Raises:
        InputError: there are no states, they differ in layers, shape or dtype, or the weights are not one finite number
            per set of states.
    """
    if not parts:
        raise InputError("parts must be at least one set of states, but there is none")
    weights = [1.0] * len(parts) if weights is None else list(weights)
    if len(weights) != len(parts) or not all(math.isfinite(weight) for weight in weights):
        raise InputError(f"weights must be {len(parts)} finite numbers, one for each part, but they are {weights}")
    for part in parts[1:]:
        _check_alike(parts[0], part)
    return {name: _weighted_sum([part[name] for part in parts], weights) for name in parts[0]}


def subtract_states(whole: Mapping[str, Tensor], part: Mapping[str, Tensor], weight: float = 1.0) -> dict[str, Tensor]:
    """S - w S_part: what is left of a sum after a part of weight w is removed.

    The sum was rounded when it was formed, so this differs from the sum of the other parts by up to the unit roundoff
    of the dtype times |S| + |S - w S_part|, entry by entry. If the remainder is small compared to the part, that is a
    large relative error; to avoid it, sum the other parts again.

    Raises:
        InputError: as for `sum_states`.
    """
    return sum_states([whole, part], [1.0, -weight])


def scale_states(states: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """a S, to weight a context before others are added: decay before each gives S_n = sum_i a^(n-i) (S_i - S_(i-1)).

    Raises:
        InputError: the factor is not finite.
    """
    return sum_states([states], [factor])


def state_fingerprint(states: Mapping[str, Tensor]) -> str:
    """Fingerprint of every bit of the states."""
    return tensor_fingerprint(states.items())


def _weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor, alpha=weight)
    return total.to(tensors[0].dtype)


def _check_alike(first: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    if set(first) != set(other):
        raise InputError("the states must be of the same adapted layers, but they are not")
    for name, tensor in other.items():
        if tensor.shape != first[name].shape or tensor.dtype != first[name].dtype:
            raise InputError(
                f"the states of {name} must have the same shape and dtype, but they are "
                f"{tuple(first[name].shape)} {first[name].dtype} and {tuple(tensor.shape)} {tensor.dtype}"
            )
