"""Methods: fine-tuning a LoRA or all weights on other questions, on the contexts, or a few shots; asked closed-book."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gakernels.adapters.adapter import Adapter
from gakernels.errors import InputError, check_least
from gakernels.evaluation.datasets import Question
from gakernels.evaluation.methods import Method, MethodSettings, Prepared
from gakernels.evaluation.prompts import Asker
from gakernels.evaluation.scenarios import EvaluationCase, Scenario
from gakernels.model import GenerativeAdapter
from gakernels.model.attachment import lean_modules, take_out_lean_modules
from gakernels.model.encoding import encode_text
from gakernels.model.positions import position_limit
from gakernels.model.static_lora import StaticLora, static_adapter
from gakernels.nn import LowRankFactors

# The paper's, for all weights of Mistral-7B (appendix C); a LoRA's rate is ours: the paper has none.
LEARNING_RATES = {"tuning": {"full": 1e-5, "lora": 1e-4}, "few_shot": {"full": 5e-6, "lora": 1e-4}}
SUPERVISED_EPOCHS, SUPERVISED_BATCH = 3, 64
CONTINUAL_EPOCHS, CONTINUAL_BATCH = 8, 16
FEW_SHOT_EPOCHS, FEW_SHOT_BATCH, FEW_SHOT_PATIENCE = 40, 16, 3
VALIDATION_SHARE = 10  # one training question in so many is held back for early stopping

Factors = Mapping[str, LowRankFactors]
Weights = Mapping[str, Tensor]
Trained = Factors | Weights
Example = TypeVar("Example")
BatchLoss = Callable[[Sequence[Example]], tuple[Tensor, int]]


# Methods


class TunedMethod(Method):
    """The common part of the fine-tuned methods.

    Args:
        kind: `lora` or `full`: what is trained.
    """

    adapted = True

    def __init__(
        self, model: GenerativeAdapter, scenario: Scenario, settings: MethodSettings, kind: str = "lora"
    ) -> None:
        super().__init__(model, scenario, settings)
        self.kind = kind

    def settings_of(self, what: str, epochs: int, batch_size: int, patience: int = 1) -> TuningSettings:
        """The settings of a tuning, with the user's changes."""
        rate = self.settings.learning_rate or LEARNING_RATES[what][self.kind]
        return TuningSettings(rate, self.settings.epochs or epochs, batch_size, patience, self.settings.seed)

    def tune(
        self,
        examples: Sequence[TuningExample],
        settings: TuningSettings,
        validation: Sequence[TuningExample] = (),
        start: Trained | None = None,
    ) -> Trained:
        """Train, from `start` if given."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            train: Callable[..., Trained] = tune_lora if self.kind == "lora" else tune_full
            return train(self.model, examples, settings, validation, start)

    def prepared(self, trained: Sequence[Trained], own: bool = True) -> Prepared:
        """Each case with its own trained model, or with one that serves all."""
        if self.kind == "lora":
            made: dict[int, Adapter] = {}
            for factors in trained:
                made.setdefault(id(factors), self.to_base(static_adapter(self.model, factors)))  # type: ignore[arg-type]
            adapters = [made[id(factors)] for factors in trained]
            return Prepared(adapters, kept=adapters if own else ())

        def weights(number: int) -> AbstractContextManager[None]:
            return weights_in_force(self.model, trained[number])  # type: ignore[arg-type]

        separate = len({id(weights) for weights in trained}) > 1
        return Prepared([None] * len(trained), weights=weights, separate=separate)

    def pairs(self, questions: Sequence[Question]) -> list[TuningExample]:
        """Questions as the method asks them; the first gold answer is learned."""
        tokenizer = self.model.tokenizer
        assert tokenizer is not None
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        asker = Asker(tokenizer, self.settings.chat)
        examples = []
        for question in questions:
            tokens, start = asker.answered(self.write(question.text), question.answers[0])
            examples.append(TuningExample(*self._kept(tokens + end, start)))
        return examples

    def texts(self, texts: Sequence[str]) -> list[TuningExample]:
        """Texts of which every token is learned; texts longer than the model reads are split."""
        tokenizer = self.model.tokenizer
        assert tokenizer is not None
        limit = self._limit()
        examples = []
        for text in texts:
            tokens = encode_text(tokenizer, text)
            pieces = [tokens[start : start + limit] for start in range(0, len(tokens), limit)]
            examples += [TuningExample(tuple(piece)) for piece in pieces if len(piece) > 1]
        return examples

    def _kept(self, tokens: list[int], start: int) -> tuple[tuple[int, ...], int]:
        """The last tokens that the model can read."""
        cut = max(len(tokens) - self._limit(), 0)
        return tuple(tokens[cut:]), max(start - cut, 1)

    def _limit(self) -> int:
        return position_limit(self.model.base.config) or self.model.config.chunk_size


class SupervisedTuning(TunedMethod):
    """Trained on questions and answers about other contexts, with early stopping (paper: learning rate 1e-5, batch 64).

    Args:
        kind: as for `TunedMethod`.
        continual: first trained on the documents of all contexts (paper: 8 epochs, batch 16, learning rate 1e-5),
            then on the training questions, if there are any.

    Raises:
        InputError: there are no training questions.
    """

    def __init__(
        self,
        model: GenerativeAdapter,
        scenario: Scenario,
        settings: MethodSettings,
        kind: str = "lora",
        continual: bool = False,
    ) -> None:
        super().__init__(model, scenario, settings, kind)
        if not scenario.training and not continual:
            raise InputError("supervised fine-tuning needs training questions; name their file with --train")
        self._continual = continual
        self._trained: Trained | None = None

    def fit(self) -> None:
        """Train, once for all contexts."""
        start = None
        if self._continual:
            documents = self.texts(self.scenario.documents())
            start = self.tune(documents, self.settings_of("tuning", CONTINUAL_EPOCHS, CONTINUAL_BATCH))
        self._trained = start
        if self.scenario.training:
            pairs = self.pairs([question for context in self.scenario.training for question in context.questions])
            kept = len(pairs) // VALIDATION_SHARE
            settings = self.settings_of("tuning", SUPERVISED_EPOCHS, SUPERVISED_BATCH)
            self._trained = self.tune(pairs[kept:], settings, pairs[:kept], start)

    def prepare(self, cases: Sequence[EvaluationCase]) -> Prepared:
        """The same trained model for all."""
        assert self._trained is not None, "fit comes first"
        return self.prepared([self._trained] * len(cases), own=False)


class FewShotTuning(TunedMethod):
    """Trained on examples of the same task (paper: 16, learning rate 5e-6, at most 40 epochs; it stops when the loss of
    as many others has risen three times in a row)."""

    def __init__(
        self, model: GenerativeAdapter, scenario: Scenario, settings: MethodSettings, kind: str = "lora"
    ) -> None:
        super().__init__(model, scenario, settings, kind)
        self._by_task: dict[tuple[Question, ...], Trained] = {}

    def missing(self, case: EvaluationCase) -> str | None:
        """There must be training examples."""
        return None if case.training else "no training examples of the task"

    def prepare(self, cases: Sequence[EvaluationCase]) -> Prepared:
        """Trains once for each set of examples."""
        trained = []
        for case in cases:
            if case.training not in self._by_task:
                settings = self.settings_of("few_shot", FEW_SHOT_EPOCHS, FEW_SHOT_BATCH, FEW_SHOT_PATIENCE)
                pairs, validation = self.pairs(case.training), self.pairs(case.validation)
                self._by_task[case.training] = self.tune(pairs, settings, validation)
            trained.append(self._by_task[case.training])
        return self.prepared(trained)


class ContextTuning(TunedMethod):
    """Like continual pretraining, but a LoRA learns a single context, as the generated adapter knows a single one.

    It is asked as the base model is: it has learned no other form of questions.
    """

    adapted = False

    def __init__(self, model: GenerativeAdapter, scenario: Scenario, settings: MethodSettings) -> None:
        super().__init__(model, scenario, settings)
        self._settings = self.settings_of("tuning", CONTINUAL_EPOCHS, CONTINUAL_BATCH)

    def prepare(self, cases: Sequence[EvaluationCase]) -> Prepared:
        """Trains once for each text."""
        texts = dict.fromkeys(case.context.text for case in cases)
        trained = {text: self.tune(self.texts([text]), self._settings) for text in texts}
        return self.prepared([trained[case.context.text] for case in cases])


# Training


@dataclass(frozen=True)
class TuningExample:
    """Token ids; those from `start` (at least 1) on are learned."""

    tokens: tuple[int, ...]
    start: int = 1


@dataclass(frozen=True)
class TuningSettings:
    """How to tune: AdamW at a constant learning rate, without weight decay.

    Attributes:
        learning_rate: above 0.
        epochs: most epochs.
        batch_size: examples in a step.
        patience: consecutive epochs in which the validation loss may rise, if there are validation examples.
        seed: of the order of the examples.
        steps: most steps; None for all of the epochs.

    Raises:
        InputError: a value is out of range.
    """

    learning_rate: float
    epochs: int
    batch_size: int
    patience: int = 1
    seed: int = 0
    steps: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate must be finite and above 0, but it is {self.learning_rate}")
        check_least(1, epochs=self.epochs, batch_size=self.batch_size, patience=self.patience)


def tune_lora(
    model: GenerativeAdapter,
    examples: Sequence[TuningExample],
    settings: TuningSettings,
    validation: Sequence[TuningExample] = (),
    start: Factors | None = None,
) -> Factors:
    """Train a LoRA of the generator's layers and rank; the base model stays as it is.

    Args:
        model: with the base model.
        examples: at least one.
        settings: how to tune.
        validation: examples for early stopping; the best epoch counts.
        start: factors to start from.

    Returns:
        Factors by adapted layer.
    """
    lora = StaticLora(model)
    if start is not None:
        with torch.no_grad():
            for key, parameter in lora.lora_a.items():
                parameter.copy_(start[key.replace("/", ".")].lora_a[0])
                lora.lora_b[key].copy_(start[key.replace("/", ".")].lora_b[0])
    train(lora, examples, settings, partial(_loss, model, lora), validation)
    return trained_factors(lora)


def trained_factors(lora: StaticLora) -> Factors:
    """The factors of a LoRA, which do not change with it any more: they belong to the caller."""
    return {
        name: LowRankFactors(pair.lora_a.detach(), pair.lora_b.detach(), pair.scale)
        for name, pair in lora.factors().items()
    }


def tune_full(
    model: GenerativeAdapter,
    examples: Sequence[TuningExample],
    settings: TuningSettings,
    validation: Sequence[TuningExample] = (),
    start: Weights | None = None,
) -> Weights:
    """Train all weights of the base model, then restore the old ones.

    Args and Raises: as in `tune_lora`, with weights in place of factors.

    Returns:
        The trained weights by name, for `weights_in_force`, on the CPU.
    """
    before, lean = _copied(model.base), lean_modules(model.base)
    take_out_lean_modules(model.base)  # they keep nothing for the gradient of a weight
    model.base.requires_grad_(True)
    try:
        if start is not None:
            _load(model.base, start)
        train(model.base, examples, settings, partial(_loss, model, None), validation)
        return _copied(model.base)
    finally:
        model.base.requires_grad_(False)
        _load(model.base, before)
        for parent, name, module in lean:
            setattr(parent, name, module)


@contextmanager
def weights_in_force(model: GenerativeAdapter, weights: Weights) -> Iterator[None]:
    """Give the base model other weights while the block runs, then restore its own exactly."""
    before = _copied(model.base)
    _load(model.base, weights)
    try:
        yield
    finally:
        _load(model.base, before)


def _copied(module: nn.Module) -> dict[str, Tensor]:
    """All parameters, copied to the CPU, shared ones once."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in module.named_parameters()}


@torch.no_grad()
def _load(module: nn.Module, weights: Weights) -> None:
    for name, parameter in module.named_parameters():
        parameter.copy_(weights[name])


def train(
    trained: nn.Module,
    examples: Sequence[Example],
    settings: TuningSettings,
    loss_of: BatchLoss[Example],
    validation: Sequence[Example] = (),
) -> None:
    """Train in place; with validation examples, keep the weights of the best epoch.

    Args:
        trained: its parameters are trained.
        examples: at least one.
        settings: how to train.
        loss_of: the summed loss of a batch of examples, and the number of tokens that it is of.
        validation: examples for early stopping.

    Raises:
        InputError: there are no examples.
    """
    if not examples:
        raise InputError("there must be at least one example to tune on, but there is none")
    optimizer = torch.optim.AdamW(trained.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    order, random = list(range(len(examples))), Random(settings.seed)
    best, best_state, rises, last, taken = math.inf, None, 0, math.inf, 0
    for _ in range(settings.epochs):
        random.shuffle(order)
        left = None if settings.steps is None else settings.steps - taken
        starts = range(0, len(order), settings.batch_size)[:left]
        taken += len(starts)
        for start in starts:
            batch = [examples[number] for number in order[start : start + settings.batch_size]]
            optimizer.zero_grad(set_to_none=True)
            total, tokens = loss_of(batch)
            (total / max(tokens, 1)).backward()
            torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
        if not validation:
            continue
        loss = _mean_loss(validation, settings.batch_size, loss_of)
        if loss < best:
            best, best_state = loss, copy.deepcopy(trained.state_dict())
        rises = rises + 1 if loss > last else 0
        last = loss
        if rises >= settings.patience:
            break
    if best_state is not None:
        trained.load_state_dict(best_state)


@torch.no_grad()
def _mean_loss(examples: Sequence[Example], batch_size: int, loss_of: BatchLoss[Example]) -> float:
    parts = [loss_of(examples[start : start + batch_size]) for start in range(0, len(examples), batch_size)]
    return float(sum(float(total) for total, _ in parts) / max(sum(tokens for _, tokens in parts), 1))


def _loss(model: GenerativeAdapter, lora: StaticLora | None, batch: Sequence[TuningExample]) -> tuple[Tensor, int]:
    """Summed loss of the learned tokens of a batch, and their number."""
    length = max(len(example.tokens) for example in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.int64)
    learned = torch.zeros(len(batch), length, dtype=torch.bool)
    for row, example in enumerate(batch):
        ids[row, : len(example.tokens)] = torch.tensor(example.tokens)
        learned[row, example.start : len(example.tokens)] = True
    ids, learned = ids.to(model.device), learned.to(model.device)
    with model.using({} if lora is None else lora.factors()):
        hidden = model.decoder(input_ids=ids, use_cache=False).last_hidden_state
    # token_loss is for a frozen head; here the head may be trained too.
    logits = model.logits(hidden[:, :-1][learned[:, 1:]])
    return F.cross_entropy(logits.float(), ids[learned], reduction="sum"), int(learned.sum())
