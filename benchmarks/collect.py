"""Keep results: `python -m benchmarks.collect DIR` adds the rows of a run to `benchmarks/results/<device>/rows.jsonl`.

Rows that are there already are left out, so the command can be repeated; nothing is ever changed or removed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.rows import RESULTS, RowWriter, read_rows


def collect(source: Path, results: Path) -> int:
    """Returns the number of new rows. Raises: ValueError: a file is missing or damaged."""
    known = read_rows(results) if results.is_dir() else []
    new = [row for row in read_rows(source) if row not in known]
    for row in new:
        RowWriter(results / row.environment.folder / "rows.jsonl", with_csv=False).write(row)
    return len(new)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.collect", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path, help="what `benchmarks.gpu_suite --out` or `pytest --rows` wrote")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(words)
    try:
        print(f"{collect(options.source, options.results)} new rows in {options.results}")
    except (ValueError, OSError) as error:
        print(f"collect: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
