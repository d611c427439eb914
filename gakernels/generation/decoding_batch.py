"""Rows with their own adapters, decoded together; they join and leave between steps. And their cache.

All rows end at the same column: a row of n tokens fills the last n columns, and a step adds one column for all.
So one mask of left padding suffices for a step, whatever the rows' lengths, and a new row can join at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from gakernels.errors import InputError
from gakernels.generation.row_adapters import AdapterForm, OneAdapter, SharedMaps
from gakernels.model import GenerativeAdapter
from gakernels.model.attachment import cache_name
from gakernels.model.windows import pad_left
from gakernels.nn import CompactFactors, LowRankFactors

ROOM = 64  # least number of columns set aside for the tokens to come
_RECURRENT = ("linear_attention", "mamba", "recurrent", "conv")


@dataclass(frozen=True)
class SharedStart:
    """The first tokens, which some rows have in common, with their keys and values: read once for all of them."""

    ids: tuple[int, ...]
    cache: Cache

    @property
    def tokens(self) -> int:
        """How many there are."""
        return len(self.ids)

    def bytes(self) -> int:
        """The size of the keys and values."""
        return sum(part.nbytes for layer in self.cache.layers for part in _columns(layer))

    def first(self, tokens: int) -> SharedStart:
        """The first of these tokens."""
        return SharedStart(self.ids[:tokens], _mapped(self.cache, lambda part: part[..., :tokens, :]))

    def of_rows(self, count: int) -> Cache:
        """A copy of the keys and values for so many rows, which the rows may extend."""
        return gathered([(self.cache, [0] * count)], self.tokens)


class DecodingBatch:
    """The rows that are being continued: their adapters, their key-value cache and their lengths.

    Args:
        model: must not change while this is in use. Computes in the base model's dtype.
        form: form of the rows' adapters; by default compact adapters of this model.
        start: what all prompts begin with, if it has been read already.

    Raises:
        InputError: the base model keeps a recurrent state, which can't be padded.
    """

    def __init__(
        self, model: GenerativeAdapter, form: AdapterForm | None = None, start: SharedStart | None = None
    ) -> None:
        check_attention(model)
        self.model, self._start = model, start
        self.form: AdapterForm = form or SharedMaps(model)
        self._takes_ready_masks = _takes_ready_masks(model)
        self._clear()

    def _clear(self) -> None:
        self.lengths: list[int] = []
        self.adapters = self.form.stacked([])
        self._factors = self.adapters.factors()
        self._cache = new_cache()
        self._first = torch.empty(0, dtype=torch.int64, device=self.model.device)  # column of each row's first token

    @torch.inference_mode()
    def exchange(
        self,
        kept: Sequence[int],
        prompts: Sequence[Sequence[int]] = (),
        adapters: Sequence[OneAdapter] = (),
        on_hidden: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Keep some rows, in this order, and append new ones.

        The prompts are read together, padded on the left; each row sees only its own tokens and its own adapter.

        Args:
            kept: numbers of the rows that stay.
            prompts: token ids of the new rows.
            adapters: of the new rows; None for the base model alone.
            on_hidden: is given the last hidden states (new rows, columns, d_h) of the prompts, which end at the last
                column.

        Returns:
            Logits (new rows, vocabulary) after the prompts.

        Raises:
            InputError: the numbers of adapters and prompts differ, or a prompt is empty.
            FormatError: an adapter belongs to another base model or generator.
        """
        if len(prompts) != len(adapters) or not all(prompts):
            raise InputError(f"prompts must be {len(adapters)} prompts, one for each adapter, each of at least 1 token")
        vocabulary = self.model.base.config.get_text_config().vocab_size
        logits = torch.empty(0, vocabulary, device=self.model.device)
        parts = [(self._cache, kept)] if kept else []
        joining = self.form.stacked(adapters)
        if prompts:
            hidden, cache = self._read(prompts, joining.factors())
            logits = self.model.logits(hidden[:, -1])
            if on_hidden is not None:
                on_hidden(hidden)
            parts.append((cache, range(len(prompts))))
        if not parts:
            self._clear()
        elif prompts or list(kept) != list(range(len(self.lengths))):
            self.lengths = [*(self.lengths[row] for row in kept), *map(len, prompts)]
            columns = max(self.lengths)
            self._cache = gathered(parts, columns) if kept else cache
            self.adapters = self.adapters.exchanged(kept, joining) if kept else joining
            self._factors = self.adapters.factors()
            self._first = torch.tensor([columns - length for length in self.lengths], device=self.model.device)
        return logits

    def _read(
        self, prompts: Sequence[Sequence[int]], factors: Mapping[str, LowRankFactors | CompactFactors]
    ) -> tuple[Tensor, Cache]:
        """Last hidden states of the prompts, and a cache in which they all end at the same column."""
        known = 0 if self._start is None else self._start.tokens
        cache = new_cache() if self._start is None else self._start.of_rows(len(prompts))
        ids, mask = (tensor.to(self.model.device) for tensor in pad_left([prompt[known:] for prompt in prompts], 0))
        mask = torch.cat([mask.new_ones(len(prompts), known), mask], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, known:]
        hidden = self._forward(ids, mask, positions, cache, factors)
        if known:
            pad_on_the_left(cache, mask)
        return hidden, cache

    @torch.inference_mode()
    def advance(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Append one token to each row. Never waits for the device; the tokens may be on it.

        Returns:
            Logits (rows, vocabulary) after them.

        Raises:
            InputError: the number of tokens is not the number of rows.
        """
        if len(tokens) != len(self.lengths) or not self.lengths:
            raise InputError(
                f"tokens must be one for each of the {len(self.lengths)} rows, but there are {len(tokens)}"
            )
        ids = torch.as_tensor(tokens, device=self.model.device)[:, None]
        last = max(self.lengths)  # the new column
        hidden = self._forward(ids, self._mask(last + 1), last - self._first[:, None], self._cache, self._factors)
        self.lengths = [length + 1 for length in self.lengths]
        return self.model.logits(hidden[:, -1])

    def _mask(self, columns: int) -> Tensor | None:
        """Which of the columns each row sees; None for all.

        transformers uses a mask of four dimensions as it is. For one of two dimensions it asks the device whether
        there is any padding, and waits for the answer.
        """
        if min(self.lengths) == max(self.lengths):
            return None
        seen = torch.arange(columns, device=self.model.device) >= self._first[:, None]
        if not self._takes_ready_masks:
            return seen
        dtype = self.model.base.dtype
        added = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return added.masked_fill_(~seen, torch.finfo(dtype).min)[:, None, None]

    def _forward(
        self,
        ids: Tensor,
        mask: Tensor | None,
        positions: Tensor,
        cache: Cache,
        factors: Mapping[str, LowRankFactors | CompactFactors],
    ) -> Tensor:
        """Last hidden states (rows, columns, d_h)."""
        decoder = self.model.decoder
        with self.model.using(factors):
            output = decoder(input_ids=ids, attention_mask=mask, position_ids=positions, **past(decoder, cache))
        hidden: Tensor = output.last_hidden_state
        return hidden


def past(decoder: Any, cache: Cache) -> dict[str, Any]:
    """The arguments with which a decoder continues from a cache."""
    return {cache_name(decoder): cache, "use_cache": True}


def check_attention(model: GenerativeAdapter) -> None:
    """Raises: InputError: the base model keeps a recurrent state, so that rows of a batch can't be padded."""
    layer_types = getattr(model.base.config.get_text_config(), "layer_types", None) or ()
    unfit = [kind for kind in layer_types if any(name in kind for name in _RECURRENT)]
    if unfit:
        raise InputError(f"the base model must have attention in every layer, but it has {unfit[0]!r}")


def _takes_ready_masks(model: GenerativeAdapter) -> bool:
    """Whether one mask of four dimensions serves every layer: transformers' own code, no windows and no ALiBi."""
    settings = model.base.config.get_text_config()
    own_code = type(model.base).__module__.startswith("transformers.") and settings._attn_implementation == "sdpa"
    same_for_all = set(getattr(settings, "layer_types", None) or ()) <= {"full_attention"}
    windows = getattr(settings, "sliding_window", None) is not None or getattr(settings, "alibi", False)
    return own_code and same_for_all and not windows


# The key-value cache


class GrowingLayer(DynamicLayer):
    """Keys and values (rows, heads, columns, d) with spare room after them, so that a step writes without copying."""

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
        """Replace the contents by these columns."""
        self._buffers = _with_room(keys), _with_room(values)
        self.keys, self.values = (buffer[..., : keys.shape[-2], :] for buffer in self._buffers)
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True


def new_cache() -> Cache:
    """An empty cache; the model creates its layers."""
    return Cache(layer_class_to_replicate=GrowingLayer)


def gathered(parts: Sequence[tuple[Cache, Sequence[int]]], columns: int) -> Cache:
    """A cache of rows taken from several caches, all ending at column `columns`, in the order of the parts."""
    result, chosen = new_cache(), [torch.tensor(list(rows)) for _, rows in parts]
    for layers in zip(*(cache.layers for cache, _ in parts), strict=True):
        layer = GrowingLayer()
        held = [part.columns() for part in layers if isinstance(part, GrowingLayer) and part.is_initialized]
        if held:  # a layer that uses another layer's keys and values holds none
            chosen = [rows.to(held[0][0].device) for rows in chosen]  # once for all layers of a device
            keys, values = (
                torch.cat([_ending_at(pair[side], rows, columns) for pair, rows in zip(held, chosen, strict=True)])
                for side in (0, 1)
            )
            layer.hold(keys, values)
        result.layers.append(layer)
    return result


def _columns(layer: object) -> tuple[Tensor, ...]:
    """The keys and values of a layer; none of one that uses another layer's."""
    return layer.columns() if isinstance(layer, GrowingLayer) and layer.is_initialized else ()


def _mapped(cache: Cache, change: Callable[[Tensor], Tensor]) -> Cache:
    """A cache with changed keys and values."""
    result = new_cache()
    for layer in cache.layers:
        changed = GrowingLayer()
        if columns := _columns(layer):
            changed.hold(*map(change, columns))
        result.layers.append(changed)
    return result


def pad_on_the_left(cache: Cache, mask: Tensor) -> None:
    """Move the columns that a row sees to its end, in order, and the padding before them.

    Args:
        cache: of some rows.
        mask: (rows, columns), 0 for padding.
    """
    order = mask.argsort(dim=1, stable=True)[:, None, :, None]
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer) and layer.is_initialized:
            layer.hold(*(part.gather(2, order.to(part.device).expand_as(part)) for part in layer.columns()))


def _ending_at(tensor: Tensor, rows: Tensor, columns: int) -> Tensor:
    """The last columns of some rows, preceded by zeros if there are too few: padding is not seen but must be finite."""
    chosen = tensor[:, :, -columns:].index_select(0, rows)
    return F.pad(chosen, (0, 0, columns - chosen.shape[-2], 0))


def _with_room(tensor: Tensor) -> Tensor:
    columns = tensor.shape[-2]
    buffer = tensor.new_empty(*tensor.shape[:-2], columns + max(ROOM, columns // 2), tensor.shape[-1])
    buffer[..., :columns, :] = tensor
    return buffer
