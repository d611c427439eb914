"""Context distillation (arXiv:2209.15189).

The model with the generated adapter learns to predict what the base model predicts with the context in its prompt.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gakernels.errors import InputError
from gakernels.model import GenerativeAdapter
from gakernels.model.divergence import divergences
from gakernels.model.positions import position_limit
from gakernels.model.window_losses import Loss, WindowBatch, at_places, predicting, to_device, token_losses
from gakernels.settings import Count, Positive, settings

NAME = "distillation"
TOKENS_AT_ONCE = 1 << 14  # in the teacher's pass, which keeps no activations


@settings
class Distillation:
    """The loss `distillation`: KL(teacher || student) of the next token, in nats, times the square of the temperature.

    The student is the model with a window's adapter, without the context. The teacher is its base model without any
    adapter, on the context that the window's adapter has seen followed by the window. It runs without gradients.

    Attributes:
        of: names of the losses whose target tokens are distilled.
        top_k: this many of the teacher's most likely tokens count separately, and the rest as one; from the size of the
            vocabulary on, the divergence is exact; below, it is a lower bound.
        temperature: both distributions are softmax(logits / temperature).

    Raises:
        InputError: a value is out of range.
    """

    of: tuple[str, ...] = ("completion",)
    top_k: Count = 64
    temperature: Positive = 1.0

    def __post_init__(self) -> None:
        if not self.of or NAME in self.of:
            raise InputError(f"of must name other losses whose tokens are distilled, but it is {self.of}")

    def windows(self, batch: WindowBatch) -> WindowBatch:
        """The batch with the tokens to distil as an additional set of targets.

        Raises:
            InputError: the batch lacks a loss named in `of`.
        """
        missing = [name for name in self.of if name not in batch.targets]
        if missing:
            raise InputError(f"of names the loss {missing[0]!r}, but there are {', '.join(batch.targets)}")
        chosen = torch.stack([batch.targets[name] for name in self.of]).any(0)
        return replace(batch, targets={**batch.targets, NAME: chosen})

    def losses(self, model: GenerativeAdapter, batch: WindowBatch) -> dict[str, Loss]:
        """The losses of a batch from `windows`: `distillation`, and those on the next token itself.

        Raises:
            InputError: a context and its window together are longer than the base model can read.
        """
        teacher = teacher_states(model, batch, batch.targets[NAME])
        batch = to_device(batch, model.device)
        hidden, _ = model(batch.input_ids, batch.mask, batch.chunks, batch.seen)
        others = {name: target for name, target in batch.targets.items() if name != NAME}
        losses = token_losses(model, hidden, batch.input_ids, others) if others else {}
        places = predicting(batch.targets[NAME]).nonzero()[:, 0]
        student = at_places(hidden.flatten(0, -2), places)
        found = divergences(model, student, teacher, self.top_k, self.temperature)
        count = torch.full((), len(places), device=found.device)
        return {**losses, NAME: Loss(found.sum(), count)}


@torch.no_grad()
def teacher_states(model: GenerativeAdapter, batch: WindowBatch, targets: Tensor) -> Tensor:
    """The last hidden states (N, d_h) of the plain base model before each target token.

    A context chunk whose adapter has seen all chunks before it is read at its place in the context: one sequence serves
    all such windows of a row. Every other window is a separate sequence, after the chunks that it has seen.

    Args:
        model: its base model is the teacher.
        batch: windows.
        targets: (B, W, M) bool, the tokens to predict.

    Returns:
        In the order of `hidden[..., :-1, :][targets[..., 1:]]`.

    Raises:
        InputError: a sequence is longer than the base model can read.
    """
    lengths, targets = batch.mask.sum(-1).tolist(), targets[..., 1:].cpu()
    numbers: dict[tuple[int, tuple[int, ...]], int] = {}  # of sequences: a row, and its windows in order
    sequence_of, position = [], []
    for row, window in targets.any(-1).nonzero().tolist():
        together = window < batch.chunks and batch.seen[window] == window
        windows = tuple(range(batch.chunks)) if together else (*range(batch.seen[window]), window)
        number = numbers.setdefault((row, windows), len(numbers))
        before = sum(lengths[row][other] for other in windows[: windows.index(window)])
        places = targets[row, window].nonzero().flatten()
        sequence_of.append(torch.full_like(places, number))
        position.append(before + places)
    if not numbers:
        width = model.base.config.get_text_config().hidden_size
        return torch.empty(0, width, device=model.device, dtype=model.base.dtype)
    index, place = torch.cat(sequence_of), torch.cat(position)
    rows = [batch.input_ids[row, list(windows)][batch.mask[row, list(windows)]] for row, windows in numbers]
    _check_length(model, max(map(len, rows)))
    states = []
    for start, hidden in _passes(model, rows):
        here = (index >= start) & (index < start + len(hidden))
        states.append((here, hidden[(index[here] - start).to(hidden.device), place[here].to(hidden.device)]))
    result = states[0][1].new_empty(len(index), states[0][1].shape[-1])
    for here, part in states:
        result[here.to(result.device)] = part
    return result


def _check_length(model: GenerativeAdapter, longest: int) -> None:
    limit = position_limit(model.base.config)
    if limit is not None and longest > limit:
        raise InputError(
            f"distillation: the teacher reads contexts and windows of up to {longest} tokens in its prompt, but the "
            f"base model reads {limit}; take shorter contexts"
        )


def _passes(model: GenerativeAdapter, rows: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """The plain base model's last hidden states of sequences, in groups, with the number of each group's first one."""
    at_once = max(1, TOKENS_AT_ONCE // max(map(len, rows)))
    for start in range(0, len(rows), at_once):
        # Padding is on the right and attention is causal, so no token sees it.
        ids = torch.nn.utils.rnn.pad_sequence(list(rows[start : start + at_once]), batch_first=True)
        with model.using({}):
            yield start, model.decoder(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
