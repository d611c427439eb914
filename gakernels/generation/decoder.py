"""Answers and losses of many rows in batches, each row with an adapter of its own (or none)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from gakernels.adapters.adapter import Adapter, stack
from gakernels.errors import InputError
from gakernels.generation import key_values
from gakernels.generation.decoding_batch import check_attention
from gakernels.generation.text_output import TextOutput
from gakernels.model import GenerativeAdapter
from gakernels.model.attachment import cache_name
from gakernels.model.encoding import encode_text, opening_tokens
from gakernels.model.positions import position_limit
from gakernels.model.windows import pad_left
from gakernels.nn import LowRankFactors

LEAST_SHARED = 64  # tokens; fewer are not worth a pass of their own


@dataclass(frozen=True)
class Row:
    """A sequence that the model reads.

    Attributes:
        tokens: token ids, at least one.
        adapter: in force while it is read; None for the model as it is.
        start: where scored tokens begin, at least 1; where the answer begins, behind the last token.
        cut: whether it is the end of a longer one, which the model could not read.
    """

    tokens: tuple[int, ...]
    adapter: Adapter | None = None
    start: int = 1
    cut: bool = False


@dataclass(frozen=True)
class SharedStart:
    """The first tokens of some rows, which are the same, and their keys and values: read once for all of them."""

    tokens: int
    cache: Cache


def plan_batches(lengths: Sequence[int], batch_tokens: int, max_rows: int) -> list[list[int]]:
    """Numbers of the rows of each batch: rows of like lengths together, the longest first.

    Args:
        lengths: of the rows, with the tokens that they will get.
        batch_tokens: bound of rows times the longest of them; a row that is longer makes a batch alone.
        max_rows: most rows in a batch.
    """
    batches: list[list[int]] = []
    longest = 0
    for number in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        full = batches and (len(batches[-1]) == max_rows or longest * (len(batches[-1]) + 1) > batch_tokens)
        if not batches or full:
            batches.append([])
            longest = lengths[number]
        batches[-1].append(number)
    return batches


class Decoder:
    """Reads batches of rows with a model.

    Args:
        model: the base model and its generators; their weights may change between two calls.

    Raises:
        InputError: the model has no tokenizer, or keeps a recurrent state.
    """

    def __init__(self, model: GenerativeAdapter) -> None:
        if model.tokenizer is None:
            raise InputError("tokenizer is needed to ask questions; the base model has none")
        check_attention(model)
        self.model, self.tokenizer = model, model.tokenizer
        self._ends = torch.tensor(model.end_tokens(), dtype=torch.int64, device=model.device)
        settings = model.base.config.get_text_config()
        self._slides = getattr(settings, "sliding_window", None) is not None
        self.limit: int | None = position_limit(settings)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, opening tokens (BOS) included."""
        return encode_text(self.tokenizer, text)

    def begin(self) -> list[int]:
        """The opening tokens alone; none where the tokenizer has none."""
        return opening_tokens(self.tokenizer)

    @torch.inference_mode()
    def shared_start(self, rows: Sequence[Row]) -> SharedStart | None:
        """Read what rows have in common at their start; None where that is little, or they differ in their adapters.

        Models with a sliding window have none: padding behind the start would take up room in the window.
        """
        first = rows[0]
        if len(rows) < 2 or self._slides or any(row.adapter is not first.adapter for row in rows):
            return None
        common = min(row.start for row in rows) - 1
        for row in rows[1:]:
            pairs = zip(first.tokens[:common], row.tokens, strict=False)
            common = next((place for place, (one, other) in enumerate(pairs) if one != other), common)
        if common < LEAST_SHARED:
            return None
        cache = key_values.new_cache()
        ids = torch.tensor([first.tokens[:common]], device=self.model.device)
        with self.model.using(self._factors([first])):
            self.model.base.get_decoder()(input_ids=ids, **self._past(cache))
        return SharedStart(common, cache)

    @torch.inference_mode()
    def generate(
        self, rows: Sequence[Row], new_tokens: int, stops: Sequence[str], shared: SharedStart | None = None
    ) -> list[str]:
        """Continue the rows of one batch greedily.

        Args:
            rows: the batch.
            new_tokens: most tokens of an answer.
            stops: texts in front of which an answer ends; special tokens may be part of them.
            shared: what `shared_start` gave for these rows and perhaps others.

        Returns:
            The answers, cut at the first stop, without space around them.
        """
        known, cache = self._known(rows, shared)
        ids, mask = (tensor.to(self.model.device) for tensor in pad_left([row.tokens[known:] for row in rows], 0))
        mask = torch.cat([mask.new_ones(len(rows), known), mask], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, known:]
        outputs, answers = [TextOutput(self.tokenizer, row.tokens, stops) for row in rows], [""] * len(rows)
        open_rows = list(range(len(rows)))
        with self.model.using(self._factors(rows)):
            for _ in range(new_tokens):
                output = self.model.base.get_decoder()(
                    input_ids=ids, attention_mask=mask, position_ids=positions, **self._past(cache)
                )
                tokens = self.model.logits(output.last_hidden_state[:, -1]).argmax(-1)
                open_rows = self._append(answers, outputs, open_rows, tokens)
                if not open_rows:
                    break
                ids, positions = tokens[:, None], positions[:, -1:] + 1
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        for row in open_rows:
            answers[row] += outputs[row].flush()[0]
        return [answer.strip() for answer in answers]

    def _append(
        self, answers: list[str], outputs: Sequence[TextOutput], open_rows: list[int], tokens: Tensor
    ) -> list[int]:
        """Add the next token to the rows that are not finished; returns those that go on."""
        values, ended = torch.stack([tokens, torch.isin(tokens, self._ends)]).tolist()
        still_open = []
        for row in open_rows:
            piece, stopped = outputs[row].flush() if ended[row] else outputs[row].push(values[row])
            answers[row] += piece
            if not ended[row] and not stopped:
                still_open.append(row)
        return still_open

    @torch.inference_mode()
    def losses(self, rows: Sequence[Row], shared: SharedStart | None = None) -> list[tuple[float, int]]:
        """Summed negative log-likelihood (nats) of the tokens of each row from `start` on, and their number.

        Args:
            rows: the batch.
            shared: as in `generate`.
        """
        known, cache = self._known(rows, shared)
        length = max(len(row.tokens) for row in rows) - known
        ids = torch.zeros(len(rows), length, dtype=torch.int64)
        scored = torch.zeros(len(rows), length, dtype=torch.bool)
        for number, row in enumerate(rows):
            ids[number, : len(row.tokens) - known] = torch.tensor(row.tokens[known:])
            scored[number, row.start - known : len(row.tokens) - known] = True
        ids, scored = ids.to(self.model.device), scored.to(self.model.device)
        with self.model.using(self._factors(rows)):
            # No attention mask: attention is causal and the padding on the right, so no token sees it.
            past = self._past(cache) if known else {"use_cache": False}
            hidden = self.model.base.get_decoder()(input_ids=ids, **past).last_hidden_state
        losses = torch.zeros(ids.shape, dtype=torch.float64, device=ids.device)
        losses[scored] = self.model.token_loss(hidden[:, :-1][scored[:, 1:]], ids[scored]).double()
        return list(zip(losses.sum(1).tolist(), scored.sum(1).tolist(), strict=True))

    def _past(self, cache: Cache) -> dict[str, Any]:
        return {cache_name(self.model.base.get_decoder()): cache, "use_cache": True}

    @staticmethod
    def _known(rows: Sequence[Row], shared: SharedStart | None) -> tuple[int, Cache]:
        """How many tokens of each row have been read, and a cache that holds them."""
        if shared is None:
            return 0, key_values.new_cache()
        return shared.tokens, key_values.gathered([(shared.cache, [0] * len(rows))], shared.tokens)

    def _factors(self, rows: Sequence[Row]) -> dict[str, LowRankFactors]:
        """The adapters of the rows, each stacked once however many rows have it."""
        adapters = list({id(row.adapter): row.adapter for row in rows if row.adapter is not None}.values())
        if not adapters:
            return {}
        numbers = {id(adapter): number for number, adapter in enumerate(adapters)}
        index = torch.tensor([numbers.get(id(row.adapter), -1) for row in rows], device=self.model.device)
        factors = {}
        for name in self.model.adapted_names:
            linear = self.model.base.get_submodule(name)
            lora_a, lora_b = (factor.to(linear.device, linear.weight.dtype) for factor in stack(adapters, name))
            factors[name] = LowRankFactors(lora_a, lora_b, adapters[0].scale, index)
        return factors
