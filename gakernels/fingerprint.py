"""Fingerprints: which base model and which generator a file belongs to."""

import hashlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gakernels.errors import InputError
from gakernels.offloading import offloaded_weight

_REMEMBERED = "_gakernels_fingerprint"
_SAMPLES = 256
_PROBES = 16
_TINY = 2.0**-16  # below it, float16 holds fewer bits than bfloat16
_BLOCK = 1 << 20
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def model_fingerprint(model: nn.Module, under: str = "") -> str:
    """Fingerprint of a base model: names and shapes of all parameters, and evenly spaced values of each.

    Values are compared after rounding to bfloat16, tiny ones as zero, so a model loaded in float32 or in bfloat16 has
    the same one, and also in float16 where its files hold bfloat16 numbers. Reading a sample of each tensor keeps it
    to a moment for a model of any size. A model that was quantised here has the one from before.

    Args:
        model: the base model; weights that accelerate has offloaded are read from where they are.
        under: of the parameters of the module of this name alone.
    """
    remembered: dict[str, str] = getattr(model, _REMEMBERED, {})
    if under in remembered:
        return remembered[under]
    digest = hashlib.sha256()
    named = ((name, value) for name, value in _parameters(model) if not under or name.startswith(f"{under}."))
    tensors = [part for name, value in named for part in _tensors(name, value)]
    for name, parameter in sorted(tensors, key=lambda item: item[0]):
        flat = parameter.reshape(-1)
        count = min(_SAMPLES, flat.numel())
        positions = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).long().to(flat.device)
        values = flat[positions].bfloat16()
        values = torch.where(values.abs() < _TINY, torch.zeros_like(values), values)
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(values.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters with their names, each once, with the values that a forward pass computes with."""
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        path, _, attribute = name.rpartition(".")
        value = offloaded_weight(modules[path], attribute) if parameter.is_meta else parameter.detach()
        if value is None:
            raise InputError(f"base must have values for all of its parameters, but {name} is on the device meta")
        yield name, value


def _tensors(name: str, parameter: Tensor) -> list[tuple[str, Tensor]]:
    """A parameter with its name; of one that other libraries pack numbers into, the tensors inside."""
    if type(parameter).__module__.partition(".")[0] == "torch" or not hasattr(parameter, "__tensor_flatten__"):
        return [(name, parameter)]
    inside, _ = parameter.__tensor_flatten__()
    return [part for key in inside for part in _tensors(f"{name}.{key}", getattr(parameter, key))]


def remember_fingerprint(model: nn.Module, *under: str) -> None:
    """Have `model_fingerprint` give the present fingerprints from now on, whatever becomes of the parameters: of the
    whole model, and of the modules of these names."""
    setattr(model, _REMEMBERED, {name: model_fingerprint(model, name) for name in ("", *under)})


def tensor_fingerprint(tensors: Iterable[tuple[str, Tensor]], settings: str = "") -> str:
    """Fingerprint of every bit of the named tensors, and of a text.

    The bits are summed up where the tensors are, in exact integer arithmetic, so that it is the same on every device
    and a generator of several gigabytes need not be copied from a GPU.
    """
    digest = hashlib.sha256(settings.encode())
    named = sorted(tensors, key=lambda item: item[0])
    for (name, tensor), sums in zip(
        named, _waited_for([_bit_sums(tensor.detach()) for _, tensor in named]), strict=True
    ):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {sums}".encode())
    return digest.hexdigest()[:32]


def _waited_for(sums: list[Tensor]) -> list[list[int]]:
    """The numbers, with one wait for each device."""
    found: dict[int, list[int]] = {}
    for device in {pair.device for pair in sums}:
        there = [place for place, pair in enumerate(sums) if pair.device == device]
        found |= zip(there, torch.stack([sums[place] for place in there]).tolist(), strict=True)
    return [found[place] for place in range(len(sums))]


class FingerprintCache:
    """The fingerprint of tensors, computed again when one of them was exchanged or written to.

    PyTorch counts most writes, but not those of fused optimizers, through `tensor.data` or by a replayed CUDA graph. So
    some numbers of each tensor are compared too, with one wait for the device; only a write of that kind that leaves
    all of these as they were goes unnoticed. A copy, pickled or not, starts empty.
    """

    def __init__(self) -> None:
        self._last: tuple[list[Any], list[weakref.ref[Tensor]], str] = ([], [], "")

    def get(self, tensors: Iterable[Tensor], compute: Callable[[], str]) -> str:
        """The fingerprint of these tensors, which `compute` makes."""
        tensors = list(tensors)
        if any(tensor.is_inference() or type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
            return compute()  # these have no count of their changes
        now = [*((id(tensor), tensor.data_ptr(), tensor._version) for tensor in tensors), _probe(tensors)]
        seen, alive, fingerprint = self._last
        if now != seen or any(reference() is None for reference in alive):
            fingerprint = compute()
            self._last = now, [weakref.ref(tensor) for tensor in tensors], fingerprint
        return fingerprint

    def __reduce__(self) -> Any:
        return FingerprintCache, ()


def _probe(tensors: Iterable[Tensor]) -> list[bytes]:
    """Some evenly spaced numbers of each tensor, bit by bit."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        groups.setdefault((tensor.device, tensor.dtype), []).append(flat[:: max(1, flat.numel() // _PROBES)])
    return [torch.cat(group).cpu().view(torch.uint8).numpy().tobytes() for group in groups.values()]


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
