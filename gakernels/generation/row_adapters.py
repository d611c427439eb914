"""RowAdapters: the compact adapters of the rows of a batch, stacked so that one product per layer serves all rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gakernels.adapters.compact import CompactAdapter
from gakernels.errors import FormatError
from gakernels.model import GenerativeAdapter
from gakernels.nn import CompactFactors


class SharedMaps:
    """What all compact adapters of a generator share: A1 and B2 of each adapted layer, in the base model's dtype, and
    the static term where the generator has one (`AdapterGenerator.shared_maps`).

    Args:
        model: its generators must not change while these maps are in use.
    """

    def __init__(self, model: GenerativeAdapter) -> None:
        self.model = model
        self.base_fingerprint, self.generator_fingerprint = model.base_fingerprint(), model.generator_fingerprint()
        self.maps: dict[str, tuple[Tensor, Tensor]] = {}
        for name in model.adapted_names:
            device, generator = model.base.get_submodule(name).device, model.generator(name)
            output_map, input_map = (shared.detach().to(device, model.base.dtype) for shared in generator.shared_maps())
            self.maps[name] = output_map, input_map

    def check(self, adapter: CompactAdapter) -> None:
        """Raises: FormatError: the adapter belongs to another base model or generator."""
        found = adapter.base_fingerprint, adapter.generator_fingerprint
        own = self.base_fingerprint, self.generator_fingerprint
        if found != own:
            raise FormatError(
                f"the compact adapter must be of the base model and generator with fingerprints {own}, but has {found}"
            )


@dataclass(frozen=True)
class RowAdapters:
    """U and V of every row, zero for a row without an adapter.

    Attributes:
        shared: A1 and B2.
        left: U (rows, d_r, r) by adapted layer; beside a static term of rank k (rows, d_r + k, r + k), with the
            identity in the last block.
        right: V, the same.
    """

    shared: SharedMaps
    left: dict[str, Tensor]
    right: dict[str, Tensor]

    @classmethod
    def of(cls, shared: SharedMaps, adapters: Sequence[CompactAdapter | None]) -> RowAdapters:
        """The stacked adapters of so many rows. Raises: FormatError: see `SharedMaps.check`."""
        for adapter in adapters:
            if adapter is not None:
                shared.check(adapter)
        size, rank, static = (getattr(shared.model.config, name) for name in ("state_size", "rank", "static_rank"))
        left: dict[str, Tensor] = {}
        right: dict[str, Tensor] = {}
        for name, (output_map, _) in shared.maps.items():
            left[name] = output_map.new_zeros(len(adapters), size + static, rank + static)
            right[name] = torch.zeros_like(left[name])
            for row, adapter in enumerate(adapters):
                if adapter is not None:
                    for side, factor in (
                        (left[name][row], adapter.left[name]),
                        (right[name][row], adapter.right[name]),
                    ):
                        side[:size, :rank].copy_(factor, non_blocking=True)
                        side[size:, rank:].fill_diagonal_(1)
        return cls(shared, left, right)

    def factors(self) -> dict[str, CompactFactors]:
        """For `GenerativeAdapter.using`, by adapted layer."""
        scale = self.shared.model.config.adapter_scale
        return {
            name: CompactFactors(*maps, self.left[name], self.right[name], scale)
            for name, maps in self.shared.maps.items()
        }

    def exchanged(self, kept: Sequence[int], joining: RowAdapters) -> RowAdapters:
        """The adapters of the kept rows, in this order, then those of the joining ones."""
        left, right = (
            {name: torch.cat([mine[name][list(kept)], theirs[name]]) for name in mine}
            for mine, theirs in ((self.left, joining.left), (self.right, joining.right))
        )
        return RowAdapters(self.shared, left, right)

    @property
    def nbytes(self) -> int:
        """Memory of U and V in bytes: rows times the size of a compact adapter."""
        return sum(factor.numel() * factor.element_size() for factor in [*self.left.values(), *self.right.values()])
