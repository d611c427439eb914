"""The pretraining objective (equation 5): the windows made from a segment, and the losses on them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gakernels.errors import InputError, check_known
from gakernels.model.generative_adapter import GenerativeAdapter
from gakernels.model.transfer import moved

RECONSTRUCTIONS = ("random_slice", "copy", "final")


@dataclass(frozen=True)
class WindowBatch:
    """Windows for one training step.

    Attributes:
        input_ids: (B, W, M); the first `chunks` windows are the context.
        mask: (B, W, M) bool, False for padding on the right.
        chunks: T.
        seen: (W,), number of context chunks that the adapter of each window has seen.
        targets: for each loss, by name, (B, W, M) bool: the tokens whose prediction counts. The first token of a
            window is never predicted.
    """

    input_ids: Tensor
    mask: Tensor
    chunks: int
    seen: tuple[int, ...]
    targets: Mapping[str, Tensor]


@dataclass(frozen=True)
class Loss:
    """Negative log-likelihood of the target tokens: its sum (a tensor, in nats) and their number."""

    total: Tensor
    tokens: Tensor

    @property
    def mean(self) -> Tensor:
        """Nats per token; zero if there are no tokens."""
        return self.total / self.tokens.clamp(min=1)


def joined_windows(batches: Sequence[WindowBatch]) -> WindowBatch:
    """Join batches of segments into one."""
    first = batches[0]
    return WindowBatch(
        torch.cat([batch.input_ids for batch in batches]),
        torch.cat([batch.mask for batch in batches]),
        first.chunks,
        first.seen,
        {name: torch.cat([batch.targets[name] for batch in batches]) for name in first.targets},
    )


def pretraining_windows(
    segments: Tensor,
    chunks: int,
    generator: torch.Generator,
    reconstruction: str = "random_slice",
    slices: int = 1,
) -> WindowBatch:
    """T context windows and T reconstruction windows of each segment (B, T * M): 2 T windows, T adapters.

    Context chunk t is seen with the adapter of the chunks before it and carries the completion loss; chunk 1 has no
    adapter and carries none. Reconstruction window t is seen with the adapter of chunks 1..t and repeats

    - `random_slice`: M tokens drawn from anywhere in those chunks (the default, as in the released code),
    - `copy`: chunk t,
    - `final`: chunk t, but with the adapter of all T chunks.

    Args:
        segments: (B, T * M) token ids.
        chunks: T.
        generator: draws the slices.
        reconstruction: one of the three.
        slices: reconstruction windows per adapter, ordered by slice first, then by adapter; 0 trains only on
            completion. More than one requires `random_slice`.

    Raises:
        InputError: T does not divide the segment into chunks of two or more tokens, the kind of reconstruction is
            unknown, there are several slices of a kind that repeats a chunk, or there is nothing to train on.
    """
    check_known("reconstruction", reconstruction, RECONSTRUCTIONS)
    tokens = segments.shape[1]
    if chunks < 1 or tokens % chunks or tokens < 2 * chunks:
        raise InputError(
            f"chunks must divide the {tokens} tokens of a segment into pieces of at least 2, but it is {chunks}"
        )
    check_slices(slices, chunks, reconstruction)
    context = segments.reshape(len(segments), chunks, -1)
    length, drawn = context.shape[2], reconstruction == "random_slice"
    repeated = [_slices(segments, chunks, length, generator) if drawn else context for _ in range(slices)]
    input_ids = torch.cat([context, *repeated], dim=1)
    after = ([chunks] * chunks if reconstruction == "final" else list(range(1, chunks + 1))) * slices
    targets = {name: torch.zeros(input_ids.shape, dtype=torch.bool) for name in ("reconstruction", "completion")}
    targets["reconstruction"][:, chunks:, 1:] = True
    targets["completion"][:, 1:chunks, 1:] = True
    mask = torch.ones(input_ids.shape, dtype=torch.bool)
    return WindowBatch(input_ids, mask, chunks, (*range(chunks), *after), targets)


def check_slices(slices: int, chunks: int, reconstruction: str) -> None:
    """Raises: InputError: the number of slices does not suit that reconstruction or leaves nothing to train on."""
    if slices < 0 or (slices > 1 and reconstruction != "random_slice"):
        raise InputError(
            f"slices must be 0 or 1, or more with reconstruction 'random_slice', but it is {slices} with "
            f"{reconstruction!r}"
        )
    if slices == 0 and chunks == 1:
        raise InputError("chunks must be at least 2 if completion is the only loss, but it is 1")


def _slices(segments: Tensor, chunks: int, length: int, generator: torch.Generator) -> Tensor:
    """For each t, `length` consecutive tokens drawn from within the first t chunks (B, T, length)."""
    rows = []
    for segment in segments:
        starts = [int(torch.randint(t * length + 1, (1,), generator=generator)) for t in range(chunks)]
        rows.append(torch.stack([segment[start : start + length] for start in starts]))
    return torch.stack(rows)


def count_targets(batch: WindowBatch) -> dict[str, int | Tensor]:
    """The number of tokens that count in each loss of a batch of windows."""
    return {name: target[..., 1:].sum() for name, target in batch.targets.items()}


def window_losses(model: GenerativeAdapter, batch: WindowBatch) -> dict[str, Loss]:
    """Encode a batch of windows with their adapters and compute each loss; logits are formed only where needed."""
    batch = to_device(batch, model.device)
    hidden = model(batch.input_ids, batch.mask, batch.chunks, batch.seen)[0]  # drop the states, which are large
    return token_losses(model, hidden, batch.input_ids, batch.targets)


def token_losses(
    model: GenerativeAdapter, hidden: Tensor, input_ids: Tensor, targets: Mapping[str, Tensor]
) -> dict[str, Loss]:
    """Next-token losses from last hidden states (B, W, M, d_h), one for each set of target tokens.

    With targets on the host, nothing has to wait for the GPU to know which tokens count.
    """
    shifted = {name: predicting(target) for name, target in targets.items()}
    states, following = hidden.flatten(0, -2), F.pad(input_ids[..., 1:], (0, 1)).flatten()
    union = torch.stack(list(shifted.values())).any(0)
    if not union.view(input_ids.shape)[..., :-1].all():  # else nothing is gathered
        places = union.nonzero()[:, 0]
        shifted = {name: target[places] for name, target in shifted.items()}
        states, following = at_places(states, places), at_places(following, places)
    losses = model.token_loss(states, following)
    chosen = {name: moved(target, losses.device) for name, target in shifted.items()}
    return {name: Loss((losses * where).sum(), where.sum()) for name, where in chosen.items()}


def predicting(targets: Tensor) -> Tensor:
    """The tokens (B W M,) whose next token is a target; the last one of a window predicts nothing."""
    return F.pad(targets[..., 1:], (0, 1)).flatten()


def at_places(values: Tensor, places: Tensor) -> Tensor:
    """The rows of `values` at places, which may be on the host."""
    return values.index_select(0, moved(places, values.device))


def to_device(batch: WindowBatch, device: torch.device) -> WindowBatch:
    """The same batch with the model's input on another device. The targets stay: the host must see which they are."""
    return replace(batch, input_ids=moved(batch.input_ids, device), mask=moved(batch.mask, device))
