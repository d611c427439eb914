"""Answers and losses of many rows in batches, each with its own adapter (or none)."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gakernels.adapters.compact import CompactAdapter
from gakernels.errors import InputError
from gakernels.generation.decoding_batch import DecodingBatch, SharedStart, check_attention, new_cache, past
from gakernels.generation.row_adapters import AdapterForm, ExpandedForm, OneAdapter, SharedMaps
from gakernels.generation.sampling import Sampling
from gakernels.generation.scheduler import Generation, Scheduler, run
from gakernels.model import GenerativeAdapter
from gakernels.model.encoding import encode_text, opening_tokens
from gakernels.model.positions import position_limit

__all__ = ["Decoder", "Row", "SharedStart", "common_start", "plan_batches"]
LEAST_SHARED = 64  # tokens; fewer are not worth a separate pass


@dataclass(frozen=True)
class Row:
    """A sequence that the model reads.

    Attributes:
        tokens: token ids, at least one.
        adapter: active while the row is read; None for the base model alone. A batch has expanded ones or compact
            ones.
        start: where scored tokens begin, at least 1; for an answer to generate, the number of tokens.
        cut: whether it is the end of a longer sequence that the model could not read.
    """

    tokens: tuple[int, ...]
    adapter: OneAdapter = None
    start: int = 1
    cut: bool = False


def plan_batches(lengths: Sequence[int], batch_tokens: int, max_rows: int) -> list[list[int]]:
    """The row numbers of each batch: rows of similar length together, the longest first.

    A row gets at most 32 tokens of padding, or a quarter of the longest row if that is more.

    Args:
        lengths: of the rows, including the tokens that they will get.
        batch_tokens: limit of rows times the longest of them; a longer row is a batch by itself.
        max_rows: maximum number of rows in a batch.
    """
    batches: list[list[int]] = []
    longest = 0
    for number in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        rows = len(batches[-1]) if batches else max_rows
        if rows == max_rows or longest * (rows + 1) > batch_tokens or longest - lengths[number] > max(longest // 4, 32):
            batches.append([])
            longest = lengths[number]
        batches[-1].append(number)
    return batches


class Decoder:
    """Reads batches of rows.

    Args:
        model: the base model and its generators; their weights may change between calls.

    Raises:
        InputError: the model has no tokenizer, or keeps a recurrent state.
    """

    def __init__(self, model: GenerativeAdapter) -> None:
        if model.tokenizer is None:
            raise InputError("tokenizer is needed to ask questions; the base model has none")
        check_attention(model)
        self.model, self.tokenizer = model, model.tokenizer
        self._ends = model.end_tokens()
        settings = model.base.config.get_text_config()
        self.slides = getattr(settings, "sliding_window", None) is not None
        self.limit: int | None = position_limit(settings)

    def _form(self, adapters: Sequence[OneAdapter]) -> AdapterForm:
        """That of these adapters, of which all or none are compact."""
        return self._shared_maps if any(isinstance(one, CompactAdapter) for one in adapters) else self._expanded

    @cached_property
    def _expanded(self) -> ExpandedForm:
        return ExpandedForm(self.model)

    @cached_property
    def _shared_maps(self) -> SharedMaps:
        return SharedMaps(self.model)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, opening tokens (BOS) included."""
        return encode_text(self.tokenizer, text)

    def begin(self) -> list[int]:
        """The opening tokens alone; empty if the tokenizer has none."""
        return opening_tokens(self.tokenizer)

    def row(self, tokens: Sequence[int], start: int, room: int = 0, adapter: OneAdapter = None) -> Row:
        """A row of the last tokens that the model can read with `room` more after them; see `Row`."""
        cut = 0 if self.limit is None else max(len(tokens) - (self.limit - room), 0)
        return Row(tuple(tokens[cut:]), adapter, max(start - cut, 1), cut > 0)

    @torch.inference_mode()
    def shared_start(self, rows: Sequence[Row]) -> SharedStart | None:
        """Read the common start of some rows; None if it is short, or the rows have different adapters.

        Models with a sliding window have none: padding after the start would take up room in the window.
        """
        first = rows[0]
        if len(rows) < 2 or self.slides or any(row.adapter is not first.adapter for row in rows):
            return None
        common = _common(first.tokens, rows)
        return None if common < LEAST_SHARED else self.read_start(first.tokens[:common], first.adapter)

    @torch.inference_mode()
    def read_start(self, tokens: Sequence[int], adapter: OneAdapter = None) -> SharedStart:
        """Read what rows with this adapter begin with."""
        cache, decoder = new_cache(), self.model.decoder
        ids = torch.tensor([list(tokens)], device=self.model.device)
        with self.model.using(self._form([adapter]).stacked([adapter]).factors()):
            decoder(input_ids=ids, **past(decoder, cache))
        return SharedStart(tuple(tokens), cache)

    def generate(
        self, rows: Sequence[Row], new_tokens: int, stops: Sequence[str], shared: SharedStart | None = None
    ) -> list[str]:
        """Continue the rows of one batch greedily.

        Args:
            rows: the batch.
            new_tokens: most tokens of an answer.
            stops: an answer ends before the first of these texts; they may contain special tokens.
            shared: the result of `shared_start` for these rows and perhaps others.

        Returns:
            The answers, cut at the first stop, stripped of surrounding space.
        """
        return self.continued(rows, [Sampling(new_tokens, stop=tuple(stops))] * len(rows), shared)

    def continued(
        self, rows: Sequence[Row], samplings: Sequence[Sampling], shared: SharedStart | None = None
    ) -> list[str]:
        """Continue each row of a batch in its own way; otherwise as `generate`."""
        batch = DecodingBatch(self.model, self._form([row.adapter for row in rows]), shared)
        scheduler = Scheduler(self.model, len(rows), sys.maxsize, sys.maxsize, batch)
        generations = [
            Generation(row.tokens, sampling, row.adapter, self.tokenizer, self._ends)
            for row, sampling in zip(rows, samplings, strict=True)
        ]
        return [generation.text.strip() for generation in run(scheduler, generations)]

    def speed(self, row: Row, new_tokens: int, shared: SharedStart | None = None) -> tuple[float, float | None]:
        """Continue a row by itself, past any end, and measure it.

        Args:
            row: the row to continue.
            new_tokens: the number of tokens to add.
            shared: as in `generate`.

        Returns:
            Seconds to the first token, and tokens per second after it (None if there is only one token).
        """
        times = [time.perf_counter()]
        sampling = Sampling(new_tokens, stop_at_end_token=False)
        generation = Generation(
            row.tokens, sampling, row.adapter, on_piece=lambda piece: times.append(time.perf_counter())
        )
        batch = DecodingBatch(self.model, self._form([row.adapter]), shared)
        run(Scheduler(self.model, 1, sys.maxsize, sys.maxsize, batch), [generation])
        first, last = times[1], times[-1]
        return first - times[0], (new_tokens - 1) / (last - first) if new_tokens > 1 else None

    @torch.inference_mode()
    def losses(self, rows: Sequence[Row], shared: SharedStart | None = None) -> list[tuple[float, int]]:
        """Summed negative log-likelihood (nats) of the tokens of each row from `start` on, and their number.

        Args:
            rows: the batch.
            shared: as in `generate`.
        """
        hidden, ids = self.states(rows, shared)
        scored = torch.zeros(ids.shape, dtype=torch.bool)
        known = 0 if shared is None else shared.tokens
        for number, row in enumerate(rows):
            scored[number, row.start - known : len(row.tokens) - known] = True
        scored = scored.to(ids.device)
        losses = torch.zeros(ids.shape, dtype=torch.float64, device=ids.device)
        losses[scored] = self.model.token_loss(hidden[:, :-1][scored[:, 1:]], ids[scored]).double()
        return list(zip(losses.sum(1).tolist(), scored.sum(1).tolist(), strict=True))

    @torch.inference_mode()
    def states(self, rows: Sequence[Row], shared: SharedStart | None = None) -> tuple[Tensor, Tensor]:
        """Last hidden states (rows, columns, d_h) of the tokens after the shared start, and these (rows, columns),
        padded on the right."""
        known = 0 if shared is None else shared.tokens
        ids = torch.zeros(len(rows), max(len(row.tokens) for row in rows) - known, dtype=torch.int64)
        for number, row in enumerate(rows):
            ids[number, : len(row.tokens) - known] = torch.tensor(row.tokens[known:])
        ids, decoder = ids.to(self.model.device), self.model.decoder
        adapters = [row.adapter for row in rows]
        with self.model.using(self._form(adapters).stacked(adapters).factors()):
            # No attention mask: attention is causal and the padding is on the right, so no token sees it.
            cached = {"use_cache": False} if shared is None else past(decoder, shared.of_rows(len(rows)))
            return decoder(input_ids=ids, **cached).last_hidden_state, ids


def common_start(start: SharedStart, rows: Sequence[Row]) -> SharedStart | None:
    """The part of a start that all rows begin with; None if there is none."""
    common = _common(start.ids, rows)
    return start.first(common) if common else None


def _common(tokens: Sequence[int], rows: Sequence[Row]) -> int:
    """How many of the tokens all rows begin with, up to the last one in front of what is scored, which is read anew."""
    common = min(len(tokens), *(row.start - 1 for row in rows))
    for row in rows:
        pairs = zip(tokens[:common], row.tokens, strict=False)
        common = next((place for place, (one, other) in enumerate(pairs) if one != other), common)
    return common
