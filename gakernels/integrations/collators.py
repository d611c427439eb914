"""Data collators for transformers' Trainer: rows of a data set become a batch for `TrainableGenerator`."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gakernels.data.bad_records import BadRecords
from gakernels.data.chat import EncodedRecord, TokenLimits, encode_records, template_of
from gakernels.data.conversations import record_of
from gakernels.errors import InputError, check_known
from gakernels.integrations.transformers import IGNORED
from gakernels.model import GenerativeAdapter
from gakernels.model.window_losses import (
    RECONSTRUCTIONS,
    WindowBatch,
    check_slices,
    joined_windows,
    pretraining_windows,
)
from gakernels.model.windows import split_evenly
from gakernels.training.instruction.answers import can_pack
from gakernels.training.instruction.batches import instruction_batch
from gakernels.training.instruction.steps import LOSSES, PACKED


@dataclass(frozen=True)
class PretrainingCollator:
    """Turns segments of text into windows, see `pretraining_windows`.

    A row is a mapping with `input_ids`, the T M token ids of a segment. The slices drawn from a segment depend only on
    its tokens and the seed, not on its place in the data or the worker, so a resumed run and a later epoch use the same
    slices.

    Attributes:
        chunks: T; divides the tokens of a segment.
        reconstruction: `random_slice`, `copy` or `final`.
        slices: reconstruction windows for each of the T adapters.
        seed: of the slices.

    Raises:
        InputError: the settings contradict each other; or, in a call, the rows are empty, of different lengths or not
            divided by `chunks`.
    """

    chunks: int = 8
    reconstruction: str = "random_slice"
    slices: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_known("reconstruction", self.reconstruction, RECONSTRUCTIONS)
        check_slices(self.slices, self.chunks, self.reconstruction)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of some segments."""
        segments = [torch.as_tensor(row["input_ids"], dtype=torch.int64) for row in rows]
        lengths = {len(segment) for segment in segments}
        if len(lengths) != 1:
            raise InputError(f"input_ids must have the same length in all rows, but they have {sorted(lengths)}")
        batch = joined_windows([self._windows(segment) for segment in segments])
        counted = torch.stack(list(batch.targets.values())).any(0)
        return {
            "input_ids": batch.input_ids,
            "attention_mask": batch.mask,
            "labels": batch.input_ids.where(counted, IGNORED),
            "chunks": batch.chunks,
            "seen": list(batch.seen),
            "targets": batch.targets,
        }

    def _windows(self, segment: Tensor) -> WindowBatch:
        seeds = np.random.SeedSequence((self.seed, zlib.crc32(segment.numpy().tobytes())))
        random = torch.Generator().manual_seed(int(seeds.generate_state(1)[0]))
        return pretraining_windows(segment[None], self.chunks, random, self.reconstruction, self.slices)


class InstructionCollator:
    """Turns rows of a context and questions or conversations about it, in a form that [instruction
    tuning](training.md#rows) reads, into a batch.

    `TrainingArguments` needs `remove_unused_columns=False`. Conversations are formatted with the generator's chat
    template, or else the tokenizer's, which is then stored with the generator.

    Args:
        model: provides the tokenizer and the sizes of chunks and windows.
        losses: `answers`, and `reconstruction` and `completion` to train them too, see `BatchConfig`.
        context_tokens: longest context.
        seed: of the reconstructed chunk, which depends only on this and the context.

    Raises:
        InputError: there is no tokenizer, a loss is unknown; or, in a call, a row can't be used.
    """

    def __init__(
        self,
        model: GenerativeAdapter,
        losses: Sequence[str] = ("answers",),
        context_tokens: int = 8192,
        seed: int = 0,
    ) -> None:
        if model.tokenizer is None:
            raise InputError("tokenizer is needed to tune on conversations; pass one to get_generative_model")
        if "answers" not in losses or not set(losses) <= set(LOSSES):
            raise InputError(f"losses must be answers and others of {', '.join(LOSSES)}, but they are {losses}")
        if model.chat_template is None:
            model.use_chat_template(template_of(model.tokenizer))
        self._tokenizer, self._losses, self._seed = model.tokenizer, tuple(losses), seed
        self._chunk_size = model.config.chunk_size
        self._window = PACKED * self._chunk_size if can_pack(model) else None
        self._limits = TokenLimits(context_tokens, self._chunk_size)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of some rows."""
        records = [self._record(row) for row in rows]
        batch = instruction_batch(
            [record.context.tolist() for record in records],
            [record.conversations for record in records],
            self._chunk_size,
            self._window,
            [self._repeated(record) for record in records] if "reconstruction" in self._losses else None,
            "completion" in self._losses,
        )
        conversations = {name: getattr(batch, name) for name in ("input_ids", "mask", "positions", "owner", "answers")}
        return {
            "input_ids": batch.context.input_ids,
            "attention_mask": batch.context.mask,
            "labels": batch.input_ids.where(batch.answers, IGNORED),
            "chunks": batch.context.chunks,
            "seen": list(batch.context.seen),
            "targets": dict(batch.context.targets),
            "conversations": conversations,
        }

    def _record(self, row: Mapping[str, Any]) -> EncodedRecord:
        if not row:
            raise InputError("rows must have a context, but are empty: TrainingArguments(remove_unused_columns=False)")
        strict = BadRecords(strict=True)
        record = record_of(row, "a row", strict)
        assert record is not None
        encoded = encode_records(
            [record], self._tokenizer, self._limits, strict, BadRecords(), name="the batch", progress=False
        )
        return encoded[0]

    def _repeated(self, record: EncodedRecord) -> int:
        """The chunk to reconstruct."""
        chunks = split_evenly(record.context.tolist(), self._chunk_size)
        return Random(f"{self._seed} {zlib.crc32(record.context.tobytes())}").randrange(len(chunks))
