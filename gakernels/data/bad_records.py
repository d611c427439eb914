"""The records of a data set that could not be used: counted by kind, with the places of the first few."""

from collections.abc import Mapping
from typing import Any

from gakernels.errors import InputError

HIDDEN = "file under a hidden name"  # left out on purpose, so not a fault
_PLACES = 3


class BadRecords:
    """Counts records that were left out.

    Args:
        strict: raise an error at the first one instead.

    Attributes:
        counts: the number of each kind.
        places: where the first three of each kind are.
        records: the number of records read, if the reader reports it.
        lost: how many of them were lost; a record that lost a part counts as that share.
    """

    def __init__(self, strict: bool = False) -> None:
        self.counts: dict[str, int] = {}
        self.places: dict[str, list[str]] = {}
        self.records, self.lost = 0, 0.0
        self._strict = strict

    def add(self, kind: str, place: str) -> None:
        """Count a bad record.

        Raises:
            InputError: it is not tolerated (`strict`).
        """
        if self._strict and kind != HIDDEN:
            raise InputError(f"data: {place}: {kind}")
        self.counts[kind] = self.counts.get(kind, 0) + 1
        places = self.places.setdefault(kind, [])
        if len(places) < _PLACES:
            places.append(place)

    def merge(self, other: "BadRecords") -> None:
        """Add the counts of another instance."""
        for kind, count in other.counts.items():
            self.counts[kind] = self.counts.get(kind, 0) + count
            self.places[kind] = [*self.places.get(kind, []), *other.places[kind]][:_PLACES]

    @property
    def total(self) -> int:
        """The number of all of them."""
        return sum(self.counts.values())

    def to_dict(self) -> dict[str, Any]:
        """The counts as JSON types."""
        return {kind: {"count": count, "first": self.places[kind]} for kind, count in self.counts.items()}

    @property
    def faults(self) -> int:
        """The number of all but those left out on purpose."""
        return self.total - self.counts.get(HIDDEN, 0)

    @property
    def share(self) -> float:
        """The share of the records that was lost."""
        return self.lost / self.records if self.records else 0.0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "BadRecords":
        """The inverse of `to_dict`."""
        bad = cls()
        bad.counts = {kind: int(value["count"]) for kind, value in values.items()}
        bad.places = {kind: [str(place) for place in value["first"]] for kind, value in values.items()}
        return bad

    def __str__(self) -> str:
        return "; ".join(
            f"{count} x {kind} (first: {', '.join(self.places[kind])})" for kind, count in self.counts.items()
        )
