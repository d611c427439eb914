"""SECURITY.md names the test that shows each promise; none of them may go away."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_promise_is_shown_by_a_test_that_is_there() -> None:
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    promises = page.partition("| promise | shown by |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(promises) > 10
    for line in promises:
        shown_by = re.findall(r"`(tests/[\w/]+\.py)`", line)
        assert shown_by, line
        for name in shown_by:
            assert "\ndef test_" in (ROOT / name).read_text(encoding="utf-8"), name
    assert "(SECURITY.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
