"""Bad records are counted by kind, with the first few places."""

import json

import pytest
from writing import drawn

from gakernels import InputError
from gakernels.data import BadRecords


def test_each_kind_has_its_count_and_its_first_places() -> None:
    bad, counts = BadRecords(), {kind: drawn(1, 9) for kind in ("a", "b")}
    assert bad.total == 0
    for kind, count in counts.items():
        for number in range(count):
            bad.add(kind, f"{kind}{number}")
    assert bad.counts == counts
    assert bad.total == sum(counts.values())
    assert bad.places == {
        kind: [f"{kind}{number}" for number in range(min(count, 3))] for kind, count in counts.items()
    }
    assert str(bad) == "; ".join(f"{n} x {kind} (first: {', '.join(bad.places[kind])})" for kind, n in counts.items())


def test_they_come_back_from_json() -> None:
    bad = BadRecords()
    for number in range(5):
        bad.add("line that is not JSON", f"line {number}")
    again = BadRecords.from_dict(json.loads(json.dumps(bad.to_dict())))
    assert (again.counts, again.places) == (bad.counts, bad.places)


def test_strictness_makes_the_first_one_an_error() -> None:
    with pytest.raises(InputError, match=r"data: line 3 of a\.jsonl: line that is not JSON"):
        BadRecords(strict=True).add("line that is not JSON", "line 3 of a.jsonl")
