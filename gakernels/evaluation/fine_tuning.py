"""Fine-tuning on a few texts or answers, for the baselines: LoRA or all weights, with early stopping."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gakernels.errors import InputError
from gakernels.model import GenerativeAdapter
from gakernels.model.attachment import lean_modules, take_out_lean_modules
from gakernels.model.static_lora import StaticLora
from gakernels.nn import LowRankFactors

KINDS = ("lora", "full")


@dataclass(frozen=True)
class Example:
    """Token ids, of which those from `start` (at least 1) on are learned."""

    tokens: tuple[int, ...]
    start: int = 1


@dataclass(frozen=True)
class TuningSettings:
    """How to tune: AdamW at a constant learning rate, without weight decay.

    Attributes:
        learning_rate: above 0.
        epochs: at most.
        batch_size: examples in a step.
        patience: epochs in a row in which the validation loss may rise; only where there are validation examples.
        seed: of the order.

    Raises:
        InputError: a value is out of range.
    """

    learning_rate: float
    epochs: int
    batch_size: int
    patience: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate must be finite and above 0, but it is {self.learning_rate}")
        for name in ("epochs", "batch_size", "patience"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, but it is {getattr(self, name)}")


Factors = Mapping[str, LowRankFactors]
Weights = Mapping[str, Tensor]


def tune_lora(
    model: GenerativeAdapter,
    examples: Sequence[Example],
    settings: TuningSettings,
    validation: Sequence[Example] = (),
    start: Factors | None = None,
) -> Factors:
    """Train a LoRA of the generator's layers and rank; the base model stays as it is.

    Args:
        model: with the base model.
        examples: at least one.
        settings: how.
        validation: stops the training early; the best epoch counts.
        start: factors to go on from.

    Returns:
        Factors by adapted layer.
    """
    lora = StaticLora(model)
    if start is not None:
        with torch.no_grad():
            for key, parameter in lora.lora_a.items():
                parameter.copy_(start[key.replace("/", ".")].lora_a[0])
                lora.lora_b[key].copy_(start[key.replace("/", ".")].lora_b[0])
    _train(model, lora, examples, validation, settings, lora)
    return {
        name: LowRankFactors(pair.lora_a.detach(), pair.lora_b.detach(), pair.scale)
        for name, pair in lora.factors().items()
    }


def tune_full(
    model: GenerativeAdapter,
    examples: Sequence[Example],
    settings: TuningSettings,
    validation: Sequence[Example] = (),
    start: Weights | None = None,
) -> Weights:
    """Train all weights of the base model, and put the old ones back.

    Args and raises: as `tune_lora`, with weights in place of factors.

    Returns:
        The trained weights by name, for `weights_in_force`; on the CPU.
    """
    before, lean = _copied(model.base), lean_modules(model.base)
    take_out_lean_modules(model.base)  # they keep nothing for the gradient of a weight
    model.base.requires_grad_(True)
    try:
        if start is not None:
            _load(model.base, start)
        _train(model, model.base, examples, validation, settings, None)
        return _copied(model.base)
    finally:
        model.base.requires_grad_(False)
        _load(model.base, before)
        for parent, name, module in lean:
            setattr(parent, name, module)


@contextmanager
def weights_in_force(model: GenerativeAdapter, weights: Weights) -> Iterator[None]:
    """The base model with other weights while the block runs; then, bit by bit, with its own."""
    before = _copied(model.base)
    _load(model.base, weights)
    try:
        yield
    finally:
        _load(model.base, before)


def _copied(module: nn.Module) -> dict[str, Tensor]:
    """All parameters on the CPU, shared ones once."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in module.named_parameters()}


@torch.no_grad()
def _load(module: nn.Module, weights: Weights) -> None:
    for name, parameter in module.named_parameters():
        parameter.copy_(weights[name])


def _train(
    model: GenerativeAdapter,
    trained: nn.Module,
    examples: Sequence[Example],
    validation: Sequence[Example],
    settings: TuningSettings,
    lora: StaticLora | None,
) -> None:
    """Train in place; with validation examples the weights of the best epoch are left."""
    if not examples:
        raise InputError("there must be at least one example to tune on, but there is none")
    optimizer = torch.optim.AdamW(trained.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    order, random = list(range(len(examples))), Random(settings.seed)
    best, best_state, rises, last = math.inf, None, 0, math.inf
    for _ in range(settings.epochs):
        random.shuffle(order)
        for start in range(0, len(order), settings.batch_size):
            batch = [examples[number] for number in order[start : start + settings.batch_size]]
            optimizer.zero_grad(set_to_none=True)
            total, tokens = _loss(model, batch, lora)
            (total / max(tokens, 1)).backward()
            torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
        if not validation:
            continue
        loss = _mean_loss(model, validation, settings.batch_size, lora)
        if loss < best:
            best, best_state = loss, copy.deepcopy(trained.state_dict())
        rises = rises + 1 if loss > last else 0
        last = loss
        if rises >= settings.patience:
            break
    if best_state is not None:
        trained.load_state_dict(best_state)


@torch.no_grad()
def _mean_loss(
    model: GenerativeAdapter, examples: Sequence[Example], batch_size: int, lora: StaticLora | None
) -> float:
    parts = [_loss(model, examples[start : start + batch_size], lora) for start in range(0, len(examples), batch_size)]
    return float(sum(float(total) for total, _ in parts) / max(sum(tokens for _, tokens in parts), 1))


def _loss(model: GenerativeAdapter, batch: Sequence[Example], lora: StaticLora | None) -> tuple[Tensor, int]:
    """Summed loss of the learned tokens of a batch, and their number."""
    length = max(len(example.tokens) for example in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.int64)
    learned = torch.zeros(len(batch), length, dtype=torch.bool)
    for row, example in enumerate(batch):
        ids[row, : len(example.tokens)] = torch.tensor(example.tokens)
        learned[row, example.start : len(example.tokens)] = True
    ids, learned = ids.to(model.device), learned.to(model.device)
    with model.using({} if lora is None else lora.factors()):
        hidden = model.base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    # token_loss is for a frozen head; here the head may be trained.
    logits = model.logits(hidden[:, :-1][learned[:, 1:]])
    return F.cross_entropy(logits.float(), ids[learned], reduction="sum"), int(learned.sum())
