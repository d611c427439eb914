"""The plot of recall: a panel for each test, a line for each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_AXES = {
    "facts": "facts about a person",
    "length": "tokens of context",
    "position": "third of the context",
    "distractors": "distractors",
    "overwritten": "facts told anew",
    "needle": "tokens around one fact",
}
_MARKERS = "osD^v<>ph*"


def draw_recall(figure: Any, rows: Sequence[Mapping[str, Any]], chance: float) -> None:
    """Draw the results of one metric, with the chance level as a dotted line."""
    tests = list(dict.fromkeys(name for row in rows for name in row["cell"]))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    across = min(3, len(tests))
    panels = figure.subplots(-(-len(tests) // across), across, squeeze=False, sharey=True).flat
    for test, axes in zip(tests, panels, strict=False):
        values = list(dict.fromkeys(row["cell"][test] for row in rows if test in row["cell"]))
        for number, method in enumerate(methods):
            line = {row["cell"][test]: row for row in rows if row["method"] == method and test in row["cell"]}
            places = [place + 0.05 * (number - len(methods) / 2) for place, value in enumerate(values) if value in line]
            shown = [line[value] for value in values if value in line]
            errors = [[abs(row["value"] - row[key]) for row in shown] for key in ("low", "high")]
            style = {"color": f"C{number % 10}", "marker": _MARKERS[number % len(_MARKERS)], "markersize": 4}
            axes.errorbar(places, [row["value"] for row in shown], yerr=errors, label=method, linewidth=1, **style)
        axes.axhline(chance, color="0.5", linestyle=":", linewidth=1)
        axes.set_xticks(range(len(values)), [f"{value:,}" if isinstance(value, int) else value for value in values])
        axes.set_xlabel(_AXES.get(test, test))
        axes.set_ylim(-0.03, 1.03)
    for axes in list(panels)[len(tests) :]:
        axes.set_visible(False)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(methods), fontsize=8
    )
