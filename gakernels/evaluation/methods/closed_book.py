"""The base model without the context."""

from __future__ import annotations

from collections.abc import Sequence

from gakernels.evaluation.cases import Case
from gakernels.evaluation.methods.base import Prepared, SimpleMethod


class ClosedBook(SimpleMethod):
    """Nothing is known of the context."""

    def prepare(self, cases: Sequence[Case]) -> Prepared:
        """Nothing."""
        return Prepared([None] * len(cases))
