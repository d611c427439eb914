"""Fingerprints: which base model and which generator a file belongs to."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_SAMPLES = 256


def model_fingerprint(model: nn.Module) -> str:
    """Fingerprint of a base model: names and shapes of all parameters, and evenly spaced values of each.

    Values are compared after rounding to bfloat16, so a model loaded in float32 or in bfloat16 has the same one.
    Reading a sample of each tensor keeps it to a moment for a model of any size.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        flat = parameter.detach().reshape(-1)
        count = min(_SAMPLES, flat.numel())
        positions = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).long().to(flat.device)
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(_bytes(flat[positions].bfloat16()))
    return digest.hexdigest()[:32]


def tensor_fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Fingerprint of every bit of the named tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_bytes(tensor.detach()))
    return digest.hexdigest()[:32]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
