"""The whole context in the prompt."""

from __future__ import annotations

from collections.abc import Sequence

from gakernels.evaluation.cases import Case
from gakernels.evaluation.methods.base import Prepared, SimpleMethod


class FullPrompt(SimpleMethod):
    """The context stands in front of every question; of what the model can't read at once, the last part is kept, as in
    the paper (section 4.1)."""

    def prepare(self, cases: Sequence[Case]) -> Prepared:
        """Keeps the texts; questions of a context are asked together, so that it is read once for all of them."""
        return Prepared([None] * len(cases), lambda number, query: cases[number].context.text, separate=True)
