"""Answers under the adapters of their contexts: their losses, the objective, and the scores of held-out answers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from gakernels.bootstrap import ratio_of_perplexities
from gakernels.data.chat import EncodedRecord
from gakernels.errors import InputError
from gakernels.model import GenerativeAdapter
from gakernels.model.packing import rows_packed
from gakernels.model.window_losses import Loss, WindowBatch, token_losses
from gakernels.nn import LowRankFactors
from gakernels.nn.cpu_attention import CpuAttention
from gakernels.nn.token_loss import LOGITS_AT_ONCE
from gakernels.training.instruction.batches import InstructionBatch, count_answers, instruction_batch
from gakernels.training.instruction.steps import InstructionSteps

PACKED_ATTENTION = ("sdpa", "eager")
"""Attention implementations of transformers that separate the conversations of a window by their positions."""


def instruction_losses(model: GenerativeAdapter, batch: InstructionBatch) -> dict[str, Loss]:
    """Encode the contexts, then the conversations under the adapters of the contexts, and take each loss."""
    batch = batch.to(model.device)
    factors, losses = _read(model, batch.context, batch.owner)
    return {**conversation_losses(model, batch, factors), **losses}


def _read(
    model: GenerativeAdapter, context: WindowBatch, owner: Tensor
) -> tuple[dict[str, LowRankFactors], dict[str, Loss]]:
    """The adapters of contexts, and their own losses. Without such losses the graph of the last layer is freed here."""
    hidden, factors = model.read(context.input_ids, context.mask, context.chunks, context.seen, owner)
    return factors, token_losses(model, hidden, context.input_ids, context.targets) if context.targets else {}


def adapters(model: GenerativeAdapter, states: Mapping[str, Tensor], owner: Tensor) -> dict[str, LowRankFactors]:
    """The adapters of states (B, d_r, d_r) by adapted layer, for the windows (N,) that belong to them."""
    factors = {}
    for name, state in states.items():
        lora_a, lora_b = model.generator(name).factors(state)
        factors[name] = LowRankFactors(lora_a, lora_b, model.config.adapter_scale, owner.to(lora_a.device))
    return factors


def conversation_losses(
    model: GenerativeAdapter, batch: InstructionBatch, factors: Mapping[str, LowRankFactors]
) -> dict[str, Loss]:
    """The loss of the answers of a batch, under the given adapters (empty for the base model)."""
    batch = batch.to(model.device)
    return token_losses(model, encode_windows(model, batch, factors), batch.input_ids, {"answers": batch.answers})


def encode_windows(model: GenerativeAdapter, batch: InstructionBatch, factors: Mapping[str, LowRankFactors]) -> Tensor:
    """The last hidden states (N, M, d_h) of the windows of conversations, each under its adapter."""
    batch = batch.to(model.device)
    with model.using(factors), CpuAttention(), rows_packed(batch.positions is not None):
        # No attention mask: padding is on the right, and restarting positions separate the conversations.
        output = model.decoder(input_ids=batch.input_ids, position_ids=batch.positions, use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden


def can_pack(model: GenerativeAdapter) -> bool:
    """Whether attention keeps several conversations in a window separate; not every implementation does."""
    return model.base.config.get_text_config()._attn_implementation in PACKED_ATTENTION


@dataclass(frozen=True)
class InstructionObjective:
    """Losses of conversations about contexts, an `Objective`.

    Attributes:
        model: the base model with its generators.
        steps: the batches of each step.
    """

    model: GenerativeAdapter
    steps: InstructionSteps

    def batches(self, step: int) -> Sequence[InstructionBatch]:
        """See `Objective`: the same number on every process."""
        return self.steps.batches(step)

    def target_counts(self, batch: InstructionBatch) -> Mapping[str, int | Tensor]:
        """See `Objective`."""
        return count_answers(batch)

    def losses(self, batch: InstructionBatch) -> Mapping[str, Loss]:
        """See `Objective`."""
        return instruction_losses(self.model, batch)


@dataclass(frozen=True)
class AnswerReport:
    """Scores of the answers of held-out conversations, by adapter.

    Adapters: `none` (the base model), `empty` (the adapter of an empty context, only if the generators have a static
    term), `other` (that of another context), `own`.

    Attributes:
        contexts: their number.
        answers: their number, in all conversations.
        tokens: number of scored tokens.
        perplexity: of the answers' tokens.
        exact: share of answers that greedy decoding reproduces token for token, to the end of the turn.
        own_over: perplexity ratio own / other adapter, 95% interval (low, high) by paired bootstrap over contexts.
    """

    contexts: int
    answers: int
    tokens: int
    perplexity: dict[str, float]
    exact: dict[str, float]
    own_over: dict[str, tuple[float, float]]

    def to_dict(self) -> dict[str, Any]:
        """The report in JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class _Scores:
    """Sums over the answers of each context, (B,) float64."""

    loss: Tensor
    tokens: Tensor
    exact: Tensor
    answers: Tensor


def score_answers(
    model: GenerativeAdapter, examples: Sequence[EncodedRecord], batch_size: int = 4, progress: bool = False
) -> AnswerReport:
    """Score all conversations of some examples.

    Args:
        model: the base model with its generators.
        examples: at least two, of different contexts.
        batch_size: contexts in one pass, at least 2; the `other` adapter is that of the next context in the pass.
        progress: show a bar.

    Raises:
        InputError: there are fewer than two examples, or batch_size is below 2.
    """
    if len(examples) < 2 or batch_size < 2:
        raise InputError(f"examples and batch_size must be at least 2, but they are {len(examples)} and {batch_size}")
    found: dict[str, list[_Scores]] = {}
    with torch.no_grad():
        for part in tqdm(list(_parts(examples, batch_size)), desc="scoring answers", disable=not progress):
            for name, scores in _score(model, part).items():
                found.setdefault(name, []).append(scores)
    sums = {name: _joined(scores) for name, scores in found.items()}
    own = sums["own"]
    return AnswerReport(
        contexts=len(examples),
        answers=int(own.answers.sum()),
        tokens=int(own.tokens.sum()),
        perplexity={name: float((s.loss.sum() / s.tokens.sum()).exp()) for name, s in sums.items()},
        exact={name: float(s.exact.sum() / s.answers.sum()) for name, s in sums.items()},
        own_over={
            name: ratio_of_perplexities(own.loss, s.loss, own.tokens) for name, s in sums.items() if name != "own"
        },
    )


def _parts(examples: Sequence[EncodedRecord], size: int) -> Iterator[Sequence[EncodedRecord]]:
    """Parts of `size`; the last may have one more, because a single example would have no other context."""
    starts = list(range(0, len(examples), size))
    if len(examples) - starts[-1] == 1:
        starts.pop()
    for start, end in zip(starts, [*starts[1:], len(examples)], strict=True):
        yield examples[start:end]


def _score(model: GenerativeAdapter, examples: Sequence[EncodedRecord]) -> dict[str, _Scores]:
    contexts = [example.context.tolist() for example in examples]
    said = [example.conversations for example in examples]
    window = max(model.config.chunk_size, *(len(s.tokens) for row in said for s in row)) if can_pack(model) else None
    batch = instruction_batch(contexts, said, model.config.chunk_size, window)
    states = model.states(contexts)
    ways: dict[str, Mapping[str, LowRankFactors]] = {"none": {}}
    if model.config.static_rank:
        empty = {name: torch.zeros_like(state) for name, state in states.items()}
        ways["empty"] = adapters(model, empty, batch.owner)
    ways["other"] = adapters(model, states, (batch.owner + 1) % len(examples))
    ways["own"] = adapters(model, states, batch.owner)
    return {name: _scores(model, batch, factors, len(examples)) for name, factors in ways.items()}


def _scores(
    model: GenerativeAdapter, batch: InstructionBatch, factors: Mapping[str, LowRankFactors], contexts: int
) -> _Scores:
    hidden = encode_windows(model, batch, factors)[:, :-1]
    counted = batch.answers[:, 1:].to(hidden.device)
    targets = batch.input_ids[:, 1:].to(hidden.device)[counted]
    loss, right = _tokens(model, hidden[counted], targets)
    owner = batch.owner[:, None].expand(counted.shape)[counted.cpu()]
    begins = (batch.answers[:, 1:] & ~batch.answers[:, :-1])[counted.cpu()]
    answer = begins.cumsum(0) - 1
    answers = int(begins.sum())
    exact = torch.ones(answers, dtype=torch.float64).scatter_reduce_(0, answer, right.double(), "amin")

    def by_context(values: Tensor, rows: Tensor) -> Tensor:
        return torch.zeros(contexts, dtype=torch.float64).index_add_(0, rows, values.double())

    ones = torch.ones(len(owner))
    return _Scores(
        by_context(loss, owner),
        by_context(ones, owner),
        by_context(exact, owner[begins]),
        by_context(ones[begins], owner[begins]),
    )


def _tokens(model: GenerativeAdapter, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each token (n,), and whether it is the most likely one (n,); on the host."""
    vocabulary = model.base.config.get_text_config().vocab_size
    size = max(1, LOGITS_AT_ONCE.get(hidden.device.type, LOGITS_AT_ONCE["cpu"]) // vocabulary)
    likeliest = torch.cat([model.logits(block).argmax(-1) for block in hidden.split(size)])
    return model.token_loss(hidden, targets).cpu(), (likeliest == targets).cpu()


def _joined(parts: Sequence[_Scores]) -> _Scores:
    return _Scores(
        *(torch.cat([getattr(part, name) for part in parts]) for name in ("loss", "tokens", "exact", "answers"))
    )
