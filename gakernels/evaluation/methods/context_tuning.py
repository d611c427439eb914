"""Fine-tuning on the context itself: a LoRA for each, trained on its text, then asked closed-book."""

from __future__ import annotations

from collections.abc import Sequence

from gakernels.evaluation.cases import Case, Scenario
from gakernels.evaluation.methods.base import MethodSettings, Prepared
from gakernels.evaluation.methods.tuned import CONTINUAL_BATCH, CONTINUAL_EPOCHS, TunedMethod
from gakernels.model import GenerativeAdapter


class ContextTuning(TunedMethod):
    """As `ContinualPretraining`, but a LoRA learns one context alone, as the generated adapter knows one alone."""

    def __init__(self, model: GenerativeAdapter, scenario: Scenario, settings: MethodSettings) -> None:
        super().__init__(model, scenario, settings)
        self._settings = self.settings_of("tuning", CONTINUAL_EPOCHS, CONTINUAL_BATCH)

    def prepare(self, cases: Sequence[Case]) -> Prepared:
        """Trains once for each text."""
        texts = dict.fromkeys(case.context.text for case in cases)
        trained = {text: self.tune(self.texts([text]), self._settings) for text in texts}
        return self.prepared([trained[case.context.text] for case in cases])
