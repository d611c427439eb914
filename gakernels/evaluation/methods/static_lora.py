"""The control: a LoRA that was trained as long as the generator and knows no context."""

from __future__ import annotations

from collections.abc import Sequence

from gakernels.adapters.adapter import Adapter
from gakernels.errors import InputError
from gakernels.evaluation.cases import Case, Scenario
from gakernels.evaluation.methods.base import MethodSettings, Prepared, SimpleMethod
from gakernels.model import GenerativeAdapter


class StaticLoraControl(SimpleMethod):
    """One adapter, read from a file, for all contexts.

    Raises:
        InputError: no file was named.
        FormatError: it belongs to another base model or other layers.
    """

    adapted = True

    def __init__(self, model: GenerativeAdapter, scenario: Scenario, settings: MethodSettings) -> None:
        super().__init__(model, scenario, settings)
        if settings.static_lora is None:
            raise InputError("static_lora needs the file of a trained static LoRA; name it with --static-lora")
        adapter = Adapter.load(settings.static_lora)
        with model.adapted(adapter):  # refuses one of another model
            self._adapter = self.to_base(adapter)

    def prepare(self, cases: Sequence[Case]) -> Prepared:
        """The same for all."""
        return Prepared([self._adapter] * len(cases))
