"""Checks of tensor arguments, shared by the public functions of the operations."""

import torch
from torch import Tensor

from gakernels.errors import InputError


def check_shape(name: str, tensor: Tensor, expected: tuple[int | str, ...]) -> None:
    """Compare a shape with the expected one; a string in `expected` is a free size with that name.

    Raises:
        InputError: the number of dimensions or a fixed size differs.
    """
    matches = tensor.dim() == len(expected) and all(
        isinstance(want, str) or want == got for want, got in zip(expected, tensor.shape, strict=True)
    )
    if not matches:
        wanted = ", ".join(str(size) for size in expected) + ("," if len(expected) == 1 else "")
        raise InputError(f"{name} must have shape ({wanted}), but it has {tuple(tensor.shape)}")


def check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Raises: InputError: the tensor's dtype is not among `allowed`."""
    if tensor.dtype not in allowed:
        wanted = " or ".join(str(dtype) for dtype in allowed)
        raise InputError(f"{name} must be {wanted}, but it is {tensor.dtype}")


def check_same(reference_name: str, reference: Tensor, **others: Tensor | None) -> None:
    """Raises: InputError: the dtype or device of one of the other tensors differs from the reference tensor's."""
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.dtype != reference.dtype:
            raise InputError(f"{name} must be {reference.dtype} like {reference_name}, but it is {tensor.dtype}")
        if tensor.device != reference.device:
            raise InputError(f"{name} must be on {reference.device} like {reference_name}, but is on {tensor.device}")


FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
