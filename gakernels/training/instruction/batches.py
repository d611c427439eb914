"""A micro-batch of instruction tuning: contexts in chunks, and windows of packed conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gakernels.cost.step_memory import ConversationShape, StepShape
from gakernels.data.chat import EncodedConversation
from gakernels.model.transfer import moved
from gakernels.model.window_losses import WindowBatch, count_targets, to_device
from gakernels.model.windows import pad_windows, split_evenly
from gakernels.training.instruction.packing import Rounding, windows_of


@dataclass(frozen=True)
class InstructionBatch:
    """B contexts, and N windows of conversations about them.

    Attributes:
        context: the chunks of the contexts, with the windows and losses that reconstruct or complete them.
        input_ids: (N, M); a window holds one or more conversations about a context, in sequence, or only padding.
        mask: (N, M) bool, False for padding on the right.
        positions: (N, M), the position of each token in its conversation; None if every window holds one conversation.
        owner: (N,), the context that each window is about.
        answers: (N, M) bool, the tokens whose prediction counts; never the first one of a conversation.
    """

    context: WindowBatch
    input_ids: Tensor
    mask: Tensor
    positions: Tensor | None
    owner: Tensor
    answers: Tensor

    @property
    def tokens(self) -> int:
        """The number of tokens, without padding."""
        return int(self.context.mask.sum() + self.mask.sum())

    @property
    def size(self) -> int:
        """The number of computed positions, including padding."""
        return self.context.mask.numel() + self.mask.numel()

    @property
    def shape(self) -> StepShape:
        """What its memory depends on."""
        context, (rows, _, length) = self.context, self.context.input_ids.shape
        predicted = sum(int(count) for count in count_targets(context).values())
        said = ConversationShape(
            len(self.mask), self.mask.shape[1], int(self.answers.sum()), self.positions is not None
        )
        return StepShape(rows, length, context.chunks, context.seen, predicted, said)

    def to(self, device: torch.device) -> InstructionBatch:
        """The same batch with the model's input on another device; the answers stay, as the targets of contexts do."""
        positions = None if self.positions is None else moved(self.positions, device)
        read = {name: moved(getattr(self, name), device) for name in ("input_ids", "mask", "owner")}
        return replace(self, context=to_device(self.context, device), positions=positions, **read)


def instruction_batch(
    contexts: Sequence[Sequence[int]],
    conversations: Sequence[Sequence[EncodedConversation]],
    chunk_size: int,
    window: int | None,
    repeated: Sequence[int] | None = None,
    completion: bool = False,
    rounding: Rounding | None = None,
) -> InstructionBatch:
    """The batch of some contexts, each with at least one conversation.

    Args:
        contexts: the token ids of each, cut into even chunks of at most `chunk_size`.
        conversations: the conversations about each context.
        chunk_size: largest number of tokens in a chunk.
        window: largest number of tokens in a window, at least that of the longest conversation; None gives each
            conversation its own window.
        repeated: number of the chunk of each context to reconstruct, under the adapter of the whole
            context; None for no such loss.
        completion: whether there is a loss on all chunks but the first, each under the adapter of those before it.
        rounding: how sizes are rounded up, with the same limits; losses and gradients stay the same.
    """
    packed, count, length = windows_of([[len(said.tokens) for said in row] for row in conversations], window, rounding)
    windows = [
        [row[n] for n in of_window] for row, of_row in zip(conversations, packed, strict=True) for of_window in of_row
    ]
    ids, mask, positions, answers = _conversation_windows(windows, count, length)
    owner = [row for row, of_row in enumerate(packed) for _ in of_row]
    return InstructionBatch(
        context=_context_windows(contexts, chunk_size, repeated, completion, rounding),
        input_ids=ids,
        mask=mask,
        positions=positions if any(len(said) > 1 for said in windows) else None,
        owner=torch.tensor(owner + [0] * (count - len(owner))),
        answers=answers,
    )


def _conversation_windows(
    windows: Sequence[Sequence[EncodedConversation]], count: int, length: int
) -> tuple[Tensor, ...]:
    """Token ids, mask, positions in the conversation, and answers, all (count, length)."""
    shape = (count, length)
    ids, positions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    mask, answers = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    for number, window in enumerate(windows):
        place = 0
        for said in window:
            part = slice(place, place + len(said.tokens))
            ids[number, part], answers[number, part], mask[number, part] = said.tokens, said.answers, True
            positions[number, part] = np.arange(len(said.tokens))
            place = part.stop
    return tuple(torch.from_numpy(array) for array in (ids, mask, positions, answers))


def _context_windows(
    contexts: Sequence[Sequence[int]],
    chunk_size: int,
    repeated: Sequence[int] | None,
    completion: bool,
    rounding: Rounding | None,
) -> WindowBatch:
    rows = [split_evenly(context, chunk_size) for context in contexts]
    chunks, length = max(map(len, rows)), max(len(chunk) for row in rows for chunk in row)
    if rounding is not None:
        chunks, length = rounding.chunk_count(chunks), rounding.chunk_tokens(length)
    padded: list[list[list[int]]] = [[*row, *[[] for _ in range(chunks - len(row))]] for row in rows]
    if repeated is not None:
        padded = [[*windows, windows[number]] for windows, number in zip(padded, repeated, strict=True)]
    ids, mask = pad_windows(padded, 0, length)
    targets = {}
    if repeated is not None:
        targets["reconstruction"] = mask & (torch.arange(mask.shape[1]) >= chunks)[:, None]
    if completion:
        number = torch.arange(mask.shape[1])
        targets["completion"] = mask & ((number > 0) & (number < chunks))[:, None]
    seen = (*range(chunks), *[chunks] * (ids.shape[1] - chunks))
    return WindowBatch(ids, mask, chunks, seen, targets)


def count_answers(batch: InstructionBatch) -> dict[str, int | Tensor]:
    """The number of tokens that count in each loss."""
    return {"answers": batch.answers.sum(), **count_targets(batch.context)}
