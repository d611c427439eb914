"""CompactAdapter: the part of an adapter that depends on the context; the rest stays in the generator."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gakernels.errors import FormatError
from gakernels.files import by_suffix, count_entry, entry, read_tensors, write_tensors


@dataclass(frozen=True)
class CompactAdapter:
    """The factors norm(S) = U V^T of every adapted layer, without A1 and B2, which all contexts share (section 2.2).

    For d_r = 1024, r = 128 and 32 adapted layers these are 8.4 million numbers; the adapter itself has 33.5 million.

    Attributes:
        left: U (d_r, r) by name of the adapted layer in the base model.
        right: V (d_r, r) under the same names.
        base_fingerprint: fingerprint of the base model it was made for.
        generator_fingerprint: fingerprint of the generator that made it; only that one can expand it
            (`GenerativeAdapter.expand`).
        tokens_seen: number of context tokens it was generated from.
    """

    left: dict[str, Tensor]
    right: dict[str, Tensor]
    base_fingerprint: str
    generator_fingerprint: str
    tokens_seen: int = 0

    @property
    def rank(self) -> int:
        """r, the same for every layer."""
        return next(iter(self.left.values())).shape[1]

    @property
    def nbytes(self) -> int:
        """Memory of U and V in bytes."""
        return sum(factor.nbytes for factor in [*self.left.values(), *self.right.values()])

    def numbers(self) -> int:
        """How many numbers U and V hold."""
        return sum(factor.numel() for factor in [*self.left.values(), *self.right.values()])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> CompactAdapter:
        """The same on another device or in another dtype."""
        left, right = (
            {name: factor.to(device=device, dtype=dtype) for name, factor in factors.items()}
            for factors in (self.left, self.right)
        )
        return replace(self, left=left, right=right)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; `load` reads it.

        Raises:
            InputError: `path` is a folder.
            OSError: it could not be written; an existing file of that name is unchanged.
        """
        tensors = {f"{name}.left": factor for name, factor in self.left.items()}
        tensors |= {f"{name}.right": factor for name, factor in self.right.items()}
        write_tensors(Path(path), "compact", tensors, self._description())

    @classmethod
    def load(cls, path: str | Path) -> CompactAdapter:
        """Read what `save` wrote.

        Raises:
            InputError: there is no such file.
            FormatError: it is damaged or not a compact adapter.
        """
        path = Path(path)
        tensors, description = read_tensors(path, "compact", copied=True)
        left, right = by_suffix(path, tensors, ".left", ".right")
        if not _fit(left, right):
            raise FormatError(f"{path} is damaged: it must hold U and V of one size for each of its layers")
        base, generator = (entry(path, description, f"{what}_fingerprint", str) for what in ("base", "generator"))
        return cls(left, right, base, generator, count_entry(path, description, "tokens_seen"))

    def _description(self) -> dict[str, Any]:
        names = ("base_fingerprint", "generator_fingerprint", "tokens_seen")
        return {name: getattr(self, name) for name in names}


def _fit(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether all matrices have the same shape, and left and right have the same layers."""
    factors = [*left.values(), *right.values()]
    shapes = {factor.shape for factor in factors}
    plain = all(factor.dim() == 2 and factor.is_floating_point() for factor in factors)
    return bool(left) and left.keys() == right.keys() and len(shapes) == 1 and plain
