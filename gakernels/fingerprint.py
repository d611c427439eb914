"""Fingerprints: which base model and which generator a file belongs to."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_REMEMBERED = "_gakernels_fingerprint"
_SAMPLES = 256
_TINY = 2.0**-16  # below it, float16 holds fewer bits than bfloat16
_BLOCK = 1 << 20
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def model_fingerprint(model: nn.Module) -> str:
    """Fingerprint of a base model: names and shapes of all parameters, and evenly spaced values of each.

    Values are compared after rounding to bfloat16, tiny ones as zero, so a model loaded in float32 or in bfloat16 has
    the same one, and also in float16 where its files hold bfloat16 numbers. Reading a sample of each tensor keeps it
    to a moment for a model of any size. A model that was quantised here has the one from before.
    """
    remembered: str | None = getattr(model, _REMEMBERED, None)
    if remembered is not None:
        return remembered
    digest = hashlib.sha256()
    tensors = [part for name, parameter in model.named_parameters() for part in _tensors(name, parameter.detach())]
    for name, parameter in sorted(tensors, key=lambda item: item[0]):
        flat = parameter.reshape(-1)
        count = min(_SAMPLES, flat.numel())
        positions = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).long().to(flat.device)
        values = flat[positions].bfloat16()
        values = torch.where(values.abs() < _TINY, torch.zeros_like(values), values)
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(values.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _tensors(name: str, parameter: Tensor) -> list[tuple[str, Tensor]]:
    """A parameter with its name; of one that other libraries pack numbers into, the tensors inside."""
    if type(parameter).__module__.partition(".")[0] == "torch" or not hasattr(parameter, "__tensor_flatten__"):
        return [(name, parameter)]
    inside, _ = parameter.__tensor_flatten__()
    return [part for key in inside for part in _tensors(f"{name}.{key}", getattr(parameter, key))]


def remember_fingerprint(model: nn.Module) -> None:
    """Have `model_fingerprint` give the present fingerprint from now on, whatever becomes of the parameters."""
    setattr(model, _REMEMBERED, model_fingerprint(model))


def tensor_fingerprint(tensors: Iterable[tuple[str, Tensor]], settings: str = "") -> str:
    """Fingerprint of every bit of the named tensors, and of a text.

    The bits are summed up where the tensors are, in exact integer arithmetic, so that it is the same on every device
    and a generator of several gigabytes need not be copied from a GPU.
    """
    digest = hashlib.sha256(settings.encode())
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        sums = _bit_sums(tensor.detach()).tolist()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {sums}".encode())
    return digest.hexdigest()[:32]


def _bit_sums(tensor: Tensor) -> Tensor:
    """Two sums (2,) over the bits of all numbers as integers, modulo 2^64: plain, and weighted with the position."""
    bits = tensor.reshape(-1).view(_INTEGERS[tensor.element_size()])
    positions = torch.arange(1, min(_BLOCK, bits.numel()) + 1, device=bits.device)
    sums = torch.zeros(2, dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), _BLOCK):
        block = bits[start : start + _BLOCK].long()
        plain, weighted = block.sum(), (block * positions[: block.numel()]).sum()
        sums += torch.stack([plain, weighted + start * plain])
    return sums
