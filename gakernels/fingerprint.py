"""Fingerprints of tensors, which depend on every bit."""

import hashlib
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_PROBES = 16
_BLOCK = 1 << 20
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensor_fingerprint(tensors: Iterable[tuple[str, Tensor]], settings: str = "") -> str:
    """Fingerprint of every bit of the named tensors, and of a text.

    The bits are summed on the tensors' own device, in exact integer arithmetic: the fingerprint is the same on every
    device, and a generator of several gigabytes need not be copied from a GPU.
    """
    digest = hashlib.sha256(settings.encode())
    named = sorted(tensors, key=lambda item: item[0])
    for (name, tensor), sums in zip(
        named, _waited_for([_bit_sums(tensor.detach()) for _, tensor in named]), strict=True
    ):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {sums}".encode())
    return digest.hexdigest()[:32]


def _waited_for(sums: list[Tensor]) -> list[list[int]]:
    """The sums as integers, with one synchronisation per device."""
    found: dict[int, list[int]] = {}
    for device in {pair.device for pair in sums}:
        there = [place for place, pair in enumerate(sums) if pair.device == device]
        found |= zip(there, torch.stack([sums[place] for place in there]).tolist(), strict=True)
    return [found[place] for place in range(len(sums))]


class FingerprintCache:
    """The fingerprint of tensors, computed again after one of them was replaced or written to.

    PyTorch counts most writes, but not those by fused optimizers, through `tensor.data` or by a replayed CUDA graph.
    So some values of each tensor are compared too, with one synchronisation; only such a write that changes none of
    these values goes unnoticed. A copy, pickled or not, starts empty.
    """

    def __init__(self) -> None:
        self._last: tuple[list[Any], list[weakref.ref[Tensor]], str] = ([], [], "")

    def get(self, tensors: Iterable[Tensor], compute: Callable[[], str]) -> str:
        """The fingerprint of these tensors, computed by `compute` if needed."""
        tensors = list(tensors)
        if any(tensor.is_inference() or type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
            return compute()  # these do not count their writes
        now = [*((id(tensor), tensor.data_ptr(), tensor._version) for tensor in tensors), _probe(tensors)]
        seen, alive, fingerprint = self._last
        if now != seen or any(reference() is None for reference in alive):
            fingerprint = compute()
            self._last = now, [weakref.ref(tensor) for tensor in tensors], fingerprint
        return fingerprint

    def __reduce__(self) -> Any:
        return FingerprintCache, ()


def _probe(tensors: Iterable[Tensor]) -> list[bytes]:
    """The bits of some evenly spaced values of each tensor."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        groups.setdefault((tensor.device, tensor.dtype), []).append(flat[:: max(1, flat.numel() // _PROBES)])
    return [torch.cat(group).cpu().view(torch.uint8).numpy().tobytes() for group in groups.values()]


def _bit_sums(tensor: Tensor) -> Tensor:
    """Two sums (2,) modulo 2^64 of the bits of all values as integers: plain, and weighted by position."""
    bits = tensor.reshape(-1).view(_INTEGERS[tensor.element_size()])
    positions = torch.arange(1, min(_BLOCK, bits.numel()) + 1, device=bits.device)
    sums = torch.zeros(2, dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), _BLOCK):
        block = bits[start : start + _BLOCK].long()
        plain, weighted = block.sum(), (block * positions[: block.numel()]).sum()
        sums += torch.stack([plain, weighted + start * plain])
    return sums
