"""Methods: a LoRA for each context, trained for some steps on its text or on what the base says with it at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

import torch
from torch import Tensor

from gakernels.evaluation.datasets import EvaluationContext
from gakernels.evaluation.methods import MethodSettings, Prepared
from gakernels.evaluation.prompts import Asker
from gakernels.evaluation.scenarios import EvaluationCase, Scenario, draw_rank
from gakernels.evaluation.tuned_methods import (
    CONTINUAL_BATCH,
    Factors,
    TunedMethod,
    TuningSettings,
    train,
    trained_factors,
    tune_lora,
)
from gakernels.generation.decoder import Decoder, Row
from gakernels.generation.sampling import Sampling
from gakernels.model import GenerativeAdapter
from gakernels.model.divergence import divergences
from gakernels.model.encoding import encode_text
from gakernels.model.static_lora import StaticLora, static_adapter

STEPS = (1, 3, 10, 30, 100)
LEARNING_RATE = 1e-3  # without held-out contexts to choose it on
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
HELD_OUT = 8

DISTILLATION_STEPS, DISTILLATION_BATCH = 100, 4
DISTILLED_QUESTIONS, QUESTION_TOKENS = 16, 32
WRITE_A_QUESTION = "Write one question that the text above answers."  # to a model that is asked in its chat template


class SteppedTuning(TunedMethod):
    """A LoRA learns the text of a single context for a number of steps, each over up to 16 pieces of the text that the
    model reads at once: for most contexts, over the whole text.

    The learning rate is the one of LEARNING_RATES after which the questions about held-out contexts (8 of the training
    file, drawn by the seed) have the least loss; LEARNING_RATE without such contexts; or the user's. Questions are
    put as to the base model: the LoRA has learned no other form of them.

    Args:
        steps: of the optimizer.
    """

    adapted = False

    def __init__(self, model: GenerativeAdapter, scenario: Scenario, settings: MethodSettings, steps: int) -> None:
        super().__init__(model, scenario, settings)
        self._steps, self._batch = steps, CONTINUAL_BATCH
        self.passes: int | None = steps
        self.chosen = {"learning_rate": settings.learning_rate or LEARNING_RATE}

    def fit(self) -> None:
        """Choose the learning rate."""
        if self.settings.learning_rate is not None or not self.scenario.training:
            return
        count = min(HELD_OUT, len(self.scenario.training))
        drawn = Random(self.settings.seed).sample(self.scenario.training, count)
        losses = [self._losses(context) for context in drawn]
        total = {rate: sum(of_context[rate] for of_context in losses) for rate in LEARNING_RATES}
        self.chosen = {"learning_rate": min(total, key=total.__getitem__)}

    def prepare(self, cases: Sequence[EvaluationCase]) -> Prepared:
        """Trains once for each text."""
        texts = dict.fromkeys(case.context.text for case in cases)
        trained = {text: self.learned(text, list(self.chosen.values()))[0] for text in texts}
        return self.prepared([trained[case.context.text] for case in cases])

    def learned(self, text: str, rates: Sequence[float]) -> list[Factors]:
        """What is trained on a text with each learning rate."""
        examples = self.texts([text])
        return [tune_lora(self.model, examples, self._settings(rate)) for rate in rates]

    def _settings(self, rate: float) -> TuningSettings:
        """An epoch has at least one step."""
        return TuningSettings(rate, self._steps, self._batch, seed=self.settings.seed, steps=self._steps)

    def _losses(self, context: EvaluationContext) -> dict[float, float]:
        """The mean loss of the answers to the questions about a context, by the learning rate of its LoRA."""
        examples, decoder = self.pairs(context.questions), Decoder(self.model)
        found = {}
        for rate, factors in zip(LEARNING_RATES, self.learned(context.text, LEARNING_RATES), strict=True):
            adapter = self.to_base(static_adapter(self.model, factors))
            losses = decoder.losses([Row(example.tokens, adapter, example.start) for example in examples])
            found[rate] = sum(loss for loss, _ in losses) / sum(tokens for _, tokens in losses)
        return found


@dataclass(frozen=True)
class DistilledAnswer:
    """A question with its answer, without the context, and what the base says with the context in front.

    Attributes:
        tokens: of question and answer.
        teacher: (n, d_h), the base's last hidden states, the last ones of which belong to the last tokens.
    """

    tokens: tuple[int, ...]
    teacher: Tensor


class ContextDistillation(SteppedTuning):
    """A LoRA for a single context learns to answer without it as the base does with the context in its prompt.

    The base writes 16 questions about the context (drawn at temperature 1, by the seed) and answers them greedily, with
    the context in front. The LoRA is trained on these for 100 steps of 4: KL(base with the context || base with the
    LoRA), over the whole vocabulary, of each token of the answers and of their ends. The learning rate is chosen as for
    `SteppedTuning`.
    """

    def __init__(self, model: GenerativeAdapter, scenario: Scenario, settings: MethodSettings) -> None:
        super().__init__(model, scenario, settings, DISTILLATION_STEPS)
        self._batch, self.passes = DISTILLATION_BATCH, None
        self._decoder = Decoder(model)
        self._asker = Asker(self._decoder.tokenizer, settings.chat)

    def learned(self, text: str, rates: Sequence[float]) -> list[Factors]:
        """What is trained on a text with each learning rate."""
        examples = self.distilled(text, self.questions(text))
        trained = []
        for rate in rates:
            lora = StaticLora(self.model)
            train(lora, examples, self._settings(rate), partial(self._divergence, lora))
            trained.append(trained_factors(lora))
        return trained

    def questions(self, text: str) -> list[str]:
        """Questions that the base writes about a text."""
        if self.settings.chat:
            tokens = self._asker.question(f"{text}\n\n{WRITE_A_QUESTION}")
        else:  # as the scenario's prompts begin, up to the question itself
            begin, _, _ = self.write("\0").partition("\0")
            tokens = encode_text(self._decoder.tokenizer, f"{text}\n\n{begin}".rstrip())
        row = self._decoder.row(tokens, len(tokens), QUESTION_TOKENS)
        samplings = [
            Sampling(QUESTION_TOKENS, 1.0, seed=draw_rank(self.settings.seed, text, str(number)) >> 193, stop=("\n",))
            for number in range(DISTILLED_QUESTIONS)
        ]
        rows = [row] * DISTILLED_QUESTIONS
        return list(dict.fromkeys(self._decoder.continued(rows, samplings, self._decoder.shared_start(rows))))

    def distilled(self, text: str, questions: Sequence[str]) -> list[DistilledAnswer]:
        """The questions with the base's answers, and the base's hidden states."""
        prompts = [self.write(question) for question in questions]
        told = [f"{text}\n\n{prompt}" for prompt in prompts]
        new_tokens = self.scenario.new_tokens
        asked = [self._asker.question(prompt) for prompt in told]
        rows = [self._decoder.row(tokens, len(tokens), new_tokens) for tokens in asked]
        answers = self._decoder.generate(rows, new_tokens, self.scenario.stops, self._decoder.shared_start(rows))
        own = [self._answered(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        read = [self._answered(prompt, answer) for prompt, answer in zip(told, answers, strict=True)]
        shared = self._decoder.shared_start(read)
        hidden, _ = self._decoder.states(read, shared)
        ends = [len(row.tokens) - (0 if shared is None else shared.tokens) for row in read]
        # One more than the tokens of an answer: what follows it is learned too.
        counts = [min(len(row.tokens) - row.start for row in pair) + 1 for pair in zip(own, read, strict=True)]
        return [
            DistilledAnswer(row.tokens, states[end - count : end].clone())
            for row, states, end, count in zip(own, hidden, ends, counts, strict=True)
        ]

    def _answered(self, prompt: str, answer: str) -> Row:
        asked = self._asker.question(prompt)
        tokens, start = self._asker.answered(prompt, answer) if answer else (asked, len(asked))
        return self._decoder.row(tokens, start)

    def _divergence(self, lora: StaticLora, batch: Sequence[DistilledAnswer]) -> tuple[Tensor, int]:
        """Summed divergence of a batch, and the number of tokens that it is of."""
        rows = [torch.tensor(example.tokens) for example in batch]
        # Padding is on the right and attention is causal, so no token sees it.
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.model.device)
        with self.model.using(lora.factors()):
            hidden = self.model.decoder(input_ids=ids, use_cache=False).last_hidden_state
        student = torch.cat(
            [
                states[len(example.tokens) - len(example.teacher) : len(example.tokens)]
                for states, example in zip(hidden, batch, strict=True)
            ]
        )
        teacher = torch.cat([example.teacher for example in batch])
        vocabulary = self.model.base.config.get_text_config().vocab_size
        return divergences(self.model, student, teacher, vocabulary).sum(), len(teacher)
