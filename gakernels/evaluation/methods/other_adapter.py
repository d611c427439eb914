"""The control: the generated adapter of another context."""

from __future__ import annotations

from collections.abc import Sequence

from gakernels.evaluation.cases import Case
from gakernels.evaluation.methods.base import Prepared, SimpleMethod


class OtherAdapter(SimpleMethod):
    """What an adapter does that knows nothing of this context: it tells what comes from the context and what from the
    generator's training."""

    adapted = True

    def missing(self, case: Case) -> str | None:
        """There must be another context of the same kind."""
        return None if case.other is not None else "no other context of the same kind"

    def prepare(self, cases: Sequence[Case]) -> Prepared:
        """Makes the adapters of the others."""
        others = [self.scenario.cases[case.other].context.text for case in cases if case.other is not None]
        return Prepared(self.adapt(others))
