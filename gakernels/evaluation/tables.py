"""Tables as Markdown and HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class ReportTable:
    """A table.

    Attributes:
        title: above it.
        headings: of the columns; the first one is set to the left, the others to the right.
        rows: cells as they are shown.
        note: below it.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """With a heading of the second level."""
        lines = [_line(self.headings), "|---" + "|---:" * (len(self.headings) - 1) + "|", *map(_line, self.rows)]
        parts = [f"## {self.title}", "\n".join(lines), self.note]
        return "\n\n".join(filter(None, parts)) + "\n"

    def html(self) -> str:
        """With a heading of the second level."""
        head = "".join(f"<th>{escape(heading)}</th>" for heading in self.headings)
        body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows)
        note = f"<p>{escape(self.note)}</p>\n" if self.note else ""
        return f"<h2>{escape(self.title)}</h2>\n<table>\n<tr>{head}</tr>\n{body}\n</table>\n{note}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def short_count(count: float) -> str:
    """A count with a prefix, of powers of 1,000."""
    prefixes = ("", "k", "M", "G", "T", "P")
    power = min(max(len(str(int(count))) - 1, 0) // 3, len(prefixes) - 1)
    return f"{count / 1000**power:.{3 if power else 0}f} {prefixes[power]}".strip()


def short_seconds(seconds: float | None) -> str:
    """Seconds or milliseconds; a dash for none."""
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.2f} ms"
