"""DecodingBatch: rows with adapters of their own that are decoded together, and come and go between steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache

from gakernels.adapters.compact import CompactAdapter
from gakernels.errors import InputError
from gakernels.generation import key_values
from gakernels.generation.row_adapters import RowAdapters, SharedMaps
from gakernels.model import GenerativeAdapter
from gakernels.model.attachment import cache_name
from gakernels.model.windows import pad_left

_RECURRENT = ("linear_attention", "mamba", "recurrent", "conv")


class DecodingBatch:
    """The rows that are being continued: their adapters, their key-value cache and how long each of them is.

    Args:
        model: not to be changed while this is in use. Its tokens are computed in the base model's dtype.

    Raises:
        InputError: the base model keeps a recurrent state, which can't be padded.
    """

    def __init__(self, model: GenerativeAdapter) -> None:
        check_attention(model)
        self.model = model
        self.shared = SharedMaps(model)
        self.lengths: list[int] = []
        self._clear()

    def _clear(self) -> None:
        self.lengths = []
        self.adapters = RowAdapters.of(self.shared, [])
        self._has_adapter: list[bool] = []
        self._cache = key_values.new_cache()

    @torch.inference_mode()
    def exchange(
        self,
        kept: Sequence[int],
        prompts: Sequence[Sequence[int]] = (),
        adapters: Sequence[CompactAdapter | None] = (),
    ) -> Tensor:
        """Keep some rows, in this order, and let new ones join behind them.

        The prompts are read together, padded on the left; each row sees its own tokens and its own adapter only.

        Args:
            kept: numbers of the rows that stay.
            prompts: token ids of the new rows.
            adapters: of the new rows; None for the base model alone.

        Returns:
            Logits (new rows, vocabulary) behind the prompts.

        Raises:
            InputError: there is not one adapter entry for each prompt, or a prompt is empty.
            FormatError: an adapter belongs to another base model or generator.
        """
        if len(prompts) != len(adapters) or not all(prompts):
            raise InputError(f"prompts must be {len(adapters)} prompts, one for each adapter, each of at least 1 token")
        if not prompts:
            self._keep(kept)
            return torch.empty(0, self.model.base.config.get_text_config().vocab_size, device=self.model.device)
        joining = RowAdapters.of(self.shared, adapters)
        has_adapter = [adapter is not None for adapter in adapters]
        ids, mask = (tensor.to(self.model.device) for tensor in pad_left(prompts, 0))
        cache = key_values.new_cache()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = self._forward(ids, mask, positions, cache, joining, any(has_adapter))
        lengths = [len(prompt) for prompt in prompts]
        if not kept:
            self.adapters, self._cache, self.lengths, self._has_adapter = joining, cache, lengths, has_adapter
            return logits
        self.lengths = [self.lengths[row] for row in kept] + lengths
        parts = [(self._cache, kept), (cache, range(len(prompts)))]
        self._cache = key_values.gathered(parts, max(self.lengths))
        self.adapters = self.adapters.exchanged(kept, joining)
        self._has_adapter = [self._has_adapter[row] for row in kept] + has_adapter
        return logits

    def _keep(self, kept: Sequence[int]) -> None:
        if not kept:
            self._clear()
        elif list(kept) != list(range(len(self.lengths))):
            self.lengths = [self.lengths[row] for row in kept]
            self._cache = key_values.gathered([(self._cache, kept)], max(self.lengths))
            self.adapters = self.adapters.exchanged(kept, RowAdapters.of(self.shared, []))
            self._has_adapter = [self._has_adapter[row] for row in kept]

    @torch.inference_mode()
    def advance(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each row.

        Returns:
            Logits (rows, vocabulary) behind them.

        Raises:
            InputError: there is not one token for each row.
        """
        if len(tokens) != len(self.lengths) or not tokens:
            raise InputError(
                f"tokens must be one for each of the {len(self.lengths)} rows, but there are {len(tokens)}"
            )
        device = self.model.device
        positions = torch.tensor(self.lengths, device=device)[:, None]
        columns = self._cache.get_seq_length() + 1
        mask = torch.arange(columns, device=device) >= columns - 1 - positions
        ids = torch.tensor(tokens, device=device)[:, None]
        logits = self._forward(ids, mask, positions, self._cache, self.adapters, any(self._has_adapter))
        self.lengths = [length + 1 for length in self.lengths]
        return logits

    def _forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache, adapters: RowAdapters, adapted: bool
    ) -> Tensor:
        """Logits (rows, vocabulary) behind the last column."""
        decoder = self.model.base.get_decoder()
        past = {cache_name(decoder): cache, "use_cache": True}
        with self.model.using(adapters.factors() if adapted else {}):
            output = decoder(input_ids=ids, attention_mask=mask, position_ids=positions, **past)
        return self.model.logits(output.last_hidden_state[:, -1])


def check_attention(model: GenerativeAdapter) -> None:
    """Raises: InputError: the base model keeps a recurrent state, so that rows of a batch can't be padded."""
    layer_types = getattr(model.base.config.get_text_config(), "layer_types", None) or ()
    unfit = [kind for kind in layer_types if any(name in kind for name in _RECURRENT)]
    if unfit:
        raise InputError(f"the base model must have attention in every layer, but it has {unfit[0]!r}")
