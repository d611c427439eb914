"""Compare two sets of results: `python -m benchmarks.compare A B` prints the ratios B / A with their spread.

A and B are files or folders of rows, or commits whose rows stand in `benchmarks/results`. The status is 1 if a case of
B is slower by more than the limit and by more than the spread, or has no time where A had one.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.rows import RESULTS, TIMED, Row, newest, read_rows

Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Ratio:
    """Time in B over time in A: of the medians, and from the most favourable to the least favourable percentiles."""

    median: float
    low: float  # p20 of B over p80 of A
    high: float  # p80 of B over p20 of A

    def verdict(self, limit: float) -> str:
        """`slower` or `faster` where the medians differ by more than the limit and the spreads do not overlap."""
        if self.median > limit and self.low > 1:
            return "slower"
        if self.median < 1 / limit and self.high < 1:
            return "faster"
        return ""


def ratio(a: Row, b: Row) -> Ratio:
    """Raises: ValueError: a row has no time."""
    times = [(row.p20_ms, row.p50_ms, row.p80_ms) for row in (a, b)]
    (a20, a50, a80), (b20, b50, b80) = times
    if a20 is None or a50 is None or a80 is None or b20 is None or b50 is None or b80 is None:
        raise ValueError("a row without a time has no ratio")
    return Ratio(b50 / a50, b20 / a80, b80 / a20)


def load(name: str, results: Path) -> list[Row]:
    """The newest row of each case: of a file or folder, or of a commit in the folder of results.

    Raises:
        ValueError: there is no such file and no row of such a commit, or a file is damaged.
    """
    if Path(name).exists():
        rows = read_rows(Path(name))
    else:
        rows = [row for row in read_rows(results) if _same_commit(row.environment.commit, name)]
        if not rows:
            raise ValueError(f"{name!r} is no file, and no row in {results} was measured at such a commit")
    return newest(rows)


def _same_commit(commit: str, name: str) -> bool:
    """Both may be short. A commit with changes on top, `abc+`, is another one than `abc`."""
    if len(name) < 4 or commit.endswith("+") != name.endswith("+"):
        return False
    commit, name = commit.rstrip("+"), name.rstrip("+")
    return commit.startswith(name) or name.startswith(commit)


def key(row: Row) -> Key:
    """What makes two rows comparable: the same case and provider on the same device."""
    return (*row.case, row.provider, row.environment.device, row.environment.threads)


def compare(a: Iterable[Row], b: Iterable[Row], limit: float) -> tuple[list[str], int]:
    """The lines of the table, and how many cases became worse."""
    before, after = ({key(row): row for row in rows} for rows in (a, b))
    lines = [f"{'case':64} {'provider':12} {'A ms':>9} {'B ms':>9} {'B/A':>6}  spread"]
    worse = 0
    for name in (name for name in before if name in after):
        old, new = before[name], after[name]
        case = f"{old.kernel} {old.mode} {old.shape} {old.dtype}"
        if old.status not in TIMED:
            continue
        if new.status not in TIMED:
            worse += 1
            lines.append(f"{case:64.64} {old.provider:12.12} {old.p50_ms:9.4g} {new.status:>9.9}  {new.detail}")
            continue
        found = ratio(old, new)
        verdict = found.verdict(limit)
        worse += verdict == "slower"
        spread = f"{found.low:.2f}..{found.high:.2f}"
        times = f"{old.p50_ms:9.4g} {new.p50_ms:9.4g} {found.median:6.3f}"
        lines.append(f"{case:64.64} {old.provider:12.12} {times}  {spread} {verdict}".rstrip())
    only = len(before.keys() ^ after.keys())
    lines.append(f"{len(before.keys() & after.keys())} in both, {only} in one only, {worse} worse")
    return lines, worse


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("a", help="file or folder of rows, or a commit")
    parser.add_argument("b", help="the same; its times stand above the fraction line")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows of commits")
    parser.add_argument("--limit", type=float, default=1.1, help="smallest ratio that counts (default: %(default)g)")
    options = parser.parse_args(words)
    try:
        if not options.limit >= 1:
            raise ValueError(f"--limit must be at least 1, but it is {options.limit:g}")
        a, b = load(options.a, options.results), load(options.b, options.results)
        if not {key(row) for row in a} & {key(row) for row in b}:
            raise ValueError("A and B have no case, provider and device in common")
    except ValueError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    lines, worse = compare(a, b, options.limit)
    print("\n".join(lines))
    return int(worse > 0)


if __name__ == "__main__":
    raise SystemExit(main())
