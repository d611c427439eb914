"""Updates of the state compared: recall of generators that `small_scale_training` trained with several seeds.

    for name in default-0 default-1 ...; do
        gakernels eval recall --generator GENERATORS/$name --tests facts,length,overwritten --facts 12,24 \
            --lengths 96,128,160,192,256,320,384,512,1024 --contexts 60 --seed 1000000 --methods adapter \
            --json REPORTS/$name.json
    done
    python -m studies.state_updates REPORTS --json FILE

It reads the reports and prints a table: the mean over the seeds of each variant, and the length at which recall falls
below 80%, interpolated between the lengths that were measured.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from gakernels.files import write_text

BAR = 0.8
COLUMNS = (("facts", 12), ("facts", 24), ("length", 128), ("length", 256), ("length", 512), ("length", 1024))
Scores = dict[tuple[str, int, str], float]


def read(folder: Path) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """The results of the adapter, by variant and seed; reports are named VARIANT-SEED.json."""
    found: dict[str, dict[int, list[dict[str, Any]]]] = defaultdict(dict)
    for path in sorted(folder.glob("*-*.json")):
        variant, seed = path.stem.rsplit("-", 1)
        results = json.loads(path.read_text())["results"]
        kept = ("cell", "metric", "value", "low", "high", "count")
        found[variant][int(seed)] = [
            {name: row[name] for name in kept} for row in results if row["method"] == "adapter"
        ]
    return found


def scores(rows: Sequence[Mapping[str, Any]]) -> Scores:
    """Values by test, number and metric."""
    return {(*next(iter(row["cell"].items())), row["metric"]): row["value"] for row in rows}


def length_at_bar(found: Scores) -> float:
    """Where recall falls below 80%, between two lengths that were measured."""
    lengths = sorted(number for test, number, _ in found if test == "length")
    values = [found["length", length, "accuracy"] for length in lengths]
    for (shorter, above), (longer, below) in pairwise(zip(lengths, values, strict=True)):
        if above >= BAR > below:
            return shorter + (longer - shorter) * (above - BAR) / (above - below)
    raise ValueError(f"recall does not cross {BAR:.0%} within {lengths}")


def table(found: Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]]) -> Iterator[str]:
    """The table in Markdown."""
    headings = [f"{number:,} {'facts' if test == 'facts' else 'tokens'}" for test, number in COLUMNS]
    headings += ["4 facts told again: new, old value", "tokens at 80%"]
    yield "| recall, % | " + " | ".join(headings) + " |"
    yield "|---|" + "---|" * len(headings)
    for variant, by_seed in found.items():
        seeds = [scores(rows) for rows in by_seed.values()]
        cells = [f"{mean(100 * one[test, number, 'accuracy'] for one in seeds):.1f}" for test, number in COLUMNS]
        again = [mean(100 * one["overwritten", 4, metric] for one in seeds) for metric in ("accuracy", "old_value")]
        at_bar = [length_at_bar(one) for one in seeds]
        cells += [", ".join(f"{value:.1f}" for value in again)]
        cells += [f"{mean(at_bar):.0f} ({', '.join(f'{length:.0f}' for length in at_bar)})"]
        yield f"| `{variant}` | " + " | ".join(cells) + " |"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, help="folder of reports")
    parser.add_argument("--json", type=Path, help="file for their results")
    options = parser.parse_args()
    found = read(options.reports)
    if options.json:
        write_text(options.json, json.dumps(found, indent=1) + "\n")
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
