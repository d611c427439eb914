"""Plots of the small-scale study: the ablation, recall against context length, and recall against cost."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
mpl.rcParams.update({"svg.hashsalt": "gakernels", "svg.fonttype": "none", "font.size": 8, "figure.dpi": 100})

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

PANELS = (
    ("perplexity", "reconstruction_perplexity", "reconstruction perplexity"),
    ("perplexity", "completion_perplexity", "completion perplexity"),
    ("recall question", "accuracy", "recall, asked"),
    ("recall statement", "accuracy", "recall, sentence to end"),
)
BASELINES = {"closed_book": "closed-book", "prompt": "prompt", "static_lora": "static LoRA"}
MARKERS = "osD^v<>"


def draw(parts: Mapping[str, Any], folder: Path) -> list[Path]:
    """The plots of what is there, as SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    ablations = [part for name, part in parts.items() if name.startswith("ablation")]
    by_length = {name.removeprefix("length "): part for name, part in parts.items() if name.startswith("length")}
    for name, figure in (("ablation", draw_ablation(ablations)), ("recall", draw_recall(by_length))):
        files.append(folder / f"small-scale-{name}.svg")
        figure.savefig(files[-1], metadata={"Date": None}, bbox_inches="tight")
        plt.close(figure)
    return files


def draw_ablation(ablations: list[Mapping[str, Any]]) -> Any:
    """A panel for each metric, a row for each variant, a mark for each seed."""
    figure, panels = plt.subplots(1, len(PANELS), figsize=(10, 3), sharey=True, layout="constrained")
    rows = ablations[0]["rows"]
    labels = list(dict.fromkeys(_label(row) for row in rows if row["method"] != "other_adapter"))
    for axes, (scenario, metric, title) in zip(panels, PANELS, strict=True):
        for number, ablation in enumerate(ablations):
            for row in ablation["rows"]:
                if (row["scenario"], row["metric"]) == (scenario, metric) and _label(row) in labels:
                    _mark(axes, row, labels.index(_label(row)) + 0.2 * number, number)
        axes.set_title(title, fontsize=8)
        axes.grid(axis="x", linewidth=0.3)
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].invert_yaxis()
    return figure


def _label(row: Mapping[str, Any]) -> str:
    if row["method"] == "adapter":
        return str(row["variant"]).replace("_", " ")
    return BASELINES.get(row["method"], row["method"])


def _mark(axes: Axes, row: Mapping[str, Any], place: float, seed: int) -> None:
    errors = [[abs(row["value"] - row[key])] for key in ("low", "high")]
    axes.errorbar([row["value"]], [place], xerr=errors, fmt=MARKERS[seed], color=f"C{seed}", markersize=4, linewidth=1)


def draw_recall(by_length: Mapping[str, Mapping[str, Any]]) -> Any:
    """Recall against the length of the context, and against the operations of reading it and asking one question."""
    figure, grid = plt.subplots(
        len(by_length), 2, figsize=(10, 3 * len(by_length)), squeeze=False, layout="constrained"
    )
    for (name, part), (left, right) in zip(by_length.items(), grid, strict=True):
        methods = list(dict.fromkeys(row["method"] for row in part["results"]))
        cost = {(row["method"], row["cell"]["length"]): _operations(row) for row in part["costs"]}
        for number, method in enumerate(methods):
            rows = [row for row in part["results"] if row["method"] == method]
            values = [row["value"] for row in rows]
            tokens = [row["cell"]["length"] * 2 ** (0.03 * (number - len(methods) / 2)) for row in rows]
            style = {"color": f"C{number}", "marker": MARKERS[number], "markersize": 4, "linewidth": 1}
            errors = [[abs(row["value"] - row[key]) for row in rows] for key in ("low", "high")]
            left.errorbar(tokens, values, yerr=errors, label=method.replace("_", " "), **style)
            right.plot([cost[method, row["cell"]["length"]] for row in rows], values, **style)
        left.set_xscale("log", base=2)
        left.set_xticks(lengths := sorted({row["cell"]["length"] for row in part["results"]}), map(str, lengths))
        left.set_xlabel("tokens of context, 8 facts asked for")
        left.set_ylabel(f"recall ({name} generator)")
        right.set_xscale("log")
        right.set_xlabel("operations: the context once and one question (FLOP)")
        right.legend(*left.get_legend_handles_labels(), fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _operations(row: Mapping[str, Any]) -> float:
    return float(row["contextualization_flops"]["total"] + row["query_flops"]["total"])
