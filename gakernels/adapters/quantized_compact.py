"""QuantizedCompactAdapter: a compact adapter in 8 or 4 bits per number, with the error that this caused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gakernels.adapters.compact import CompactAdapter
from gakernels.errors import FormatError, InputError
from gakernels.files import by_suffix, count_entry, entry, read_tensors, write_tensors

BITS = (8, 4)
BLOCK = 32  # consecutive numbers of a column of U or V that share a scale
_SHRINK = tuple(step / 20 for step in range(12, 21))  # candidate scales of a block, relative to its largest number


@dataclass(frozen=True)
class QuantizedCompactAdapter:
    """U and V of a compact adapter as integers, with a scale per block of 32 numbers of a column.

    Of several candidate scales, each block uses the one with the smallest squared error. Scales included, a number
    takes 8.5 bits with 8-bit codes and 4.5 bits with 4-bit codes.

    Attributes:
        codes: by `<layer>.left` and `<layer>.right`: int8 (blocks, 32, r), or uint8 (blocks, 16, r) with two numbers
            per byte, the first in the low half, each plus 8.
        scales: float16 (blocks, r) under the same names.
        bits: 8 or 4.
        state_size: d_r; the last block is padded with zeros.
        loss: ||U V^T - N||_F / ||N||_F by layer, where N is norm(S) before quantisation.
        base_fingerprint: as in `CompactAdapter`.
        generator_fingerprint: as in `CompactAdapter`.
        tokens_seen: as in `CompactAdapter`.
    """

    codes: dict[str, Tensor]
    scales: dict[str, Tensor]
    bits: int
    state_size: int
    loss: dict[str, float]
    base_fingerprint: str
    generator_fingerprint: str
    tokens_seen: int = 0

    @classmethod
    def quantize(cls, compact: CompactAdapter, bits: int = 8) -> QuantizedCompactAdapter:
        """Quantise a compact adapter and measure the error.

        Raises:
            InputError: bits is not 8 or 4, or a number of the adapter is not finite.
        """
        if bits not in BITS:
            raise InputError(f"bits must be 8 or 4, but it is {bits}")
        factors = {f"{name}.left": factor for name, factor in compact.left.items()}
        factors |= {f"{name}.right": factor for name, factor in compact.right.items()}
        for name, factor in factors.items():
            if not factor.isfinite().all():
                raise InputError(f"{name} of the compact adapter has numbers that are not finite")
        pairs = {name: _quantize(factor, bits) for name, factor in factors.items()}
        quantized = cls(
            codes={name: pair[0] for name, pair in pairs.items()},
            scales={name: pair[1] for name, pair in pairs.items()},
            bits=bits,
            state_size=len(next(iter(factors.values()))),
            loss={},
            base_fingerprint=compact.base_fingerprint,
            generator_fingerprint=compact.generator_fingerprint,
            tokens_seen=compact.tokens_seen,
        )
        after = quantized.dequantize()
        for name in compact.left:
            before = (compact.left[name], compact.right[name])
            quantized.loss[name] = _distance(before, (after.left[name], after.right[name]))
        return quantized

    def dequantize(self) -> CompactAdapter:
        """The compact adapter with the quantised numbers, in float32."""
        factors = {
            name: _dequantize(codes, self.scales[name], self.bits)[: self.state_size]
            for name, codes in self.codes.items()
        }
        left, right = (
            {name.removesuffix(side): factor for name, factor in factors.items() if name.endswith(side)}
            for side in (".left", ".right")
        )
        return CompactAdapter(left, right, self.base_fingerprint, self.generator_fingerprint, self.tokens_seen)

    @property
    def nbytes(self) -> int:
        """Memory of the codes and scales in bytes."""
        return sum(tensor.nbytes for tensor in [*self.codes.values(), *self.scales.values()])

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; `load` reads it.

        Raises:
            InputError: `path` is a folder.
            OSError: it could not be written; an existing file of that name is unchanged.
        """
        tensors = {f"{name}.codes": codes for name, codes in self.codes.items()}
        tensors |= {f"{name}.scales": scales for name, scales in self.scales.items()}
        names = ("bits", "state_size", "loss", "base_fingerprint", "generator_fingerprint", "tokens_seen")
        write_tensors(Path(path), "quantized", tensors, {name: getattr(self, name) for name in names})

    @classmethod
    def load(cls, path: str | Path) -> QuantizedCompactAdapter:
        """Read what `save` wrote.

        Raises:
            InputError: there is no such file.
            FormatError: it is damaged or not a quantised compact adapter.
        """
        path = Path(path)
        tensors, description = read_tensors(path, "quantized")
        codes, scales = by_suffix(path, tensors, ".codes", ".scales")
        bits, state_size, tokens = (
            count_entry(path, description, name) for name in ("bits", "state_size", "tokens_seen")
        )
        if not _fit(codes, scales, bits, state_size):
            raise FormatError(f"{path} is damaged: it must hold codes and scales of one size for each of its layers")
        base, generator = (entry(path, description, f"{what}_fingerprint", str) for what in ("base", "generator"))
        loss = _read_loss(path, description, codes)
        return cls(codes, scales, bits, state_size, loss, base, generator, tokens)


def _quantize(factor: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix (d_r, r)."""
    highest = 2 ** (bits - 1) - 1
    padded = F.pad(factor.float(), (0, 0, 0, -len(factor) % BLOCK))
    blocks = padded.unflatten(0, (-1, BLOCK))
    largest = blocks.abs().amax(dim=1, keepdim=True)
    candidates = [(largest * shrink / highest).half() for shrink in _SHRINK]
    errors = torch.stack(
        [(_round(blocks, scale, highest) * scale.float() - blocks).square().sum(1) for scale in candidates]
    )
    best = errors.argmin(0, keepdim=True)
    scale = torch.stack(candidates).squeeze(2).gather(0, best)[0]
    codes = _round(blocks, scale[:, None], highest).to(torch.int8)
    return (codes if bits == 8 else _pack(codes)), scale


def _round(blocks: Tensor, scale: Tensor, highest: int) -> Tensor:
    steps = torch.where(scale == 0, 0.0, blocks / torch.where(scale == 0, 1.0, scale.float()))
    return steps.round().clamp(-highest, highest)


def _dequantize(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The matrix (blocks 32, r) in float32."""
    numbers = codes if bits == 8 else _unpack(codes)
    return (numbers.float() * scales[:, None].float()).flatten(0, 1)


def _pack(codes: Tensor) -> Tensor:
    """Pack two numbers per byte: int8 (blocks, 32, r) in -7..7 to uint8 (blocks, 16, r)."""
    low, high = (codes + 8).to(torch.uint8).unflatten(1, (-1, 2)).unbind(2)
    return low | (high << 4)


def _unpack(codes: Tensor) -> Tensor:
    return torch.stack([codes & 15, codes >> 4], dim=2).flatten(1, 2).to(torch.int8) - 8


def _distance(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> float:
    """||U' V'^T - U V^T||_F / ||U V^T||_F; 0 if both are zero."""
    old, new = (left.double() @ right.double().mT for left, right in (before, after))
    size = float(old.norm())
    return float((new - old).norm()) / size if size else 0.0


def _fit(codes: dict[str, Tensor], scales: dict[str, Tensor], bits: int, state_size: int) -> bool:
    """Whether codes and scales have the dtypes and shapes of matrices of one size, left and right for each layer."""
    layers = {name.rpartition(".")[0] for name in codes}
    if not layers or set(codes) != {f"{layer}.{side}" for layer in layers for side in ("left", "right")}:
        return False
    if bits not in BITS or set(scales) != set(codes) or {tensor.dim() for tensor in scales.values()} != {2}:
        return False
    blocks, rank = next(iter(scales.values())).shape
    kind, rows = (torch.int8, BLOCK) if bits == 8 else (torch.uint8, BLOCK // 2)
    return (
        (blocks - 1) * BLOCK < state_size <= blocks * BLOCK
        and all(tensor.dtype == kind and tensor.shape == (blocks, rows, rank) for tensor in codes.values())
        and all(tensor.dtype == torch.float16 and tensor.shape == (blocks, rank) for tensor in scales.values())
    )


def _read_loss(path: Path, description: dict[str, Any], codes: dict[str, Tensor]) -> dict[str, float]:
    loss = entry(path, description, "loss", dict)
    layers = {name.rpartition(".")[0] for name in codes}
    if set(loss) != layers:
        raise FormatError(f"{path} is damaged: its entry 'loss' must have one number for each layer")
    return {name: float(entry(path, loss, name, float)) for name in loss}
