"""Fine-tuned models, asked closed-book: on questions about other contexts, on the contexts first, or on a few shots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from gakernels.adapters.adapter import Adapter
from gakernels.errors import InputError
from gakernels.evaluation.asking import Asker
from gakernels.evaluation.cases import Case, Scenario
from gakernels.evaluation.fine_tuning import (
    Example,
    Factors,
    TuningSettings,
    Weights,
    tune_full,
    tune_lora,
    weights_in_force,
)
from gakernels.evaluation.methods.base import MethodSettings, Prepared, SimpleMethod
from gakernels.evaluation.records import Question
from gakernels.model import GenerativeAdapter
from gakernels.model.encoding import encode_text
from gakernels.model.positions import position_limit
from gakernels.model.static_lora import static_adapter

# Of the paper for all weights of Mistral-7B (appendix C); a LoRA's rate is ours: the paper has none.
LEARNING_RATES = {"tuning": {"full": 1e-5, "lora": 1e-4}, "few_shot": {"full": 5e-6, "lora": 1e-4}}
SUPERVISED_EPOCHS, SUPERVISED_BATCH = 3, 64
CONTINUAL_EPOCHS, CONTINUAL_BATCH = 8, 16
FEW_SHOT_EPOCHS, FEW_SHOT_BATCH, FEW_SHOT_PATIENCE = 40, 16, 3
VALIDATION_SHARE = 10  # one training question in so many is kept back to stop early

Trained = Factors | Weights


class TunedMethod(SimpleMethod):
    """What the fine-tuned methods share.

    Attributes:
        kind: `lora` or `full`.
    """

    adapted = True
    kind = "lora"

    def settings_of(self, what: str, epochs: int, batch_size: int, patience: int = 1) -> TuningSettings:
        """The settings of a tuning, with what the user wants otherwise."""
        rate = self.settings.learning_rate or LEARNING_RATES[what][self.kind]
        return TuningSettings(rate, self.settings.epochs or epochs, batch_size, patience, self.settings.seed)

    def tune(
        self,
        examples: Sequence[Example],
        settings: TuningSettings,
        validation: Sequence[Example] = (),
        start: Trained | None = None,
    ) -> Trained:
        """Train; what was trained goes on from `start`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            train: Callable[..., Trained] = tune_lora if self.kind == "lora" else tune_full
            return train(self.model, examples, settings, validation, start)

    def prepared(self, trained: Sequence[Trained]) -> Prepared:
        """Each case with its own trained model, which may be the same for all."""
        if self.kind == "lora":
            made: dict[int, Adapter] = {}
            for factors in trained:
                made.setdefault(id(factors), self.to_base(static_adapter(self.model, factors)))  # type: ignore[arg-type]
            return Prepared([made[id(factors)] for factors in trained])

        def weights(number: int) -> AbstractContextManager[None]:
            return weights_in_force(self.model, trained[number])  # type: ignore[arg-type]

        separate = len({id(weights) for weights in trained}) > 1
        return Prepared([None] * len(trained), weights=weights, separate=separate)

    def pairs(self, questions: Sequence[Question]) -> list[Example]:
        """Questions as an adapted model is asked them, with the first gold answer, which is what is learned."""
        tokenizer = self.model.tokenizer
        assert tokenizer is not None
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        asker = Asker(tokenizer, self.settings.chat)
        examples = []
        for question in questions:
            tokens, start = asker.answered(self.scenario.write_prompt(question.text), question.answers[0])
            examples.append(Example(*self._kept(tokens + end, start)))
        return examples

    def texts(self, texts: Sequence[str]) -> list[Example]:
        """Texts of which every token is learned; longer ones than the model reads become several."""
        tokenizer = self.model.tokenizer
        assert tokenizer is not None
        limit = self._limit()
        examples = []
        for text in texts:
            tokens = encode_text(tokenizer, text)
            pieces = [tokens[start : start + limit] for start in range(0, len(tokens), limit)]
            examples += [Example(tuple(piece)) for piece in pieces if len(piece) > 1]
        return examples

    def _kept(self, tokens: list[int], start: int) -> tuple[tuple[int, ...], int]:
        """The last tokens that the model can read."""
        cut = max(len(tokens) - self._limit(), 0)
        return tuple(tokens[cut:]), max(start - cut, 1)

    def _limit(self) -> int:
        return position_limit(self.model.base.config) or self.model.config.chunk_size


class SupervisedTuning(TunedMethod):
    """Trained on questions and answers about other contexts, with early stopping (paper: learning rate 1e-5, batch 64).

    Raises:
        InputError: there are no training questions.
    """

    continual = False

    def __init__(self, model: GenerativeAdapter, scenario: Scenario, settings: MethodSettings) -> None:
        super().__init__(model, scenario, settings)
        if not scenario.training and not self.continual:
            raise InputError("supervised fine-tuning needs training questions; name their file with --train")
        self._trained: Trained | None = None

    def fit(self) -> None:
        """Train, once for all contexts."""
        start = None
        if self.continual:
            documents = self.texts(self.scenario.documents())
            start = self.tune(documents, self.settings_of("tuning", CONTINUAL_EPOCHS, CONTINUAL_BATCH))
        self._trained = start
        if self.scenario.training:
            kept = len(self.scenario.training) // VALIDATION_SHARE
            pairs = self.pairs(self.scenario.training)
            settings = self.settings_of("tuning", SUPERVISED_EPOCHS, SUPERVISED_BATCH)
            self._trained = self.tune(pairs[kept:], settings, pairs[:kept], start)

    def prepare(self, cases: Sequence[Case]) -> Prepared:
        """The same for all."""
        assert self._trained is not None, "fit comes first"
        return self.prepared([self._trained] * len(cases))


class SupervisedTuningFull(SupervisedTuning):
    """The same with all weights."""

    kind = "full"


class ContinualPretraining(SupervisedTuning):
    """Trained on the documents of all contexts (paper: 8 epochs, batch 16, learning rate 1e-5), then, where there are
    training questions, on these."""

    continual = True


class ContinualPretrainingFull(ContinualPretraining):
    """The same with all weights."""

    kind = "full"


class FewShotTuning(TunedMethod):
    """Trained on examples of the same task (paper: 16, learning rate 5e-6, at most 40 epochs; it stops when the loss of
    as many others has risen three times in a row)."""

    def __init__(self, model: GenerativeAdapter, scenario: Scenario, settings: MethodSettings) -> None:
        super().__init__(model, scenario, settings)
        self._by_task: dict[tuple[Question, ...], Trained] = {}

    def missing(self, case: Case) -> str | None:
        """There must be training examples."""
        return None if case.training else "no training examples of the task"

    def prepare(self, cases: Sequence[Case]) -> Prepared:
        """Trains once for each set of examples."""
        trained = []
        for case in cases:
            if case.training not in self._by_task:
                settings = self.settings_of("few_shot", FEW_SHOT_EPOCHS, FEW_SHOT_BATCH, FEW_SHOT_PATIENCE)
                pairs, validation = self.pairs(case.training), self.pairs(case.validation)
                self._by_task[case.training] = self.tune(pairs, settings, validation)
            trained.append(self._by_task[case.training])
        return self.prepared(trained)


class FewShotTuningFull(FewShotTuning):
    """The same with all weights."""

    kind = "full"
