"""The adapters of the rows of a batch, stacked so that one product per layer serves all rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from gakernels.adapters.adapter import Adapter, stack
from gakernels.adapters.compact import CompactAdapter
from gakernels.errors import FormatError
from gakernels.model import GenerativeAdapter
from gakernels.nn import CompactFactors, LowRankFactors

OneAdapter = CompactAdapter | Adapter | None


class StackedAdapters(Protocol):
    """The adapters of some rows."""

    def factors(self) -> Mapping[str, LowRankFactors | CompactFactors]:
        """For `GenerativeAdapter.using`, by adapted layer; empty if no row has an adapter."""

    def exchanged(self, kept: Sequence[int], joining: Any) -> Any:
        """The adapters of the kept rows, in this order, then those of the new ones."""


class AdapterForm(Protocol):
    """One form of adapters, and how to stack it."""

    def check(self, adapter: Any) -> None:
        """Raises: FormatError: the adapter belongs to another base model or generator."""

    def stacked(self, adapters: Sequence[Any]) -> StackedAdapters:
        """The adapters of as many rows; None stands for a row without one."""


class SharedMaps:
    """What all compact adapters of a generator share: A1 and B2 of each adapted layer, in the base model's dtype, and
    the static term if the generator has one (`AdapterGenerator.shared_maps`).

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

    def stacked(self, adapters: Sequence[CompactAdapter | None]) -> RowAdapters:
        """The adapters of as many rows. Raises: FormatError: see `check`."""
        return RowAdapters.of(self, adapters)


@dataclass(frozen=True)
class RowAdapters:
    """U and V of every row, zero for a row without an adapter.

    Attributes:
        shared: A1 and B2.
        left: U (rows, d_r, r) by adapted layer; with a static term of rank k (rows, d_r + k, r + k), with the
            identity in the last block.
        right: V, the same.
        adapted: which rows have an adapter.
    """

    shared: SharedMaps
    left: dict[str, Tensor]
    right: dict[str, Tensor]
    adapted: tuple[bool, ...]

    @classmethod
    def of(cls, shared: SharedMaps, adapters: Sequence[CompactAdapter | None]) -> RowAdapters:
        """The stacked adapters of as many rows. Raises: FormatError: see `SharedMaps.check`."""
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
        return cls(shared, left, right, tuple(adapter is not None for adapter in adapters))

    def factors(self) -> dict[str, CompactFactors]:
        """For `GenerativeAdapter.using`, by adapted layer; empty if no row has an adapter."""
        if not any(self.adapted):
            return {}
        scale = self.shared.model.config.adapter_scale
        return {
            name: CompactFactors(*maps, self.left[name], self.right[name], scale)
            for name, maps in self.shared.maps.items()
        }

    def exchanged(self, kept: Sequence[int], joining: RowAdapters) -> RowAdapters:
        """The adapters of the kept rows, in this order, then those of the new ones."""
        index = torch.tensor(kept, dtype=torch.int64)
        left, right = (
            {name: torch.cat([mine[name][index.to(mine[name].device)], theirs[name]]) for name in mine}
            for mine, theirs in ((self.left, joining.left), (self.right, joining.right))
        )
        return RowAdapters(self.shared, left, right, (*(self.adapted[row] for row in kept), *joining.adapted))


@dataclass(frozen=True)
class ExpandedAdapters:
    """Expanded adapters, each stacked once however many rows use it.

    Attributes:
        model: their base model.
        adapters: the adapters that some row uses or used.
        layers: their lora_A and lora_B by adapted layer, in the dtype of the base model.
        rows: number of each row's adapter, -1 for none.
    """

    model: GenerativeAdapter
    adapters: tuple[Adapter, ...]
    layers: dict[str, tuple[Tensor, Tensor]]
    rows: tuple[int, ...]

    @classmethod
    def of(cls, model: GenerativeAdapter, adapters: Sequence[Adapter | None]) -> ExpandedAdapters:
        """The adapters of as many rows. Raises: InputError: they differ in scale or rank."""
        different = list({id(adapter): adapter for adapter in adapters if adapter is not None}.values())
        numbers = {id(adapter): number for number, adapter in enumerate(different)}
        layers = {}
        for name in model.adapted_names if different else ():
            linear = model.base.get_submodule(name)
            lora_a, lora_b = (factor.to(linear.device, linear.weight.dtype) for factor in stack(different, name))
            layers[name] = lora_a, lora_b
        return cls(model, tuple(different), layers, tuple(numbers.get(id(adapter), -1) for adapter in adapters))

    def factors(self) -> dict[str, LowRankFactors]:
        """For `GenerativeAdapter.using`, by adapted layer; empty if no row has an adapter."""
        index = torch.tensor(self.rows, device=self.model.device)
        return {name: LowRankFactors(*pair, self.adapters[0].scale, index) for name, pair in self.layers.items()}

    def exchanged(self, kept: Sequence[int], joining: ExpandedAdapters) -> ExpandedAdapters:
        """The adapters of the kept rows, in this order, then those of the new ones."""
        rows = tuple(self.rows[row] for row in kept)
        if not joining.rows:
            return replace(self, rows=rows)
        mine = [None if number < 0 else self.adapters[number] for number in rows]
        theirs = [None if number < 0 else joining.adapters[number] for number in joining.rows]
        return ExpandedAdapters.of(self.model, [*mine, *theirs])


@dataclass(frozen=True)
class ExpandedForm:
    """Expanded adapters of any origin, as long as they have the same scale and rank."""

    model: GenerativeAdapter

    def check(self, adapter: Adapter) -> None:
        """Accepts everything: there are no shared maps to belong to."""

    def stacked(self, adapters: Sequence[Adapter | None]) -> ExpandedAdapters:
        """The adapters of as many rows. Raises: InputError: they differ in scale or rank."""
        return ExpandedAdapters.of(self.model, adapters)
