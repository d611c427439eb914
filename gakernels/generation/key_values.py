"""The key-value cache of a batch whose rows come and go.

All rows end at the same column: a row of n tokens has them in the last n columns, and a step adds one column for all.
So a step needs one mask of left padding, whatever the rows' lengths, and a new row can join at any time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

ROOM = 64  # least number of columns set aside for the tokens to come


class GrowingLayer(DynamicLayer):
    """Keys and values (rows, heads, columns, d) with room behind them, so that a step writes and does not copy."""

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append columns; returns all of them."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self._buffers is None:
            self.hold(key_states, value_states)
        elif end > self._buffers[0].shape[-2]:
            keys, values = self.columns()
            self.hold(torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2))
        else:
            for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
                buffer[..., start:end, :] = new
            self.keys, self.values = (buffer[..., :end, :] for buffer in self._buffers)
        return self.columns()

    def columns(self) -> tuple[Tensor, Tensor]:
        """All keys and values."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Take these columns in place of what was there."""
        self._buffers = _with_room(keys), _with_room(values)
        self.keys, self.values = (buffer[..., : keys.shape[-2], :] for buffer in self._buffers)
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True


def new_cache() -> Cache:
    """An empty cache; the model makes its layers."""
    return Cache(layer_class_to_replicate=GrowingLayer)


def gathered(parts: Sequence[tuple[Cache, Sequence[int]]], columns: int) -> Cache:
    """A cache of the given rows of several, all ending at column `columns`, in the order of the parts."""
    result, chosen = new_cache(), [torch.tensor(list(rows)) for _, rows in parts]
    for layers in zip(*(cache.layers for cache, _ in parts), strict=True):
        layer = GrowingLayer()
        held = [part.columns() for part in layers if isinstance(part, GrowingLayer) and part.is_initialized]
        if held:  # a layer that uses the keys and values of another one holds none
            chosen = [rows.to(held[0][0].device) for rows in chosen]  # once for all layers of a device
            keys, values = (
                torch.cat([_ending_at(pair[side], rows, columns) for pair, rows in zip(held, chosen, strict=True)])
                for side in (0, 1)
            )
            layer.hold(keys, values)
        result.layers.append(layer)
    return result


def pad_on_the_left(cache: Cache, mask: Tensor) -> None:
    """Move the columns that a row sees to its end, in their order, and the padding in front of them.

    Args:
        cache: of some rows.
        mask: (rows, columns), 0 for padding.
    """
    order = mask.argsort(dim=1, stable=True)[:, None, :, None]
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer) and layer.is_initialized:
            layer.hold(*(part.gather(2, order.to(part.device).expand_as(part)) for part in layer.columns()))


def _ending_at(tensor: Tensor, rows: Tensor, columns: int) -> Tensor:
    """The last columns of some rows, or zeros in front of them: no row looks at padding, but it must be finite."""
    chosen = tensor[:, :, -columns:].index_select(0, rows)
    return F.pad(chosen, (0, 0, columns - chosen.shape[-2], 0))


def _with_room(tensor: Tensor) -> Tensor:
    columns = tensor.shape[-2]
    buffer = tensor.new_empty(*tensor.shape[:-2], columns + max(ROOM, columns // 2), tensor.shape[-1])
    buffer[..., :columns, :] = tensor
    return buffer
